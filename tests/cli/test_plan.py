from __future__ import annotations

import json

import pytest

from moesaic.cli.main import run

SMALL = ["plan", "--ranks", "16", "--d-model", "256", "--d-ff", "512", "--tokens", "512"]


def test_a_plan_for_people(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "250")
    assert run([*SMALL, "--hot", "0.5"]) == 0
    printed = capsys.readouterr().out
    assert "16 ranks, 8 a host; E32 K2 D256 F512, 512 tokens a rank, training" in printed
    for name in ("static", "tokens", "weights", "hybrid", "auto"):
        assert any(line.split()[:1] == [name] for line in printed.splitlines())
    assert "simulated: links NVIDIA A100 data sheet" in printed


def test_a_plan_for_programs(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*SMALL, "--zipf", "1", "--forward", "--json"]) == 0
    (point,) = json.loads(capsys.readouterr().out)["points"]
    estimates = point["estimates"]
    assert point["ranks"] == 16 and point["experts"] == 32
    assert estimates["static"]["plan"]["overlap"] == 1 and estimates["static"]["backward"] == 0
    fastest = min(estimates[name]["seconds"] for name in ("tokens", "weights", "hybrid"))
    assert estimates["auto"]["seconds"] == fastest
    assert estimates["auto"]["speedup"] == pytest.approx(estimates["static"]["seconds"] / fastest)


def test_a_sweep(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "250")
    assert run([*SMALL, "--sweep", "4..17", "--link", "ethernet10"]) == 0
    printed = capsys.readouterr().out
    assert [line.split()[0] for line in printed.splitlines()[2:5]] == ["4", "8", "16"]
    assert run([*SMALL, "--sweep", "4..17", "--json"]) == 0
    assert [point["ranks"] for point in json.loads(capsys.readouterr().out)["points"]] == [4, 8, 16]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sweep", "16"], "--sweep is '16'"),
        (["--link", "hdx"], "unknown link 'hdx': did you mean 'hdr'?"),
        (["--device", "a1000"], "unknown device 'a1000': did you mean 'a100'?"),
        (["--dtype", "int8"], "unknown dtype 'int8'"),
        (["--experts", "1"], "top_k is 2: there are only 1 experts"),
        (["--ranks", "0"], "ranks is 0"),
    ],
)
def test_what_cannot_be(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*SMALL, *arguments]) == 2
    assert message in capsys.readouterr().err
