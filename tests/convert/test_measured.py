"""A GGUF file is measured as what it holds: as the same model written out as safetensors is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from moesaic.cli import main
from moesaic.convert import UpcycleSettings, gguf_model, unpack, upcycle
from moesaic.errors import CheckpointError, UnsupportedError

pytest.importorskip("gguf")

from tests.convert.test_gguf_source import write

Captured = pytest.CaptureFixture[str]
TEXT = "def add(x, y):\n    return abs(x) + abs(y)\n" * 20


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``dense.gguf``, the same as the folder ``dense``, a mixture ``moe`` of it, and text."""
    folder = tmp_path_factory.mktemp("gguf")
    write(folder / "dense.gguf", tokenizer=True)
    unpack(folder / "dense.gguf", folder / "dense")
    upcycle(folder / "dense.gguf", folder / "moe", UpcycleSettings(num_experts=2, top_k=1, noise=0.3))
    (folder / "a.txt").write_text(TEXT)
    return folder


def told(made: Path, capsys: Captured, *words: str) -> dict[str, Any]:
    assert main.run(["eval", *words, "--data", str(made / "a.txt"), "--json"]) == 0
    report: dict[str, Any] = json.loads(capsys.readouterr().out)
    return report


def test_a_gguf_file_is_a_parent_as_its_folder_is(made: Path, capsys: Captured) -> None:
    file, folder = (told(made, capsys, str(made / "moe"), "--against", str(made / p)) for p in ("dense.gguf", "dense"))
    assert (file.pop("against"), folder.pop("against")) == (str(made / "dense.gguf"), str(made / "dense"))
    ours, theirs = file.pop("agreement")["a"], folder.pop("agreement")["a"]
    assert file == folder
    assert ours.pop("parent") == pytest.approx(theirs.pop("parent"), rel=1e-5)
    assert ours == pytest.approx(theirs, rel=1e-4)
    assert ours["kl"] > 1e-3


def test_a_gguf_file_is_measured_by_itself(made: Path, capsys: Captured) -> None:
    file, folder = (told(made, capsys, str(made / p)) for p in ("dense.gguf", "dense"))
    assert (file.pop("model"), folder.pop("model")) == (str(made / "dense.gguf"), str(made / "dense"))
    assert file.pop("domains")["a"] == pytest.approx(folder.pop("domains")["a"], rel=1e-5)
    assert file == folder


def test_what_cannot_be_measured_is_refused(made: Path, tmp_path: Path, capsys: Captured) -> None:
    with pytest.raises(CheckpointError, match=r"there is no file at .*none.gguf"):
        gguf_model(tmp_path / "none.gguf")
    write(tmp_path / "mute.gguf")
    with pytest.raises(CheckpointError, match=r"the tokenizer in .*mute.gguf' cannot be loaded"):
        gguf_model(tmp_path / "mute.gguf")
    write(tmp_path / "small.gguf", tokenizer=True, vocab_size=257, pad_token_id=0, eos_token_id=0)
    with pytest.raises(CheckpointError, match="does not fit the model: its highest token id is 257"):
        gguf_model(tmp_path / "small.gguf")
    write(tmp_path / "bias.gguf", extra={"blk.1.attn_q.bias": torch.ones(32)}, tokenizer=True)
    with pytest.raises(UnsupportedError, match="would be lost"):
        gguf_model(tmp_path / "bias.gguf")
    write(tmp_path / "wide.gguf", tokenizer=True, vocab_size=264)
    words = ["eval", str(made / "moe"), "--against", str(tmp_path / "wide.gguf")]
    assert main.run(words) == 2
    err = capsys.readouterr().err
    assert "has a vocabulary of 260 and" in err and err.count("\n") == 1
