"""Whole runs: what they leave behind, how they end, and how they go on."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tests.train import tiny
from transformers import AutoModelForCausalLM, AutoTokenizer

from moesaic import hardware
from moesaic.errors import CheckpointError, ConfigError, DataError, Interrupted, MoesaicError, TrainingError, UsageError
from moesaic.train import describe, life, run
from moesaic.train import metrics as metrics_module
from moesaic.train.checkpoint import NoSpaceError, published
from moesaic.train.folder import RunFolder
from moesaic.train.metrics import read_metrics
from moesaic.train.recipe import Recipe
from moesaic.train.recipe_file import override, recorded_recipe
from moesaic.train.run import choose, train

BIAS_UPDATE = ["router=sigmoid_topk", "model.balancing={bias_update=0.01}", "accumulation=2"]


def note(out: Path) -> dict[str, Any]:
    return json.loads((out / "run.json").read_text())  # type: ignore[no-any-return]


def steps(out: Path) -> list[int]:
    return [found.step for found in published(out / "checkpoints")]


@pytest.fixture(scope="module")
def finished(corpus: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed; not to be changed."""
    out = tmp_path_factory.mktemp("finished") / "run"
    train(tiny.recipe(corpus), out)
    return out


def test_a_run_leaves_what_it_promises(corpus: list[str], out: Path) -> None:
    recipe = tiny.recipe(corpus, "eval_every=5", "keep=2", "save_every=3")
    result = train(recipe, out)
    assert sorted(path.name for path in out.iterdir()) == [
        "checkpoints",
        "metrics.jsonl",
        "model",
        "run.json",
        "tensorboard",
    ]
    assert steps(out) == [12, 9]
    assert (result.folder, result.model, result.steps, result.tokens) == (out, out / "model", 12, 12 * 4 * 16)
    assert result.parameters > result.active_parameters > 0
    lines = read_metrics(out / "metrics.jsonl")
    assert [line["step"] for line in lines if line["kind"] == "step"] == list(range(1, 13))
    validations = [(line["step"], line["domain"]) for line in lines if line["kind"] == "validation"]
    assert validations == [(step, domain) for step in (0, 5, 10, 12) for domain in ("sums", "words")]
    for domain in ("sums", "words"):
        assert result.before[domain].perplexity == pytest.approx(300, rel=0.1)  # it knows nothing yet
        assert result.after[domain].perplexity < 0.8 * result.before[domain].perplexity
        assert result.after[domain].loss == [line for line in lines if line.get("domain") == domain][-1]["loss"]


def test_the_model_loads_anywhere_and_ends_where_a_text_ends(finished: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(finished / "model")
    tokenizer = AutoTokenizer.from_pretrained(finished / "model")
    assert model.config.eos_token_id == model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.config.bos_token_id == tokenizer.bos_token_id
    ids = tokenizer("the cat", return_tensors="pt")["input_ids"]
    assert model.generate(ids, max_new_tokens=4, do_sample=False).shape[1] <= ids.shape[1] + 4


def test_the_note_holds_what_is_needed_to_repeat_the_run(finished: Path, corpus: list[str], out: Path) -> None:
    told = note(finished)
    assert told["status"] == "finished"
    assert told["error"] is None
    assert told["started"] <= told["ended"]
    assert recorded_recipe(told["recipe"], "run.json") == tiny.recipe(corpus)
    assert told["environment"].items() >= hardware.versions().items()
    assert {"cpu", "cores", "features", "device", "precision", "threads"} <= set(told["environment"])
    data = tiny.data_of(tiny.recipe(corpus))
    assert told["data"]["fingerprint"] == data.fingerprint
    assert told["data"]["counts"]["train"]["words"]["tokens"] == len(data.train["words"])
    assert told["data"]["skipped"] == []
    assert told["model"]["vocab_size"] == 300
    (life,) = told["lives"]
    assert life["from_step"] == 0
    assert life["command"]
    assert set(told["results"]) == {"before", "after", "step", "tokens", "seconds"}
    # And it does repeat it.
    train(recorded_recipe(told["recipe"], "run.json"), out)
    assert tiny.losses(out) == tiny.losses(finished)
    assert note(out)["results"]["after"] == told["results"]["after"]


def test_tensorboard_reads_what_was_logged(finished: Path) -> None:
    board = EventAccumulator(str(finished / "tensorboard"))
    board.Reload()
    logged = {event.step: event.value for event in board.Scalars("train/loss")}
    expected = {step: loss for step, (loss, _, _) in tiny.losses(finished).items()}
    assert logged == pytest.approx(expected)
    tags = set(board.Tags()["scalars"])
    assert {"train/learning_rate", "train/grad_norm", "train/imbalance", "train/dropped"} <= tags
    assert "train/balancing/load_balancing" in tags
    assert [event.step for event in board.Scalars("validation/perplexity/words")] == [0, 12]


def test_tensorboard_shows_a_resumed_run_once(finished: Path, recipe: Recipe, out: Path) -> None:
    interrupted(recipe, out, step=6)
    shutil.rmtree(out / "checkpoints/step-00000006")
    train(recipe, out, resume=True)  # steps 5 and 6 are done again
    board = EventAccumulator(str(out / "tensorboard"))
    board.Reload()
    assert [event.step for event in board.Scalars("train/loss")] == list(range(1, 13))


def test_files_that_cannot_be_read_are_counted_and_reported(corpus: list[str], tmp_path: Path, out: Path) -> None:
    folder = tmp_path / "mixed"
    shutil.copytree(corpus[0].partition("=")[2], folder)
    (folder / "broken.txt").write_bytes(b"\0\1\2")
    (folder / "latin.txt").write_bytes("café ".encode("latin-1") * 9)
    display = tiny.AtStep()
    train(tiny.recipe([f"words={folder}"], "steps=3"), out, display=display)
    (said,) = [line for line in display.said if "skipped" in line]
    assert said.startswith("skipped 2 that could not be read")
    assert "broken.txt: binary" in said
    assert {Path(skip["path"]).name for skip in note(out)["data"]["skipped"]} == {"broken.txt", "latin.txt"}


# Interruption and resumption.


@pytest.mark.parametrize("words", [[], BIAS_UPDATE], ids=["plain", "bias update"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_and_resuming_changes_nothing(
    corpus: list[str], out: Path, tmp_path: Path, number: signal.Signals, words: list[str]
) -> None:
    recipe = tiny.recipe(corpus, *words, "eval_every=5")
    train(recipe, tmp_path / "straight")
    handler = signal.getsignal(number)
    with pytest.raises(Interrupted) as raised:
        train(recipe, out, display=tiny.AtStep(6, tiny.send(number)))
    assert str(raised.value) == (
        f"stopped by {number.name} after step 6 of 12, which is saved; go on with: moesaic train --resume --out {out}"
    )
    assert signal.getsignal(number) is handler
    assert steps(out)[0] == 6
    assert note(out)["status"] == "interrupted"
    assert not (out / "model").exists()
    result = train(recipe, out, resume=True)
    assert tiny.losses(out) == tiny.losses(tmp_path / "straight")
    assert note(out)["results"]["after"] == note(tmp_path / "straight")["results"]["after"]
    assert (out / "model/model.safetensors").read_bytes() == (
        tmp_path / "straight/model/model.safetensors"
    ).read_bytes()
    assert (result.steps, result.tokens) == (12, 12 * 4 * 16)
    assert [life["from_step"] for life in note(out)["lives"]] == [0, 6]
    assert note(out)["status"] == "finished"


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C as in a terminal: a shell starts what runs in its background with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_a_second_signal_is_obeyed_at_once(recipe: Recipe, out: Path) -> None:
    def twice() -> None:
        tiny.send(signal.SIGINT)()
        tiny.send(signal.SIGINT)()

    with pytest.raises(KeyboardInterrupt):
        train(recipe, out, display=tiny.AtStep(6, twice))
    assert steps(out)[0] == 4  # not saved again
    assert note(out)["status"] == "interrupted"
    train(recipe, out, resume=True)
    assert note(out)["status"] == "finished"


def test_a_signal_before_the_first_step_and_after_the_last(finished: Path, recipe: Recipe, out: Path) -> None:
    class Early(tiny.AtStep):
        def validation(self, step: int, results: object) -> None:
            tiny.send(signal.SIGTERM)()

    with pytest.raises(Interrupted) as raised:
        train(recipe, out, display=Early())
    assert str(raised.value) == (
        "stopped by SIGTERM before the first step: nothing is trained or saved; "
        f"start again with: moesaic train --resume --out {out}"
    )
    assert steps(out) == []
    with pytest.raises(Interrupted, match="after step 12 of 12"):
        train(recipe, out, resume=True, display=tiny.AtStep(12, tiny.send(signal.SIGTERM)))
    assert not (out / "model").exists()
    train(recipe, out, resume=True)
    assert tiny.losses(out) == tiny.losses(finished)
    assert (out / "model").is_dir()


KILLED = """
import os, signal, sys
from pathlib import Path
from tests.train import tiny
from moesaic.train.recipe_file import recorded_recipe
from moesaic.train.run import train
import json
recipe = recorded_recipe(json.loads(sys.argv[1]), "the test")
kill = lambda: os.kill(os.getpid(), signal.SIGKILL)
train(recipe, sys.argv[2], display=tiny.AtStep(int(sys.argv[3]), kill))
"""


@pytest.mark.slow
@pytest.mark.parametrize("words", [[], BIAS_UPDATE], ids=["plain", "bias update"])
@pytest.mark.parametrize("step", [3, 4, 5, 10])
def test_after_a_kill_resuming_changes_nothing(
    corpus: list[str], out: Path, tmp_path: Path, words: list[str], step: int
) -> None:
    # At 3 there is no checkpoint yet, at 4 one is being written, at 10 the kill takes two logged steps with it.
    recipe = tiny.recipe(corpus, *words)
    straight = tmp_path / "straight"
    train(recipe, straight)
    command = [sys.executable, "-c", KILLED, recipe.model_dump_json(), str(out), str(step)]
    killed = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert note(out)["status"] == "running"
    train(recipe, out, resume=True)
    assert tiny.losses(out) == tiny.losses(straight)
    assert note(out)["results"]["after"] == note(straight)["results"]["after"]


def interrupted(recipe: Recipe, out: Path, step: int = 9) -> None:
    with pytest.raises(Interrupted):
        train(recipe, out, display=tiny.AtStep(step, tiny.send(signal.SIGINT)))


def test_a_truncated_checkpoint_falls_back_to_the_one_before(finished: Path, recipe: Recipe, out: Path) -> None:
    interrupted(recipe, out)
    assert steps(out) == [9, 8]
    os.truncate(out / "checkpoints/step-00000009/__0_0.distcp", 100)
    display = tiny.AtStep()
    train(recipe, out, resume=True, display=display)
    assert any(line.startswith("warning: ") and "step-00000009" in line for line in display.said)
    assert "going on after step 8" in display.said
    assert tiny.losses(out) == tiny.losses(finished)


def test_a_truncated_checkpoint_does_not_displace_good_ones(finished: Path, recipe: Recipe, out: Path) -> None:
    train(recipe, out)
    assert steps(out) == [12, 8]
    os.truncate(out / "checkpoints/step-00000012/__0_0.distcp", 100)

    def crash() -> None:
        raise RuntimeError("crash")

    eager = override(recipe, ["keep=1", "save_every=1"])
    with pytest.raises(RuntimeError, match="crash"):
        train(eager, out, resume=True, display=tiny.AtStep(11, crash))
    assert [(found.step, found.damage) for found in published(out / "checkpoints")] == [(10, None)]
    train(eager, out, resume=True)
    assert tiny.losses(out) == tiny.losses(finished)


def test_where_every_checkpoint_is_truncated_it_says_so(recipe: Recipe, out: Path) -> None:
    interrupted(recipe, out)
    for path in (out / "checkpoints").iterdir():
        os.truncate(path / ".metadata", 10)
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* is whole"):
        train(recipe, out, resume=True)


OTHERS = [
    ("d_ff=32", "model.d_ff (24 then, 32 now)"),
    ("learning_rate=0.02", "train.learning_rate (0.01 then, 0.02 now)"),
    ("steps=20", "train.steps (12 then, 20 now)"),
    ("sequence_length=8", "data.sequence_length (16 then, 8 now)"),
    ("threads=1", "train.threads (0 then, 1 now)"),
]


@pytest.mark.parametrize(("word", "expected"), OTHERS)
def test_it_does_not_go_on_with_another_recipe(recipe: Recipe, out: Path, word: str, expected: str) -> None:
    interrupted(recipe, out)
    before = (out / "run.json").read_bytes()
    with pytest.raises(CheckpointError, match="cannot go on with another recipe") as raised:
        train(override(recipe, [word]), out, resume=True)
    assert expected in str(raised.value)
    assert (out / "run.json").read_bytes() == before


def test_it_goes_on_with_other_keys_that_change_no_number(finished: Path, recipe: Recipe, out: Path) -> None:
    interrupted(recipe, out)
    words = ["save_every=2", "eval_every=1", "keep=5", "eval_tokens=16"]
    train(override(recipe, words), out, resume=True)
    assert tiny.losses(out) == tiny.losses(finished)


def test_it_does_not_go_on_with_other_text(corpus: list[str], tmp_path: Path, out: Path) -> None:
    folder = tmp_path / "text"
    shutil.copytree(corpus[0].partition("=")[2], folder)
    recipe = tiny.recipe([f"words={folder}"])
    interrupted(recipe, out)
    (folder / "more.txt").write_text("something else " * 50)
    with pytest.raises(CheckpointError, match="the text or its tokenizer has changed"):
        train(recipe, out, resume=True)


def test_another_machine_is_pointed_out(recipe: Recipe, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(recipe, out)
    original = describe.environment
    monkeypatch.setattr(life, "environment", lambda trainer: {**original(trainer), "cpu": "Another"})
    display = tiny.AtStep()
    train(recipe, out, resume=True, display=display)
    assert any("warning: the numbers will not be those" in line and "Another now" in line for line in display.said)


def test_resuming_a_finished_run_trains_no_further(recipe: Recipe, out: Path) -> None:
    train(recipe, out)
    before = tiny.losses(out)
    result = train(recipe, out, resume=True)
    assert result.steps == 12
    assert tiny.losses(out) == before


# What goes wrong.


def test_a_loss_that_is_not_finite_stops_the_run(recipe: Recipe, out: Path) -> None:
    exploding = override(recipe, ["learning_rate=1e30", "warmup_steps=0", "save_every=1"])
    with pytest.raises(TrainingError) as raised:
        train(exploding, out)
    assert raised.value.exit_code == 1
    assert "step 2 is not finite (loss " in str(raised.value)
    assert "on batch 1 (sequences: " in str(raised.value)
    assert f"the last good checkpoint is {str(out / 'checkpoints/step-00000001')!r}" in str(raised.value)
    assert (note(out)["status"], note(out)["error"]) == ("failed", str(raised.value))
    assert [line["step"] for line in read_metrics(out / "metrics.jsonl") if line["kind"] == "step"] == [1]
    assert not (out / "model").exists()


def test_a_disk_that_fills_up_keeps_the_last_good_checkpoint(
    finished: Path, recipe: Recipe, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moesaic.train import checkpoint

    original = checkpoint.seal

    def full_at_eight(folder: Path, about: dict[str, Any]) -> None:
        if "00000008" in folder.name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(folder, about)

    monkeypatch.setattr(checkpoint, "seal", full_at_eight)
    with pytest.raises(NoSpaceError) as raised:
        train(recipe, out)
    assert "the checkpoint of step 8 could not be written: no space left" in str(raised.value)
    assert f"the last good checkpoint is {str(out / 'checkpoints/step-00000004')!r}" in str(raised.value)
    assert steps(out) == [4]
    assert note(out)["status"] == "failed"
    monkeypatch.undo()
    train(recipe, out, resume=True)
    assert tiny.losses(out) == tiny.losses(finished)


@pytest.mark.parametrize("what", ["step", "flush"])
def test_a_disk_that_is_full_for_the_metrics_is_no_traceback(
    recipe: Recipe, out: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    display = tiny.AtStep(5, lambda: monkeypatch.setattr(metrics_module.MetricsLog, what, full))
    with pytest.raises(NoSpaceError, match=r"the run could not be recorded: no space left .*step-00000004"):
        train(recipe, out, display=display)


def test_a_disk_that_is_too_small_is_refused_at_the_start(
    recipe: Recipe, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 10**5))
    with pytest.raises(NoSpaceError, match=r"no space left .* need \d MiB and 0 MiB are free") as raised:
        train(recipe, out)
    assert raised.value.exit_code == 2
    assert not out.exists()


BAD: list[tuple[list[str], type[MoesaicError], str]] = [
    (["top_k=5"], ConfigError, "model.top_k is 5"),
    (["data.sources=/no/such/place"], DataError, "does not exist"),
    (["data.tokenizer=/no/such/place"], CheckpointError, "no tokenizer"),
    (["data.mixture={poems=1}"], ConfigError, "unknown domain 'poems'"),
    (["device=cuda"], ConfigError, "finds no CUDA GPU"),
]


@pytest.mark.parametrize(("words", "kind", "expected"), BAD, ids=lambda value: str(value)[:30])
def test_bad_input_is_refused_and_nothing_is_written(
    recipe: Recipe,
    out: Path,
    words: list[str],
    kind: type[MoesaicError],
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(kind, match=expected) as raised:
        train(override(recipe, words), out)
    assert raised.value.exit_code == 2
    assert not out.exists()


def test_an_empty_corpus_is_refused(recipe: Recipe, tmp_path: Path, out: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(DataError, match="the corpus is empty"):
        train(override(recipe, [f"data.sources={tmp_path / 'empty.txt'}"]), out)
    assert not out.exists()


def test_too_little_text_to_validate_on_is_refused(recipe: Recipe, tmp_path: Path, out: Path) -> None:
    (tmp_path / "short.txt").write_text("the cat sat on a mat and some dog looked " * 9)
    with pytest.raises(DataError, match="held out for validation is too small: domain 'short' has"):
        train(override(recipe, [f"data.sources={tmp_path / 'short.txt'}", "sequence_length=40"]), out)
    assert not out.exists()


def test_a_failed_start_leaves_the_earlier_run_alone(recipe: Recipe, out: Path) -> None:
    train(recipe, out)
    before = note(out)
    with pytest.raises(DataError):
        train(override(recipe, ["data.sources=/no/such/place"]), out, overwrite=True)
    assert note(out) == before
    with pytest.raises(UsageError, match="holds a run already \\(finished\\)"):
        train(recipe, out)
    train(override(recipe, ["steps=3"]), out, overwrite=True)
    assert max(tiny.losses(out)) == 3


def test_a_folder_in_use_is_refused_before_anything_is_read(recipe: Recipe, out: Path) -> None:
    other = RunFolder(out)
    other.open(resume=False, overwrite=False)
    display = tiny.AtStep()
    with pytest.raises(UsageError, match="in use by another run"):
        train(recipe, out, display=display)
    assert display.said == []
    other.close()


# The words of the command line.


def test_the_folder_is_named_after_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text("[train]\nsteps = 40\n")
    recipe, folder = choose([str(tmp_path / "mine.toml"), "seed=3"])
    assert (recipe.name, recipe.train.steps, recipe.train.seed, folder) == ("mine", 40, 3, Path("runs/mine"))
    assert choose([])[1] == Path("runs/demo")
    assert choose(["name=x"], tmp_path)[1] == tmp_path


def test_resuming_needs_no_recipe(recipe: Recipe, out: Path) -> None:
    interrupted(recipe, out)
    assert choose([], out, resume=True) == (recipe, out)
    assert choose(["keep=7"], out, resume=True) == (override(recipe, ["keep=7"]), out)


def test_a_run_that_names_its_text_by_relative_paths_goes_on_from_anywhere(
    finished: Path, corpus: list[str], out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = Path(corpus[0].partition("=")[2]).parent
    monkeypatch.chdir(text)
    interrupted(tiny.recipe(["words=words", "./sums"]), out)
    (tmp_path / "else/words").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "else")  # has words of its own, which are not meant
    recipe, _ = choose([], out, resume=True)
    assert recipe.data.sources == [f"words={text / 'words'}", str(text / "sums")]
    train(recipe, out, resume=True)
    assert tiny.losses(out) == tiny.losses(finished)


def test_a_recipe_file_means_its_paths_from_where_it_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a/b=c").mkdir(parents=True)
    (tmp_path / "a/tokens").mkdir()
    (tmp_path / "a/link.txt").symlink_to(tmp_path / "a/real.txt")
    (tmp_path / "a/real.txt").write_text("text")
    monkeypatch.chdir(tmp_path / "a")
    sources = ["stdlib", "b=c", "x=../a/tokens", "link.txt", "none.txt", "y="]
    recipe, _ = choose([f"data.sources={sources}", "tokenizer=tokens"])
    top = tmp_path / "a"
    expected = ["stdlib", str(top / "b=c"), f"x={top / 'tokens'}", str(top / "link.txt"), "none.txt", "y="]
    assert recipe.data.sources == expected
    assert recipe.data.tokenizer == str(top / "tokens")
    assert choose(["tokenizer=gpt2"])[0].data.tokenizer == "gpt2"


def test_data_takes_the_place_of_the_sources(tmp_path: Path) -> None:
    assert choose(["steps=9"], sources=[str(tmp_path), "stdlib"])[0].data.sources == [str(tmp_path), "stdlib"]
    with pytest.raises(UsageError, match="the data is named twice"):
        choose(["sources=stdlib"], sources=["stdlib"])


def test_a_recipe_may_have_an_equals_sign_in_its_path(tmp_path: Path) -> None:
    (tmp_path / "a=b.toml").write_text("[train]\nsteps = 41\n")
    recipe, folder = choose([str(tmp_path / "a=b.toml")])
    assert (recipe.train.steps, folder) == (41, Path("runs/a_b"))


def test_two_recipes_are_one_too_many() -> None:
    with pytest.raises(UsageError, match=r"at most one recipe file, not 2: a\.toml, b\.toml"):
        choose(["a.toml", "b.toml"])
