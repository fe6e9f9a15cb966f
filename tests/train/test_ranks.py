"""Runs of several ranks: the same numbers as one process, checkpoints for any number of ranks, one voice, restarts."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.parallel import harness
from tests.train import tiny
from torch.distributed.checkpoint import FileSystemReader
from transformers import AutoModelForCausalLM

from moesaic.cli.main import run as moesaic
from moesaic.errors import Interrupted
from moesaic.train.checkpoint import newest_good, published
from moesaic.train.metrics import read_metrics
from moesaic.train.recipe import Recipe
from moesaic.train.recipe_file import recorded_recipe
from moesaic.train.run import train

ROOT = Path(__file__).parents[2]
FOREVER = 400.0  # seconds; a run takes some, on a busy machine a minute


@pytest.fixture(scope="module", autouse=True)
def pools() -> Iterator[None]:
    with harness.pools_stopped_at_end():
        yield


def wide(corpus: list[str], *overrides: str) -> Recipe:
    """The tiny run with a sequence for each of eight ranks."""
    return tiny.recipe(corpus, "batch_size=8", *overrides)


@pytest.fixture(scope="module")
def straight(corpus: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process that nothing disturbed; not to be changed."""
    out = tmp_path_factory.mktemp("straight") / "run"
    train(wide(corpus), out)
    return out


def note(out: Path) -> dict[str, Any]:
    return json.loads((out / "run.json").read_text())  # type: ignore[no-any-return]


def assert_alike(out: Path, other: Path) -> None:
    """The same losses, balancing losses, norms and validation, up to rounding."""
    mine, theirs = tiny.losses(out), tiny.losses(other)
    assert mine.keys() == theirs.keys()
    for step, values in mine.items():
        assert values == pytest.approx(theirs[step], abs=1e-5, rel=1e-5), f"step {step}"
    for moment in ("before", "after"):
        results = [note(path)["results"][moment] for path in (out, other)]
        for domain, result in results[0].items():
            assert result["loss"] == pytest.approx(results[1][domain]["loss"], abs=1e-5)
            assert result["tokens"] == results[1][domain]["tokens"]


def on_rank(recipe: str, out: str, resume: bool, signal_at: int) -> list[str]:
    """On each rank of a pool; returns what this one said, and its error."""
    display = tiny.AtStep(signal_at, tiny.send(signal.SIGINT))
    try:
        train(recorded_recipe(json.loads(recipe), "the test"), out, resume=resume, display=display)
    except Exception as error:
        return [*display.said, f"{type(error).__name__}: {error}"]
    return display.said


def ranks(size: int, recipe: Recipe, out: Path, *, resume: bool = False, signal_at: int = -1) -> list[list[str]]:
    return harness.pool(size).run(on_rank, recipe.model_dump_json(), str(out), resume, signal_at)


def test_two_ranks_train_as_one_process(straight: Path, corpus: list[str], out: Path) -> None:
    first, second = ranks(2, wide(corpus), out)
    assert any("parameters" in line for line in first)
    assert second == []
    assert_alike(out, straight)
    lines, expected = (
        [(line["step"], line["tokens"]) for line in read_metrics(path / "metrics.jsonl") if line["kind"] == "step"]
        for path in (out, straight)
    )
    assert lines == expected
    told = note(out)
    assert (told["status"], told["environment"]["processes"], told["environment"]["hosts"]) == ("finished", 2, 1)
    assert [path.name for path in out.iterdir() if path.name in ("lock", "model.tmp")] == []
    # The result is read by one process, and is what one process makes.
    mine, theirs = (AutoModelForCausalLM.from_pretrained(path / "model").state_dict() for path in (out, straight))
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-3, atol=1e-4)


def test_its_result_is_used_by_one_process(
    corpus: list[str], out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ranks(2, wide(corpus, "steps=2", "warmup_steps=1"), out)
    assert moesaic(["generate", str(out), "--prompt", "the cat", "--max-new-tokens", "3"]) == 0
    assert moesaic(["inspect", str(out), "--tokens", "64", "--out", str(tmp_path / "report")]) == 0
    assert capsys.readouterr().out


def test_uneven_shares_and_accumulation_change_no_number(corpus: list[str], out: Path, tmp_path: Path) -> None:
    # 5 sequences a part over 3 ranks; in validation, of 6 windows, the last one leaves two ranks without any.
    words = ["batch_size=10", "accumulation=2", "steps=3", "eval_tokens=96", "model.balancing={z_loss=0.01}"]
    recipe = tiny.recipe(corpus, *words)
    train(recipe, tmp_path / "one")
    ranks(3, recipe, out)
    assert_alike(out, tmp_path / "one")


def test_balancing_by_biases_is_of_all_ranks(corpus: list[str], out: Path, tmp_path: Path) -> None:
    words = ["router=sigmoid_topk", "model.balancing={bias_update=0.01}", "accumulation=2", "steps=4"]
    train(wide(corpus, *words), tmp_path / "one")
    ranks(2, wide(corpus, *words), out)
    assert_alike(out, tmp_path / "one")


MATRIX = [
    (1, 2),
    pytest.param(4, 1, marks=pytest.mark.slow),
    pytest.param(1, 4, marks=pytest.mark.slow),
    pytest.param(4, 3, marks=pytest.mark.slow),
    pytest.param(3, 8, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("before", "after"), MATRIX)
def test_a_run_goes_on_with_any_number_of_ranks(
    straight: Path, corpus: list[str], out: Path, before: int, after: int
) -> None:
    recipe = wide(corpus)
    if before == 1:
        with pytest.raises(Interrupted):
            train(recipe, out, display=tiny.AtStep(6, tiny.send(signal.SIGINT)))
    else:
        # What came after the exchange of step 6 is known to all in step 7.
        for told in ranks(before, recipe, out, signal_at=6):
            assert told[-1].startswith("Interrupted: stopped by SIGINT after step 7 of 12, which is saved")
    if after == 1:
        display = tiny.AtStep()
        train(recipe, out, resume=True, display=display)
        said = display.said
    else:
        said, *others = ranks(after, recipe, out, resume=True)
        assert others == [[]] * (after - 1)
    assert f"going on after step {6 if before == 1 else 7}" in said
    assert any(f"processes ({before} then, {after} now)" in line for line in said)
    assert_alike(out, straight)


def sizes(out: Path) -> dict[str, list[int]]:
    """The shapes of the tensors in a run's newest checkpoint."""
    checkpoint, _ = newest_good(out / "checkpoints")
    assert checkpoint is not None
    entries = FileSystemReader(checkpoint.path).read_metadata().state_dict_metadata
    return {name: list(entry.size) for name, entry in entries.items() if hasattr(entry, "size")}


def test_a_checkpoint_has_one_form_whatever_wrote_it(straight: Path, corpus: list[str], out: Path) -> None:
    ranks(2, wide(corpus, "steps=3"), out)
    assert sizes(out) == sizes(straight)
    for name in ("model.{}", "optimizer.state.{}.exp_avg", "optimizer.state.{}.exp_avg_sq"):
        assert sizes(out)[name.format("model.layers.0.mlp.experts.up")] == [4, 2, 24, 32]


@pytest.mark.slow
def test_the_same_ranks_go_on_with_the_same_numbers(corpus: list[str], out: Path, tmp_path: Path) -> None:
    recipe = wide(corpus, "strategy=tokens", "overlap=1", "exchange=direct")
    ranks(2, recipe, tmp_path / "straight")
    ranks(2, recipe, out, signal_at=6)
    ranks(2, recipe, out, resume=True)
    assert tiny.losses(out) == tiny.losses(tmp_path / "straight")


def test_a_checkpoint_is_sealed_once_and_complete(corpus: list[str], out: Path) -> None:
    ranks(2, wide(corpus, "steps=4", "save_every=2"), out)
    assert [(found.step, found.damage) for found in published(out / "checkpoints")] == [(4, None), (2, None)]
    checkpoint, _ = newest_good(out / "checkpoints")
    assert checkpoint is not None
    assert checkpoint.about["processes"] == 2
    assert {path.name for path in checkpoint.path.glob("*.distcp")} == {"__0_0.distcp", "__1_0.distcp"}


def test_a_damaged_checkpoint_is_left_out_by_all(straight: Path, corpus: list[str], out: Path) -> None:
    ranks(2, wide(corpus), out)
    os.truncate(out / "checkpoints/step-00000012/__1_0.distcp", 100)
    said, _ = ranks(2, wide(corpus), out, resume=True)
    assert any(line.startswith("warning: ") and "step-00000012" in line for line in said)
    assert "going on after step 8" in said
    assert_alike(out, straight)


def test_what_is_refused_is_refused_on_all_ranks(corpus: list[str], out: Path, tmp_path: Path) -> None:
    too_few = "ConfigError: train.batch_size / train.accumulation is 1: it must be at least 2, the processes"
    refused = [
        (wide(corpus, "accumulation=8"), too_few),
        (wide(corpus, "compile=true"), "ConfigError: train.compile is true"),
        (wide([str(tmp_path / "none")]), "DataError: data path"),
    ]
    for recipe, expected in refused:
        for said in ranks(2, recipe, out):
            assert said[-1].startswith(expected)
    assert not out.exists()
    out.mkdir()
    (out / "something").touch()
    for said in ranks(2, wide(corpus), out):
        assert said[-1].startswith("UsageError: the output folder")


def test_a_loss_that_is_not_finite_stops_all_ranks(corpus: list[str], out: Path) -> None:
    recipe = wide(corpus, "learning_rate=1e30", "warmup_steps=0", "save_every=1")
    first, second = ranks(2, recipe, out)
    assert first[-1].startswith("NonFiniteError: step 2 is not finite (loss ")
    assert first[-1].endswith(f"the last good checkpoint is {str(out / 'checkpoints/step-00000001')!r}")
    assert second == [first[-1]]
    assert note(out)["status"] == "failed"


# Under torchrun.


def torchrun(
    size: int, out: Path, words: list[str], *, options: tuple[str, ...] = (), command: str = "train"
) -> subprocess.Popen[str]:
    line = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(size), *options]
    return subprocess.Popen(
        [*line, "-m", "moesaic", command, *words, "--out", str(out)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def words_of(recipe: Recipe, folder: Path) -> list[str]:
    """The recipe as a file for the command line."""
    path = folder / "tiny.toml"
    tables = recipe.model_dump(mode="json", exclude={"name"})
    lines = [
        f"[{section}]\n" + "".join(f"{key} = {_toml(value)}\n" for key, value in table.items() if value is not None)
        for section, table in tables.items()
    ]
    path.write_text("\n".join(lines))
    return [str(path)]


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {_toml(each)}" for key, each in value.items()) + "}"
    return json.dumps(value)


def test_torchrun_trains_and_rank_0_alone_talks(straight: Path, corpus: list[str], out: Path, tmp_path: Path) -> None:
    process = torchrun(2, out, words_of(wide(corpus), tmp_path))
    printed, told = process.communicate(timeout=FOREVER)
    assert process.returncode == 0, told
    assert_alike(out, straight)
    assert printed.count("Validation perplexity") == 1
    assert told.count("reading the data") == told.count("step 12/12") == 1
    assert "Warning" not in told


@pytest.mark.slow
def test_torchrun_tells_a_refusal_once_and_quickly(out: Path, tmp_path: Path) -> None:
    process = torchrun(2, out, [str(tmp_path), "--data", "x"], command="finetune")
    _, told = process.communicate(timeout=FOREVER)
    assert process.returncode == 1
    assert told.count("moesaic: error: ") == 1
    assert "exitcode  : 2" in told
    assert not out.exists()


def worker(process: subprocess.Popen[str], rank: int) -> int:
    """The process of a rank, a child of torchrun's."""
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True).stdout
    for child in map(int, children.split()):
        if f"RANK={rank}" in Path(f"/proc/{child}/environ").read_text().split("\0"):
            return child
    raise AssertionError(f"rank {rank} is not there")


def wait_for_step(out: Path, step: int, process: subprocess.Popen[str]) -> None:
    while process.poll() is None:
        if (out / "metrics.jsonl").exists() and max(tiny.losses(out), default=0) >= step:
            return
        time.sleep(0.01)
    raise AssertionError(process.communicate()[1])


linux = pytest.mark.skipif(sys.platform != "linux", reason="finds processes by /proc")


@linux
@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_any_rank_stops_all_after_a_saved_step(
    corpus: list[str], out: Path, tmp_path: Path, rank: int
) -> None:
    recipe = wide(corpus, "steps=60")
    process = torchrun(2, out, words_of(recipe, tmp_path))
    wait_for_step(out, 3, process)
    os.kill(worker(process, rank), signal.SIGTERM)
    _, told = process.communicate(timeout=FOREVER)
    assert told.count("moesaic: error: stopped by SIGTERM after step ") == 1
    assert told.count("exitcode  : 130") == 2
    checkpoint, _ = newest_good(out / "checkpoints")
    assert checkpoint is not None
    assert checkpoint.step == max(tiny.losses(out))


@linux
@pytest.mark.slow
@pytest.mark.parametrize(("rank", "step"), [(0, 2), (1, 6)])
def test_torchrun_goes_on_after_a_rank_was_killed(
    corpus: list[str], out: Path, tmp_path: Path, rank: int, step: int
) -> None:
    # At step 2 there is no checkpoint yet: it begins anew.
    recipe = wide(corpus, "steps=60")
    train(recipe, tmp_path / "straight")
    process = torchrun(2, out, words_of(recipe, tmp_path), options=("--max-restarts", "1"))
    wait_for_step(out, step, process)
    victim = worker(process, rank)
    os.kill(victim, signal.SIGKILL)
    _, told = process.communicate(timeout=FOREVER)
    assert process.returncode == 0, told
    assert told.count("moesaic: error: ") == 1
    assert f"rank {rank} (" in told
    assert f"pid {victim}" in told
    assert told.count("started anew by torchrun: going on with the run in the folder") == 1
    assert_alike(out, tmp_path / "straight")
    first, second = note(out)["lives"]
    assert first["from_step"] == 0
    assert second["from_step"] >= step - 4 - step % 4


def drawn_after(recipe: str, out: str, resume: bool) -> list[float]:
    """What this rank's random stream gives when the run has ended; the first run sets one for each rank, and stops."""

    def stop() -> None:
        torch.manual_seed(1000 + torch.distributed.get_rank())
        tiny.send(signal.SIGINT)()

    try:
        train(recorded_recipe(json.loads(recipe), "the test"), out, resume=resume, display=tiny.AtStep(2, stop))
    except Interrupted:
        assert not resume
    return torch.rand(3).tolist()


def test_each_rank_goes_on_with_its_own_random_stream(corpus: list[str], out: Path, tmp_path: Path) -> None:
    recipe = wide(corpus, "steps=3", "warmup_steps=1").model_dump_json()
    before = harness.pool(2).run(drawn_after, recipe, str(out), False)
    assert before[0] != before[1]
    (checkpoint,) = published(out / "checkpoints")
    assert {"random.cpu", "random_1.cpu"} <= FileSystemReader(
        checkpoint.path
    ).read_metadata().state_dict_metadata.keys()
    shutil.copytree(out, tmp_path / "by three")
    assert harness.pool(2).run(drawn_after, recipe, str(out), True) == before
    by_three = harness.pool(3).run(drawn_after, recipe, str(tmp_path / "by three"), True)
    assert by_three[:2] == before and by_three[2] not in before
