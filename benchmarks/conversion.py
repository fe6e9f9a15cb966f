"""What converting SmolLM2-135M costs and brings: ``python benchmarks/conversion.py [--minutes 40] [--dense FOLDER]``.

Splits the dense model at each of ``--budgets``, trains each split for ``--minutes`` or on ``--train-tokens``, upcycles
it, measures all of them beside it on text that nothing of this saw, and times one token's feed-forwards. The budget 1
is the dense model in another form: trained alike, it says what the text itself teaches. With the default of 40 minutes
each, all takes three hours; nothing else may run meanwhile. What is in
``--models`` is not made or measured again, and a training that was interrupted goes on. Writes ``conversion.json``, and
the tables into docs/conversion.md between its marks.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from moesaic.bench.conversion import (
    Converted,
    Quality,
    active_parameters,
    distance_with_all_on,
    feed_forwards,
    ffn_times,
    quality,
    quality_part,
    speed_part,
)
from moesaic.bench.limits import machine
from moesaic.bench.part import Part
from moesaic.bench.report import make_folder
from moesaic.bench.results import add, read, section
from moesaic.bench.targets import Verdict
from moesaic.cli.output import print_table
from moesaic.convert import DistillSettings, SplitSettings, UpcycleSettings, distill, split, upcycle
from moesaic.data import load_corpus, load_tokenizer
from moesaic.data.split import split_corpus
from moesaic.errors import MoesaicError
from moesaic.hf.load import load_model

ROOT = Path(__file__).resolve().parent.parent
FILE, PAGE = "conversion.json", ROOT / "docs" / "conversion.md"
BEGIN, END = "<!-- quality: made by benchmarks/conversion.py -->\n", "<!-- end of quality -->\n"
EQUAL = 1e-5


def main() -> int:
    """0, or 130 where it was interrupted; another code where something cannot be had."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dense", type=Path, help="a dense model's folder; SmolLM2-135M-Instruct by default")
    parser.add_argument(
        "--budgets", default="0.5,0.25,1", help="shares of the FFN that a token uses, the first one timed"
    )
    parser.add_argument(
        "--trained", action="append", default=[], help="BUDGET=FOLDER: a split that has been trained already"
    )
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, default=40.0, help="of training for each budget")
    length.add_argument("--train-tokens", type=int, help="of text to train on for each budget, instead")
    parser.add_argument("--tokens", type=int, default=16384, help="of held-out text a domain")
    parser.add_argument("--seconds", type=float, default=30.0, help="of timing for each dtype")
    parser.add_argument("--models", type=Path, default=Path("runs/conversion"), help="the folder to keep models in")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="the folder to write")
    options = parser.parse_args()
    try:
        make_folder(options.models)
        make_folder(options.out)
        return run(options)
    except KeyboardInterrupt:
        return 130
    except MoesaicError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def run(options: argparse.Namespace) -> int:
    """Make what is missing, measure what has not been, and write both tables."""
    dense = options.dense or smollm2()
    budgets = [float(word) for word in options.budgets.split(",")]
    ready = {float(budget): Path(folder) for budget, _, folder in (word.partition("=") for word in options.trained)}
    if options.train_tokens is None:
        length = {"minutes": options.minutes}
    else:
        length = {"tokens": options.train_tokens}
    models = make(dense, options.models, budgets, length, ready)
    found: dict[str, Quality] = {}
    for model in models:
        say(f"measuring {model.name}")
        cache = options.models / f"{model.folder.name}.json"
        found[model.name] = quality(model.folder, dense, cache, max_tokens=options.tokens)
    half = next(model for model in models if model.training)
    parts = {"quality": quality_part(models, found, options.tokens, half.name)}
    parts["quality"].verdicts.append(equality(options.models / untrained(budgets[0]), dense))
    trained = {model.name: model.folder for model in models if model.training}
    parts["speed"] = timing(dense, trained, half.name, options.seconds)
    told = {}
    for name, part in parts.items():
        print_table(part.title, part.header, part.rows, whole=True)
        add(name, part, machine(), told, options.out / FILE)
        told = read(options.out / FILE)
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), section(told)), encoding="utf-8")
    say(f"written: {PAGE}")
    return 0


def smollm2() -> Path:
    """The folder that scripts/smollm2.py prints."""
    done = subprocess.run([sys.executable, ROOT / "scripts" / "smollm2.py"], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(done.returncode)
    return Path(done.stdout.strip())


def untrained(active: float) -> str:
    """The folder's name of a split before its training."""
    return f"split-{active:g}"


def make(
    dense: Path, folder: Path, budgets: Sequence[float], length: dict[str, Any], ready: Mapping[float, Path]
) -> list[Converted]:
    """All models of the table, the dense one first; those that are there are not made again, nor ``ready`` ones.

    Args:
        length: of the training, a keyword of DistillSettings.
    """
    models = [Converted("dense", dense)]
    trained = []
    ((unit, amount),) = length.items()
    training = f"{amount:g} min" if unit == "minutes" else f"{amount:,} tokens"
    for active in budgets:
        begun = folder / untrained(active)
        out = ready.get(active, folder / f"{begun.name}-{amount:g}{unit}")
        if not begun.exists() and (active < 1 or not out.exists()):
            split(dense, begun, SplitSettings(active=active), say=say)
        if active < 1:  # with all experts on it is the dense model
            models.append(Converted(f"split, {active:.0%} active, untrained", begun))
        if not out.exists():
            distill(begun, dense, out, DistillSettings(**length), say=say)
        trained.append(Converted(f"split, {active:.0%} active, distilled", out, training))
    upcycled = folder / "upcycled"
    if not upcycled.exists():
        upcycle(dense, upcycled, UpcycleSettings(num_experts=4, top_k=2), say=say)
    return [*models, *trained, Converted("upcycled, 2 of 4 experts, untrained", upcycled)]


def equality(folder: Path, dense: Path) -> Verdict:
    """A split with all experts on against the dense model."""
    distance = distance_with_all_on(folder, dense, text_ids(dense, 256))
    say(f"with all experts on, logits differ by {distance:.2g} of their norm")
    # In units of what is allowed, which a verdict can show.
    what = f"distance of the logits from the dense model's, {distance:.1g}, over {EQUAL:g}"
    return Verdict("quality", "split, 100% active", what, 1.0, distance / EQUAL, at_most=True)


def timing(dense: Path, models: dict[str, Path], half: str, seconds: float) -> Part:
    """One token's feed-forwards in float32 and bfloat16."""
    ids = text_ids(dense, 128)
    times = {}
    for name, dtype in {"fp32": torch.float32, "bf16": torch.bfloat16}.items():
        say(f"timing the feed-forwards in {name}")
        times[name] = ffn_times(dense, models, ids, dtype, seconds)
    model = load_model(dense)[0]
    part = speed_part(times, len(feed_forwards(model)), half)
    part.figures["dense parameters"] = float(active_parameters(model))
    return part


def text_ids(dense: Path, tokens: int) -> torch.Tensor:
    """``[1, tokens]`` of held-out code."""
    _, held_out = split_corpus(load_corpus())
    text = "\n\n".join(document.text for document in held_out if document.domain == "code")
    ids: list[int] = load_tokenizer(str(dense))(text[: 20 * tokens])["input_ids"]
    return torch.tensor([ids[:tokens]])


def page(text: str, measured: str) -> str:
    """The page with what was measured between its marks."""
    return text[: text.index(BEGIN)] + BEGIN + "\n" + measured + "\n" + text[text.index(END) :]


def say(line: str) -> None:
    """One line for whoever watches."""
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
