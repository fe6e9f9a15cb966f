"""``moesaic quantize``, and what the other commands make of its folders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from moesaic.cli.main import run

Captured = pytest.CaptureFixture[str]


@pytest.mark.parametrize("kind", ["ours", "mixtral"])
@pytest.mark.parametrize(("to", "options"), [("int8", []), ("int4", ["--group", "32"])])
def test_a_quantized_folder(
    kind: str, to: str, options: list[str], models: Path, texts: list[str], tmp_path: Path, capsys: Captured
) -> None:
    source, out = str(models / kind), tmp_path / "codes"
    assert run(["quantize", source, "--to", to, "--out", str(out), *options, *texts, "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert (made["folder"], made["format"]) == (str(out), to)
    assert sum(tensor.nbytes for tensor in load_file(out / "model.safetensors").values()) <= made["bytes_after"]
    assert json.loads((out / "config.json").read_text())["quantization_config"]["format"] == to

    for folder, told in ((source, made["before"]), (str(out), made["after"])):
        assert run(["eval", folder, *texts, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["domains"] == told["domains"]
    for domain, rise in made["rise"].items():
        before, after = (made[when]["domains"][domain]["perplexity"] for when in ("before", "after"))
        assert before != after
        assert rise == pytest.approx(after / before - 1)
    assert run(["generate", str(out), "--prompt", "def", "--max-new-tokens", "3"]) == 0


def test_what_is_printed(models: Path, texts: list[str], tmp_path: Path, capsys: Captured) -> None:
    words = ["quantize", str(models / "ours"), "--to", "int8", "--out"]
    assert run([*words, str(tmp_path / "one")]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"wrote {tmp_path / 'one'}: ")
    assert "perplexity" not in printed
    assert run([*words, str(tmp_path / "two"), *texts]) == 0
    printed = capsys.readouterr().out
    assert "perplexity, all text" in printed
    assert [line.split()[0] for line in printed.splitlines() if "%" in line] == ["code", "prose"]


@pytest.mark.parametrize(
    ("kind", "words", "message"),
    [
        ("dense", ["--to", "int8"], "LlamaForCausalLM has no experts to quantize"),
        ("ours", ["--to", "int5"], "unknown weight format 'int5': did you mean"),
        ("ours", ["--to", "int4", "--group", "48"], "group is 48: it must be one of 32, 64"),
        ("none", ["--to", "int4"], "there is no model folder at"),
        ("ours", [], "Missing option '--to'"),
    ],
)
def test_what_is_refused(
    kind: str, words: list[str], message: str, models: Path, tmp_path: Path, capsys: Captured
) -> None:
    assert run(["quantize", str(models / kind), *words, "--out", str(tmp_path / "out")]) == 2
    told = capsys.readouterr()
    assert message in told.err
    assert told.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_folder_that_exists_is_left_alone(models: Path, tmp_path: Path, capsys: Captured) -> None:
    assert run(["quantize", str(models / "ours"), "--to", "int8", "--out", str(tmp_path)]) == 2
    assert "exists already: give a folder that does not" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
