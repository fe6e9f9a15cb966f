"""``moesaic bench`` from the command line, at sizes that take no time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moesaic.cli.main import run

TINY = ["bench", "experts", "--shape", "E4K2D16F8", "--seconds", "0.01"]


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No peers, limits that take no time, a cache of its own."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("MOESAIC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("moesaic.bench.vllm._extension", lambda: None)
    monkeypatch.setenv("MOESAIC_LLAMA_PYTHON", str(tmp_path / "no-python"))
    rates = {"read": lambda: 1e9, "matmul": lambda: 1e9}
    monkeypatch.setattr("moesaic.bench.experts.limits", lambda banks, dtype: rates)


def test_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*TINY, "--tokens", "1, 3", "--backends", "loop", "--against", "eager"]) == 0
    captured = capsys.readouterr()
    for text in ("E4K2D16F8, 1 token, bf16", "E4K2D16F8, 3 tokens, bf16", "moesaic/loop", "eager", "error"):
        assert text in captured.out
    assert "grouped_mm" not in captured.out


def test_json_is_one_document_and_a_file_is_the_same(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "results"
    assert run([*TINY, "--tokens", "2", "--dtype", "fp32,bf16", "--out", str(out), "--json"]) == 0
    captured = capsys.readouterr()
    told = json.loads(captured.out)
    assert [row["dtype"] for row in told["rows"]] == ["fp32", "bf16"]
    names = [result["name"] for result in told["rows"][0]["results"]]
    assert {"moesaic/loop", "moesaic/grouped", "moesaic/auto", "grouped_mm", "eager"} <= set(names)
    assert all(result["error"] < 1e-2 for row in told["rows"] for result in row["results"])
    written = json.loads((out / "experts.json").read_text())
    assert written["rows"] == told["rows"]
    assert (out / "roofline.png").stat().st_size > 0
    # absent peers are told, but not on standard output
    assert "vllm does not take part" in captured.err
    assert "llama.cpp does not take part" in captured.err


def test_an_interruption_leaves_what_was_measured(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from moesaic.bench import experts

    measure_row = experts._row

    def interrupt(plan: object, work: object, *others: object) -> object:
        if work.tokens == 2:  # type: ignore[attr-defined]
            raise KeyboardInterrupt
        return measure_row(plan, work, *others)  # type: ignore[arg-type]

    monkeypatch.setattr(experts, "_row", interrupt)
    arguments = ["--tokens", "1,2", "--backends", "loop", "--against", "eager", "--out", str(tmp_path)]
    assert run([*TINY, *arguments]) == 130
    written = json.loads((tmp_path / "experts.json").read_text())
    assert [row["tokens"] for row in written["rows"]] == [1]


def test_routing_and_gradients(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--routing", "balanced,hot", "--backward", "--backends", "grouped", "--against", "eager", "--json"]
    assert run([*TINY, "--tokens", "6", *options]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [(row["routing"], row["backward"]) for row in rows] == [("balanced", True), ("hot", True)]


def test_explain(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from moesaic.experts import Choice, Estimate

    choices = [Choice("native", "measured", "some calls", (Estimate("native", 0.002, 5, "measured"),))]
    monkeypatch.setattr("moesaic.autotune.explain", lambda: choices)
    for arguments in (["explain"], ["--explain"]):
        assert run(["bench", *arguments]) == 0
        printed = capsys.readouterr().out
        for text in ("some calls", "native", "measured", "2 ms", "known: 1"):
            assert text in printed
    assert run(["bench", "explain", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["choices"][0]["backend"] == "native"
    assert told["choices"][0]["estimates"][0]["seconds"] == 0.002


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "D"], "unknown shape 'D'"),
        (["--shape", "E4K8D16F8"], "K at most E"),
        (["--shape", ""], "--shape"),
        (["--tokens", "1,x"], "'x' is not a number of tokens"),
        (["--tokens", "0"], "tokens is 0"),
        (["--tokens", "-1"], "'-1' is not a number of tokens"),
        (["--dtype", "int8"], "unknown dtype 'int8'"),
        (["--routing", "cold"], "unknown routing 'cold'"),
        (["--backends", "lop"], "unknown backend 'lop': did you mean 'loop'?"),
        (["--backends", "loop+int2"], "unknown variant 'int2' of loop"),
        (["--backends", ""], "--backends"),
        (["--against", "vlm"], "unknown contender 'vlm': did you mean 'vllm'?"),
        (["--against", "vllm"], "vllm cannot take part: "),
        (["--against", "grouped_mm,llama.cpp"], "llama.cpp cannot take part: "),
        (["--seconds", "0"], "--seconds is 0.0"),
        (["--seconds", "nan"], "--seconds is nan"),
        (["--wrong"], "--wrong"),
        (["--out", "/dev/null/nope"], "--out /dev/null/nope: cannot be written to"),
        (["--out", "/dev/null"], "that is a file"),
    ],
)
def test_wrong_usage(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*TINY, *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_an_unknown_benchmark(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "expert"]) == 2
    assert "unknown benchmark 'expert': did you mean 'experts'?" in capsys.readouterr().err


def test_a_file_where_the_folder_should_be(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    assert run([*TINY, "--out", str(tmp_path / "taken")]) == 2
    captured = capsys.readouterr()
    assert "taken" in captured.err
    assert captured.err.count("\n") == 1  # before anything is measured
