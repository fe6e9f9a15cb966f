"""ESFT, LoRA and full fine-tuning side by side: ``python benchmarks/adapters.py [--out FOLDER]``.

The base is the demo's model made smaller, trained on both domains of the demo's data. Each method tunes it to one of
the two, with three orders of the data; measured is the perplexity of both on what training holds out. Prints the tables
of docs/adapters.md as Markdown, and writes ``adapters.json``. What has been done is not done again, so that an
interruption loses one run only; all of it takes some minutes on two CPU cores.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moesaic.adapters.finetune import Finetuning, finetune
from moesaic.adapters.recipe import FinetuneRecipe
from moesaic.data import Batches
from moesaic.errors import MoesaicError
from moesaic.train.job import Setting
from moesaic.train.loop import Trainer
from moesaic.train.precision import choose_device, choose_precision
from moesaic.train.recipe_file import load_recipe
from moesaic.train.run import train

BASE = [
    *["d_model=96", "num_layers=3", "num_heads=3", "d_ff=96", "max_length=128", "vocab_size=2048"],
    *["sequence_length=128", "steps=800", "batch_size=8", "save_every=0", "eval_tokens=16384"],
]
DOMAINS = ("code", "prose")
SEEDS = (0, 1, 2)
# What each method is run with. The learning rate is the best of RATES for it, by --search: one seed, on code.
METHODS = {
    "ESFT": ["method=esft", "threshold=0.3", "learning_rate=3e-3"],
    "LoRA": ["method=lora", "targets=both", "rank=8", "learning_rate=3e-3"],
    "full": ["method=full", "learning_rate=1e-3"],
}
RATES = ("3e-4", "1e-3", "3e-3", "1e-2")
TRAINING = [
    *["train.steps=120", "train.batch_size=8", "train.warmup_steps=12", "train.final_learning_rate=0.0"],
    *["train.weight_decay=0.0", "train.save_every=0", "train.eval_tokens=16384", "data.sequence_length=128"],
    *["data.sources=stdlib"],
]
TIMED_STEPS = 12


def main() -> int:
    """0; 2 where the base cannot be used; 130 where it was interrupted."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/adapters"), help="the folder to write")
    parser.add_argument("--most", type=int, default=1000, help="do at most so many runs now")
    parser.add_argument("--search", action="store_true", help="only compare learning rates")
    parser.add_argument("--time", action="store_true", help="only measure the time of a step, the methods alternating")
    options = parser.parse_args()
    base = options.out / "base"
    try:
        if not (base / "model").is_dir():
            train(load_recipe(None, BASE), base, overwrite=base.exists())
        if options.time:
            times(base)
        else:
            study(base, options.out, options.most, search=options.search)
    except MoesaicError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    return 0


def study(base: Path, out: Path, most: int, *, search: bool) -> None:
    """Do what has not been done yet, and tell all of it."""
    results = []
    for name, words in searched() if search else compared():
        folder = out / name
        result = folder / "result.json"
        if not result.is_file():
            if most == 0:
                print(f"{name} and what follows is still to be done")
                break
            most -= 1
            done = finetune(recipe_of(base, words), folder, overwrite=folder.exists())
            result.write_text(json.dumps(dataclasses.asdict(done), default=str))
        told = json.loads(result.read_text())
        results.append({"run": name, **told})
        after = {domain: f"{told['after'][domain]['perplexity']:.3f}" for domain in DOMAINS}
        print(f"{name}: {after}", file=sys.stderr)
    (out / "adapters.json").write_text(json.dumps(results, indent=2))
    if not search:
        tell(results)


def compared() -> Iterator[tuple[str, list[str]]]:
    """Name and words of every run of the comparison."""
    for seed in SEEDS:
        for domain in DOMAINS:
            for method, words in METHODS.items():
                yield f"{method}-{domain}-{seed}", [*words, f"data.mixture.{domain}=1", f"seed={seed}"]


def searched() -> Iterator[tuple[str, list[str]]]:
    """Name and words of every run that a learning rate is chosen by."""
    for method, words in METHODS.items():
        for rate in RATES:
            changed = [*words, f"learning_rate={rate}", "data.mixture.code=1", "seed=7"]
            yield f"{method}-rate-{rate}", changed


def recipe_of(base: Path, words: list[str]) -> FinetuneRecipe:
    """The recipe of one run."""
    return load_recipe(None, [f"base={base}", *TRAINING, *words], FinetuneRecipe)


def tell(results: list[dict[str, Any]]) -> None:
    """The table as Markdown: mean and standard deviation over the seeds."""
    print("| tuned to | method | own domain | other domain | trained | on disk |")
    print("|---|---|---|---|---|---|")
    for own, other in (DOMAINS, DOMAINS[::-1]):
        for method in METHODS:
            runs = [run for run in results if run["run"].startswith(f"{method}-{own}-")]
            if not runs:
                continue
            if method == next(iter(METHODS)):
                print(f"| {own} | base | {_before(runs, own)} | {_before(runs, other)} | | |")
            one = runs[0]
            share = one["trained_parameters"] / one["parameters"]
            print(
                f"| {own} | {method} | {_after(runs, own)} | {_after(runs, other)} | "
                f"{one['trained_parameters']:,} ({share:.1%}) | {one['bytes'] / 1e6:.2f} MB |"
            )


def _before(runs: list[dict[str, Any]], domain: str) -> str:
    return f"{runs[0]['before'][domain]['perplexity']:.2f}"


def _after(runs: list[dict[str, Any]], domain: str) -> str:
    values = [run["after"][domain]["perplexity"] for run in runs]
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"


def times(base: Path) -> None:
    """Milliseconds a step, the methods taking turns, so that whatever else the machine does meets all alike."""
    trainers = {
        method: trainer_of(recipe_of(base, [*words, "data.mixture.code=1"])) for method, words in METHODS.items()
    }
    seconds: dict[str, list[float]] = {method: [] for method in trainers}
    for round_ in range(TIMED_STEPS):
        for method, trainer in trainers.items():
            before = trainer.seconds
            trainer.train_step()
            if round_ > 1:
                seconds[method].append(trainer.seconds - before)
    print("| method | ms a step |")
    print("|---|---|")
    for method, values in seconds.items():
        print(f"| {method} | {1e3 * statistics.median(values):.0f} ± {1e3 * statistics.stdev(values):.0f} |")


def trainer_of(recipe: FinetuneRecipe) -> Trainer:
    """A trainer as a run makes it."""
    job, train = Finetuning(recipe), recipe.train
    data = job.read(None)
    batches = Batches(
        data.train,
        sequence_length=recipe.data.sequence_length,
        batch_size=train.batch_size,
        seed=train.seed,
        mixture=recipe.data.mixture,
    )
    device = choose_device(train.device)
    precision = choose_precision(train.precision, device)
    built = job.build(Setting(data, batches, device, precision, None, lambda line: None))
    return Trainer(built.model, batches, train, device, precision)


if __name__ == "__main__":
    sys.exit(main())
