"""``moesaic generate``, ``eval`` and ``export`` from the command line."""

from __future__ import annotations

import errno
import io
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, Qwen3MoeForCausalLM

from moesaic.cli.main import run
from moesaic.data import prepare

KINDS = ["ours", "mixtral", "dense"]
Captured = pytest.CaptureFixture[str]


@pytest.mark.parametrize("kind", KINDS)
def test_generate_prints_what_its_json_says(kind: str, models: Path, capsys: Captured) -> None:
    words = ["generate", str(models / kind), "--prompt", "def add", "--max-new-tokens", "9", "--seed", "3"]
    assert run(words) == 0
    streamed = capsys.readouterr().out
    assert run([*words, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert streamed.rstrip("\n") == ("def add" + told["text"]).rstrip("\n")
    assert told["prompt"] == "def add"
    assert told["new_tokens"] == 9 or told["finish_reason"] == "stop"


def test_generate_reads_a_prompt_from_standard_input(
    models: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("def add"))
    assert run(["generate", str(models / "ours"), "--prompt", "-", "--max-new-tokens", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["prompt"] == "def add"


def test_generate_by_default_stays_within_a_short_context(models: Path, capsys: Captured) -> None:
    assert run(["generate", str(models / "ours"), "--prompt", "def add", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["prompt_tokens"] + told["new_tokens"] == 64 or told["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--top-p", "3"], "top_p is 3.0: it must be above 0 and at most 1"),
        (["--temperature", "-1"], "temperature is -1.0"),
        (["--max-new-tokens", "500"], "together they may have at most 64"),
        (["--chat", "--prompt", "x"], "chat template"),
        (["--tempratur", "1"], "No such option"),
        (["--seed", "many"], "Invalid value for '--seed'"),
    ],
)
def test_generate_refuses_bad_settings(words: list[str], message: str, models: Path, capsys: Captured) -> None:
    assert run(["generate", str(models / "ours"), *words]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


@pytest.mark.parametrize("command", [["generate"], ["eval"], ["inspect"], ["export"]])
def test_a_model_that_is_not_there(command: list[str], tmp_path: Path, capsys: Captured) -> None:
    more = [str(tmp_path / "out")] if command == ["export"] else []
    assert run([*command, str(tmp_path / "nowhere"), *more]) == 2
    assert "there is no model folder at" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("command", ["generate", "eval"])
def test_a_checkpoint_of_another_configuration(
    command: str, layers: int, models: Path, texts: list[str], tmp_path: Path
) -> None:
    folder = shutil.copytree(models / "ours", tmp_path / "other")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": layers}))
    # In a process of its own: transformers' logging goes to the standard error that it found when it was imported.
    done = subprocess.run(
        [sys.executable, "-m", "moesaic", command, str(folder), *(texts if command == "eval" else [])],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "do not match their configuration" in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_eval_is_the_mean_cross_entropy_of_the_text(
    kind: str, models: Path, texts: list[str], capsys: Captured
) -> None:
    assert run(["eval", str(models / kind), *texts, "--sequence-length", "20", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["split"] == "all"
    model = AutoModelForCausalLM.from_pretrained(models / kind)
    data = prepare(["code=a.py", "prose=b.txt"], tokenizer=str(models / kind))
    assert set(report["domains"]) == {"code", "prose"}
    for domain, told in report["domains"].items():
        ids = torch.tensor(np.concatenate([data.train[domain], data.validation[domain]]).astype(np.int64))
        windows = (len(ids) - 1) // 20
        total = 0.0
        for start in range(0, windows * 20, 20):
            logits = model(ids[start : start + 20].unsqueeze(0)).logits[0]
            total += float(torch.nn.functional.cross_entropy(logits, ids[start + 1 : start + 21], reduction="sum"))
        assert told["tokens"] == windows * 20
        assert told["loss"] == pytest.approx(total / told["tokens"], rel=1e-5)
        assert told["perplexity"] == pytest.approx(math.exp(told["loss"]))


def test_eval_prints_a_row_a_domain(models: Path, texts: list[str], capsys: Captured) -> None:
    assert run(["eval", str(models / "ours"), *texts]) == 0
    out = capsys.readouterr().out
    assert "perplexity" in out
    assert "code" in out
    assert "prose" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--split", "test"], "split is 'test'"),
        (["--precision", "fp8"], "fp8"),
        (["--data", "nowhere.txt"], "does not exist"),
        (["--data", "a.docx"], "its type is not one of"),
        (["--sequence-length", "100000"], "tokens"),
        (["--sequence-length", "-1"], "sequence_length is -1"),
    ],
)
def test_eval_refuses_bad_settings(
    words: list[str], message: str, models: Path, texts: list[str], capsys: Captured
) -> None:
    Path("a.docx").write_text("x")
    data = [] if "--data" in words else texts
    assert run(["eval", str(models / "ours"), *data, *words]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1


def test_export(models: Path, tmp_path: Path, capsys: Captured) -> None:
    assert run(["export", str(models / "ours"), str(tmp_path / "out"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"format": "qwen3_moe", "folder": str(tmp_path / "out")}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "qwen3_moe"
    assert run(["export", str(models / "ours"), str(tmp_path / "out")]) == 2
    assert "exists already" in capsys.readouterr().err
    assert run(["export", str(models / "mixtral"), str(tmp_path / "other")]) == 2
    assert "only a MoesaicForCausalLM can be exported" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_export_to_a_full_disk(
    error: Exception, models: Path, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill(model: object, folder: Path) -> None:
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        raise error

    monkeypatch.setattr(Qwen3MoeForCausalLM, "save_pretrained", fill)
    assert run(["export", str(models / "ours"), str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert "out' cannot be written: " in err
    assert "No space left on device" in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
