"""``moesaic inspect`` from the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from moesaic.cli.main import run
from moesaic.data import load_corpus, split_corpus
from moesaic.inspect import RoutingTrace

TEXT = "def add(x, y):\n    return x + y\n" * 20


@pytest.mark.parametrize("name", ["ours", "mixtral"])
def test_a_report(
    name: str, models: Path, texts: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run(["inspect", str(models / name), *texts, "--tokens", "200"]) == 0
    printed = capsys.readouterr().out
    folder = tmp_path / f"{name}-report"
    assert str(folder / "index.html") in printed
    report = json.loads((folder / "report.json").read_text())
    for finding in report["findings"]:
        assert finding["text"] in printed
    assert report["model"]["name"] == name
    # The models take 64 tokens at most: two passages a domain.
    domains = [{"name": name, "tokens": 100, "passages": 2} for name in ("code", "prose")]
    assert report["data"] == {"tokens": 200, "domains": domains}


def test_json(models: Path, texts: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = ["inspect", str(models / "ours"), *texts, "--tokens", "60", "--out", "out", "--json"]
    assert run(arguments) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["folder"] == str(tmp_path / "out")
    assert told["files"] == sorted(path.name for path in (tmp_path / "out").iterdir())
    assert told["report"] == json.loads((tmp_path / "out" / "report.json").read_text())
    assert run(arguments) == 0  # replaces its own earlier report


def test_a_run_is_inspected_on_what_it_held_out(
    models: Path, texts: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    for i in range(30):
        (texts / f"{i}.txt").write_text(f"# file number {i}\n{TEXT}")
    shutil.copytree(models / "ours", tmp_path / "my-run" / "model")
    recipe = {"name": "r", "data": {"sources": [f"own={texts}"], "validation_fraction": 0.3}}
    (tmp_path / "my-run" / "run.json").write_text(json.dumps({"recipe": recipe, "status": "finished"}))
    assert run(["inspect", "my-run", "--tokens", "100000"]) == 0
    report = json.loads((tmp_path / "my-run" / "report" / "report.json").read_text())
    assert report["model"]["name"] == "my-run"
    assert [domain["name"] for domain in report["data"]["domains"]] == ["own"]
    trace = RoutingTrace.load(tmp_path / "my-run" / "report" / "trace.npz")
    held_out = split_corpus(load_corpus([f"own={texts}"]), 0.3)[1]
    assert {passage.document for passage in trace.passages} == {document.name for document in held_out}


@pytest.mark.parametrize("note", ["{", "[]", '{"status": "finished"}', '{"recipe": {"data": {"sources": 3}}}'])
def test_a_broken_note_of_a_run_is_said_in_one_line(
    note: str, models: Path, texts: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    shutil.copytree(models / "ours", tmp_path / "my-run" / "model")
    (tmp_path / "my-run" / "run.json").write_text(note)
    assert run(["inspect", "my-run"]) == 2
    captured = capsys.readouterr()
    assert "'my-run/run.json' cannot be read: " in captured.err
    assert captured.err.count("\n") == 1
    assert not (tmp_path / "my-run" / "report").exists()


def test_unreadable_files_are_named(
    models: Path, texts: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "good.txt").write_text(TEXT)
    (tmp_path / "texts" / "bad.txt").write_bytes(b"\x00\xff\x00\xfe" * 50)
    assert run(["inspect", str(models / "ours"), "--data", "texts", "--tokens", "40"]) == 0
    assert "bad.txt" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["dense"], "LlamaForCausalLM has no MoE layer"),
        (["nothing"], "no model folder"),
        (["ours", "--tokens", "0"], "tokens is 0: it must be at least 1"),
        (["ours", "--out", "a.py"], "that is a file"),
        (["ours", "--out", "."], "it holds other files"),
        (["ours", "--data", "missing.txt"], "does not exist"),
    ],
)
def test_bad_input(
    arguments: list[str],
    message: str,
    models: Path,
    texts: list[str],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    before = sorted(tmp_path.rglob("*"))
    name, *options = arguments
    assert run(["inspect", str(models / name), *texts, *options]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert sorted(tmp_path.rglob("*")) == before
