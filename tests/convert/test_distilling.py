"""From a split model and its parent to a better one: the folder, going on, and what is refused before any work."""

from __future__ import annotations

import json
import math
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.convert.models import dense_folder
from tests.convert.test_calibration import text_folder
from torch import Tensor

from moesaic import quantize
from moesaic.convert import DistillSettings, SplitSettings, distill, split
from moesaic.convert import distilling as module
from moesaic.convert.lessons import Lessons
from moesaic.convert.writing import partial_path
from moesaic.data import prepare
from moesaic.errors import CheckpointError, ConfigError, DataError, Interrupted, UnsupportedError
from moesaic.hf.load import load_model


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    return text_folder(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dense_folder(tmp_path_factory.mktemp("dense") / "model", tie_word_embeddings=True)


@pytest.fixture(scope="module")
def student(dense: Path, data: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("split") / "model"
    split(dense, out, SplitSettings(experts=4, tokens=400, sequence_length=48, held_out=0.0, data=data))
    return out


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOESAIC_CACHE", str(tmp_path / "cache"))


def settings(data: tuple[str, ...], **changes: Any) -> DistillSettings:
    options: dict[str, Any] = {
        "tokens": 32 * 2 * 12,
        "sequence_length": 32,
        "warm_start": 256,
        "held_out": 0.3,
        "precision": "fp32",
        "learning_rate": 1e-3,
        "labels": 0.0,
        "data": data,
    }
    return DistillSettings(**{**options, **changes})


def distance(path: Path, parent: Path, data: tuple[str, ...]) -> float:
    """KL(parent ‖ model) of the next token, mean over the text that is learned."""
    text = prepare(data, tokenizer=str(path), validation_fraction=0.3).train
    ids = torch.cat(
        [torch.from_numpy(own[: len(own) // 32 * 32].astype("int64")).view(-1, 32) for own in text.values()]
    )
    with torch.no_grad():
        ours, theirs = (load_model(each, dtype=torch.float32)[0](ids).logits.log_softmax(-1) for each in (path, parent))
    return float((theirs.exp() * (theirs - ours)).sum(-1).mean())


def test_comes_nearer_to_the_parent(student: Path, dense: Path, data: tuple[str, ...], tmp_path: Path) -> None:
    said: list[str] = []
    made = distill(student, dense, tmp_path / "out", settings(data, tokens=64 * 40), say=said.append)
    assert (made.steps, made.tokens) == (40, 40 * 64)
    assert made.seconds > 0 and math.isfinite(made.first) and math.isfinite(made.last)
    assert set(made.shares) == {"code", "prose"} and set(made.refit) == {0, 1}
    assert distance(tmp_path / "out", dense, data) < 0.9 * distance(student, dense, data)
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", student))
    assert {name: value.shape for name, value in ours.items()} == {name: value.shape for name, value in theirs.items()}
    assert torch.equal(ours["model.embed_tokens.weight"], theirs["model.embed_tokens.weight"])
    assert not partial_path(tmp_path / "out").exists()
    assert any("going on" in line or "step 1:" in line for line in said)


def stop_at(step: int) -> Callable[[str], None]:
    def say(line: str) -> None:
        if line.startswith(f"step {step}:"):
            signal.raise_signal(signal.SIGINT)

    return say


def test_interrupted_and_again_is_as_straight(
    student: Path, dense: Path, data: tuple[str, ...], tmp_path: Path
) -> None:
    options = settings(data, loss="taid")
    distill(student, dense, tmp_path / "straight", options)
    with pytest.raises(Interrupted, match="interrupted after step 1, which is saved: the same command goes on"):
        distill(student, dense, tmp_path / "out", options, say=stop_at(1))
    assert not (tmp_path / "out").exists()
    with pytest.raises(CheckpointError, match=r"unfinished conversion with other settings \(loss: 'taid' there"):
        distill(student, dense, tmp_path / "out", settings(data))
    said: list[str] = []
    made = distill(student, dense, tmp_path / "out", options, say=said.append)
    assert made.steps == 12 and "going on after step 1" in said
    straight, again = (load_file(tmp_path / name / "model.safetensors") for name in ("straight", "out"))
    assert all(torch.equal(value, again[name]) for name, value in straight.items())


KILLED = """
import json, os, signal, sys
from moesaic.convert import DistillSettings, distill, distilling
student, dense, out, told = sys.argv[1:]
distilling.SAVE_SECONDS, plain = 0.0, distilling._taken
def taken(lessons, work):
    if lessons.step == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return plain(lessons, work)
distilling._taken = taken
distill(student, dense, out, DistillSettings(**json.loads(told)))
"""


@pytest.mark.slow
def test_killed_and_again_is_as_straight(student: Path, dense: Path, data: tuple[str, ...], tmp_path: Path) -> None:
    options, out = settings(data, loss="taid"), tmp_path / "out"
    distill(student, dense, tmp_path / "straight", options)
    words = [sys.executable, "-c", KILLED, str(student), str(dense), str(out), json.dumps(asdict(options))]
    assert subprocess.run(words, check=False).returncode == -signal.SIGKILL
    said: list[str] = []
    made = distill(student, dense, out, options, say=said.append)
    assert made.steps == 12 and "going on after step 5" in said
    straight, again = (load_file(folder / "model.safetensors") for folder in (tmp_path / "straight", out))
    assert all(torch.equal(value, again[name]) for name, value in straight.items())
    assert not (out / "work").exists()


def test_what_is_saved_on_the_way_is_gone_on_from(
    student: Path, dense: Path, data: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, plain = settings(data, loss="taid"), module._taken
    distill(student, dense, tmp_path / "straight", options)

    def taken(lessons: Lessons, work: Path) -> Any:
        if lessons.step == 5:
            raise KeyboardInterrupt
        return plain(lessons, work)

    with monkeypatch.context() as patch:
        patch.setattr(module, "SAVE_SECONDS", 0.0)
        patch.setattr(module, "_taken", taken)
        with pytest.raises(KeyboardInterrupt):
            distill(student, dense, tmp_path / "out", options)
    said: list[str] = []
    assert distill(student, dense, tmp_path / "out", options, say=said.append).steps == 12
    assert "going on after step 5" in said
    straight, again = (load_file(tmp_path / name / "model.safetensors") for name in ("straight", "out"))
    assert all(torch.equal(value, again[name]) for name, value in straight.items())


def shifted(folder: Path, into: Path, ending: str, by: float = 0.01) -> Path:
    """A copy in which one tensor differs: as if that had been trained on."""
    shutil.copytree(folder, into)
    tensors = load_file(into / "model.safetensors")
    tensors[f"model.layers.1.{ending}"] += by
    save_file(tensors, into / "model.safetensors", metadata={"format": "pt"})
    return into


def test_only_the_same_models_and_text_are_gone_on_with(
    student: Path, dense: Path, data: tuple[str, ...], tmp_path: Path
) -> None:
    options, out = settings(data), tmp_path / "out"
    with pytest.raises(Interrupted):
        distill(student, dense, out, options, say=stop_at(1))
    with pytest.raises(CheckpointError, match=r"unfinished conversion with other settings \(student: 'v1:.* there"):
        distill(shifted(student, tmp_path / "student", "mlp.experts.down"), dense, out, options)
    with pytest.raises(CheckpointError, match=r"other settings \(teacher: 'v1:.*remove .*out.partial'"):
        distill(student, shifted(dense, tmp_path / "teacher", "mlp.up_proj.weight"), out, options)
    other = text_folder(tmp_path / "text")
    (tmp_path / "text/prose/3.txt").write_text("more of it\n" * 20)
    with pytest.raises(CheckpointError, match=r"with other settings \(data"):
        distill(student, dense, out, settings(other))
    note = json.loads((tmp_path / "out.partial/conversion.json").read_text())
    (tmp_path / "out.partial/conversion.json").write_text(json.dumps({**note, "data": list(other)}))
    with pytest.raises(CheckpointError, match=r"with other settings \(text: "):
        distill(student, dense, out, settings(other))
    (tmp_path / "out.partial/conversion.json").write_text(json.dumps(note))
    moved = [Path(shutil.copytree(path, tmp_path / name)) for name, path in (("a", student), ("b", dense))]
    assert distill(*moved, out, options).steps == 12


def test_passages_are_no_longer_than_the_models_read(
    student: Path, dense: Path, data: tuple[str, ...], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"sequence_length is 129: .* reads at most 128 tokens at once"):
        distill(student, dense, tmp_path / "out", settings(data, sequence_length=129))
    assert not list(tmp_path.glob("out*"))
    short = Path(shutil.copytree(dense, tmp_path / "short"))
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 48}))
    with pytest.raises(ConfigError, match=r"sequence_length is 64: .*short' reads at most 48 tokens at once"):
        distill(student, short, tmp_path / "out", settings(data, sequence_length=64))
    made = distill(student, short, tmp_path / "out", settings(data, sequence_length=None, tokens=2 * 48, batch_size=2))
    assert (made.steps, made.tokens) == (1, 96)


def test_damaged_remains_and_teachers_are_told(
    student: Path, dense: Path, data: tuple[str, ...], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with pytest.raises(Interrupted):
        distill(student, dense, out, settings(data), say=stop_at(1))
    (tmp_path / "out.partial/work/state.safetensors").write_bytes(b"half")
    with pytest.raises(CheckpointError, match=r"cannot be gone on from: .*; to begin anew, remove '.*out.partial'"):
        distill(student, dense, out, settings(data))
    bad = shifted(dense, tmp_path / "bad", "mlp.up_proj.weight", math.inf)
    with pytest.raises(CheckpointError, match=r"bad' is damaged: model.layers.1.mlp.up_proj.weight holds values that"):
        distill(student, bad, tmp_path / "other", settings(data))


def test_text_that_cannot_be_learned_leaves_nothing_behind(
    student: Path, dense: Path, data: tuple[str, ...], tmp_path: Path
) -> None:
    (tmp_path / "short.txt").write_text("too short")
    with pytest.raises(DataError, match="one sequence of 32 needs 33: give more text or a shorter sequence"):
        distill(student, dense, tmp_path / "out", settings((*data, f"short={tmp_path / 'short.txt'}")))
    with pytest.raises(DataError, match="does not exist"):
        distill(student, dense, tmp_path / "out", settings((str(tmp_path / "none"),)))
    assert not list(tmp_path.glob("out*"))


def test_a_teacher_in_gguf_teaches_the_same(data: tuple[str, ...], tmp_path: Path) -> None:
    from tests.convert.test_gguf_source import write  # skips where gguf is not installed

    dense = dense_folder(tmp_path / "dense")
    write(tmp_path / "dense.gguf")
    split(dense, tmp_path / "split", SplitSettings(experts=4, tokens=400, held_out=0.0, data=data))
    for teacher in ("dense", "dense.gguf"):
        made = distill(tmp_path / "split", tmp_path / teacher, tmp_path / f"from-{teacher}", settings(data))
        assert made.steps == 12 and set(made.refit) == {0, 1}
    one, other = (load_file(tmp_path / f"from-{name}/model.safetensors") for name in ("dense", "dense.gguf"))
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    write(tmp_path / "stranger.gguf", seed=4)
    with pytest.raises(CheckpointError, match=r"was not made of .*stranger.gguf': their embeddings differ"):
        distill(tmp_path / "split", tmp_path / "stranger.gguf", tmp_path / "out", settings(data))


def test_interrupted_in_the_warm_start(student: Path, dense: Path, data: tuple[str, ...], tmp_path: Path) -> None:
    def say(line: str) -> None:
        if line.startswith("layer 1 of 2"):
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Interrupted, match="of which nothing is saved: the same command begins the warm start anew"):
        distill(student, dense, tmp_path / "out", settings(data), say=say)
    made = distill(student, dense, tmp_path / "out", settings(data))
    assert made.steps == 12


def test_killed_while_it_is_written(
    student: Path, dense: Path, data: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the clock no second training ends like the first one: all shards must be of one."""
    options, out = settings(data, tokens=None, minutes=0.02, loss="taid"), tmp_path / "out"
    learned: dict[str, Tensor] = {}
    plain = module._learn

    def learn(lessons: Lessons, *rest: Any) -> list[float]:
        losses = plain(lessons, *rest)
        learned.update({name: value.clone() for name, value in lessons.student.state_dict().items()})
        return losses

    def killed(line: str) -> None:
        if line.startswith("writing") and "(2 of" in line:
            raise KeyboardInterrupt

    monkeypatch.setattr(module, "_learn", learn)
    with pytest.raises(KeyboardInterrupt):
        distill(student, dense, out, options, say=killed, shard_bytes=20_000)
    expected, said = dict(learned), []
    made = distill(student, dense, out, options, say=said.append, shard_bytes=20_000)
    assert made.written.resumed == 1 and made.written.shards > 2 and made.steps >= 1
    assert "learning is over: writing" in said and not any(line.startswith("step") for line in said)
    found = {name: value for file in out.glob("model-*.safetensors") for name, value in load_file(file).items()}
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


def test_a_warm_start_that_is_too_short_becomes_longer(
    student: Path, dense: Path, data: tuple[str, ...], tmp_path: Path
) -> None:
    said: list[str] = []
    made = distill(student, dense, tmp_path / "out", settings(data, warm_start=8, sequence_length=8), say=said.append)
    assert set(made.refit) == {0, 1}
    assert "the warm start takes 24 tokens instead of 8: its layers need as many" in said


def test_no_warm_start_where_the_text_is_too_short(
    student: Path, dense: Path, data: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "tokens_needed", lambda student: 10**9)
    said: list[str] = []
    made = distill(student, dense, tmp_path / "out", settings(data), say=said.append)
    assert made.steps == 12 and not made.refit
    assert any(line.startswith("no warm start: its layers need 1000000000 tokens, the text has") for line in said)


def test_without_a_warm_start_and_by_the_clock(
    student: Path, dense: Path, data: tuple[str, ...], tmp_path: Path
) -> None:
    made = distill(student, dense, tmp_path / "out", settings(data, tokens=None, minutes=0.01, warm_start=0))
    assert made.steps >= 1 and not made.refit


def test_models_that_do_not_go_together(student: Path, dense: Path, data: tuple[str, ...], tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(CheckpointError, match="is a llama model: the student must be a mixture of ours"):
        distill(dense, dense, out, settings(data))
    with pytest.raises(UnsupportedError, match="is a mixture of experts already"):
        distill(student, student, out, settings(data))
    other = dense_folder(tmp_path / "other", hidden_size=16)
    with pytest.raises(CheckpointError, match="hidden_size is 32 there and 16 in the teacher"):
        distill(student, other, out, settings(data))
    stranger = dense_folder(tmp_path / "stranger", seed=5, tie_word_embeddings=True)
    with pytest.raises(CheckpointError, match=r"was not made of .*: their embeddings differ"):
        distill(student, stranger, out, settings(data))
    quantize(load_model(student)[0], "int8").save_pretrained(tmp_path / "int8")
    with pytest.raises(CheckpointError, match="has quantized weights, which cannot be trained"):
        distill(tmp_path / "int8", dense, out, settings(data))
    out.mkdir()
    with pytest.raises(CheckpointError, match="exists already"):
        distill(student, dense, out, settings(data))
    assert not partial_path(out).exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"minutes": 1.0}, "give exactly one of them"),
        ({"tokens": None}, "give exactly one of them"),
        ({"tokens": 0}, "tokens is 0: it must be a whole number from 1 on"),
        ({"tokens": None, "minutes": -1.0}, "minutes is -1.0: it must be above 0"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0: it must be above 0"),
        ({"labels": 1.5}, "labels is 1.5: it must be from 0 to 1"),
        ({"held_out": 0.0}, "held_out is 0.0: it must be between 0 and 1"),
        ({"train": "fnn"}, "unknown train 'fnn': did you mean 'ffn'"),
        ({"mixture": "exces"}, "unknown mixture 'exces': did you mean 'excess'"),
        ({"precision": "fp8"}, "unknown precision 'fp8'"),
        ({"loss": "reverse"}, "unknown loss 'reverse': did you mean 'reverse_kl'"),
        ({"loss_options": {"alpha": 1}}, "the loss 'kl' does not take these options"),
        ({"warm_start": -1}, "warm_start is -1: it must be a whole number from 0 on"),
    ],
)
def test_settings_out_of_range(data: tuple[str, ...], changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        settings(data, **changes)
    assert said in str(caught.value)
