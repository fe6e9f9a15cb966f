"""Split and distil in one go: what the second half would refuse is refused before the first one."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.convert.models import dense_folder
from tests.convert.test_calibration import text_folder

from moesaic.convert import DistillSettings, SplitSettings, split_and_distill
from moesaic.convert.writing import partial_path
from moesaic.errors import CheckpointError, ConfigError, DataError, Interrupted, UnsupportedError


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOESAIC_CACHE", str(tmp_path / "cache"))


def make(tmp_path: Path, model: str = "dense", experts: int = 4, **changes: Any) -> Any:
    """From ``dense``, or the model of another name."""
    if not (tmp_path / "text").exists():
        text_folder(tmp_path / "text")
    data = tuple(f"{name}={tmp_path / 'text' / name}" for name in ("prose", "code"))
    if not (tmp_path / "dense").exists():
        dense_folder(tmp_path / "dense")
    say = changes.pop("say", None)
    teaching = {"tokens": 128, "sequence_length": 32, "warm_start": 64, "held_out": 0.3, "precision": "fp32", **changes}
    return split_and_distill(
        tmp_path / model,
        tmp_path / "out",
        SplitSettings(experts=experts, tokens=400, sequence_length=48, held_out=0.3, data=data),
        DistillSettings(data=data, **teaching),
        say=say,
    )


def test_both_and_nothing_else_is_left(tmp_path: Path) -> None:
    made = make(tmp_path)
    assert made.split is not None and made.distilled.steps == 2
    assert made.split.written.folder == tmp_path / "out"
    assert [path.name for path in tmp_path.glob("out*")] == ["out"]


def interrupt(line: str) -> None:
    if line.startswith("step 1:"):
        signal.raise_signal(signal.SIGTERM)


def test_interrupted_and_again_is_as_straight(tmp_path: Path) -> None:
    make(tmp_path)
    (tmp_path / "out").rename(tmp_path / "straight")
    with pytest.raises(Interrupted):
        make(tmp_path, say=interrupt)
    assert sorted(path.name for path in tmp_path.glob("out*")) == ["out.partial", "out.split"]
    made = make(tmp_path)
    assert made.split is None and made.distilled.steps == 2
    straight, again = (load_file(tmp_path / name / "model.safetensors") for name in ("straight", "out"))
    assert all(torch.equal(value, again[name]) for name, value in straight.items())


def test_from_gguf_both_ways(tmp_path: Path) -> None:
    """The teacher and its tokenizer are in the file, interrupted or not."""
    from tests.convert.test_gguf_source import write  # skips where gguf is not installed

    write(tmp_path / "dense.gguf", tokenizer=True)
    make(tmp_path, "dense.gguf")
    (tmp_path / "out").rename(tmp_path / "straight")
    with pytest.raises(Interrupted):
        make(tmp_path, "dense.gguf", say=interrupt)
    made = make(tmp_path, "dense.gguf")
    assert made.split is None and made.distilled.steps == 2
    straight, again = (load_file(tmp_path / name / "model.safetensors") for name in ("straight", "out"))
    assert all(torch.equal(value, again[name]) for name, value in straight.items())
    with pytest.raises(CheckpointError, match="exists already"):
        make(tmp_path, "dense.gguf")


def test_a_split_of_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        make(tmp_path, say=interrupt)
    shutil.copytree(tmp_path / "dense", tmp_path / "tuned")  # with the same embedding
    tensors = load_file(tmp_path / "tuned/model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"] += 0.01
    save_file(tensors, tmp_path / "tuned/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"out.split' holds another split \(content: 'v1:.*: give the same"):
        make(tmp_path, "tuned")
    with pytest.raises(CheckpointError, match=r"holds another split \(experts: 4 there, 6 now\): .* or remove it"):
        make(tmp_path, experts=6)
    note = tmp_path / "out.split/conversion.json"
    kept, more = note.read_text(), tmp_path / "text/code/9.txt"
    for damaged in ("[]", "{", "{}"):
        note.write_text(damaged)
        with pytest.raises(CheckpointError, match=r"holds another split \(method: None there, 'split' now\)"):
            make(tmp_path)
    note.write_text(kept)
    more.write_text("other = text\n" * 50)
    with pytest.raises(CheckpointError, match=r"holds another split \(text: 'v1:"):
        make(tmp_path)
    more.unlink()
    assert make(tmp_path).split is None


def test_passages_longer_than_the_model_reads_are_refused_before_the_split(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"sequence_length is 200: .*reads at most 128 tokens at once"):
        make(tmp_path, sequence_length=200)
    assert not list(tmp_path.glob("out*"))


def test_what_cannot_be_split_is_refused_before_the_text_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moesaic.convert.taught.read_lessons", None)
    with pytest.raises(ConfigError, match=r"experts is 49 .* leaves an expert empty"):
        make(tmp_path, experts=49)
    dense_folder(tmp_path / "wide", mlp_bias=True)
    with pytest.raises(UnsupportedError, match="mlp_bias"):
        make(tmp_path, "wide")
    assert not list(tmp_path.glob("out*"))


def test_text_shorter_than_a_passage_is_refused_before_the_split(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / "text/prose").mkdir(parents=True, exist_ok=True)
        (tmp_path / "text/code").mkdir(parents=True, exist_ok=True)
        (tmp_path / f"text/prose/{number}.txt").write_text("The quick brown fox.\n" * (30 + number))
        (tmp_path / f"text/code/{number}.txt").write_text(f"x{number}\n")
    with pytest.raises(DataError, match=r"domain 'code' has .* needs 101: give more text or a shorter sequence"):
        make(tmp_path, sequence_length=100)
    assert not list(tmp_path.glob("out*"))


def test_another_unfinished_conversion_is_refused_before_the_split(tmp_path: Path) -> None:
    partial_path(tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match=r"out\.partial' is in the way, .*: remove it to begin anew"):
        make(tmp_path)
    assert [path.name for path in tmp_path.glob("out*")] == ["out.partial"]
