from __future__ import annotations

import json

import pytest

from moesaic.cli.main import run
from moesaic.parallel.choice import clusters

ANY_SIZE = ["plan", "--d-model", "256", "--d-ff", "512", "--tokens", "512"]
SMALL = [*ANY_SIZE, "--ranks", "16"]


def test_a_plan_for_people(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it, however narrow the terminal is, but for columns of zeros."""
    monkeypatch.setenv("COLUMNS", "40")
    assert run([*SMALL, "--hot", "0.5"]) == 0
    printed = capsys.readouterr().out
    assert "…" not in printed and " speed-up " in printed and " overhead " in printed and " results " in printed
    assert " static   tokens (overlap 1, direct)\n" in printed
    assert "16 ranks, 8 a host; E32 K2 D256 F512, 512 tokens a rank, training" in printed
    for name in ("static", "tokens", "weights", "hybrid", "auto"):
        assert any(line.split()[:1] == [name] for line in printed.splitlines())
    assert "nothing of this is measured. Inside a host: NVIDIA A100 data sheet" in printed
    assert run([*ANY_SIZE, "--ranks", "1"]) == 0
    assert " results " not in capsys.readouterr().out  # it would be a column of zeros


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
    monkeypatch.setenv("COLUMNS", "40")
    assert run([*ANY_SIZE, "--sweep", "4..17", "--link", "ethernet10"]) == 0
    printed = capsys.readouterr().out
    assert "…" not in printed and "\n 16  " in printed
    assert [line.split()[0] for line in printed.splitlines()[2:5]] == ["4", "8", "16"]
    assert run([*ANY_SIZE, "--sweep", "4..17", "--json"]) == 0
    assert [point["ranks"] for point in json.loads(capsys.readouterr().out)["points"]] == [4, 8, 16]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--link", "hdx"], "unknown link 'hdx': did you mean 'hdr'?"),
        (["--device", "a1000"], "unknown device 'a1000': did you mean 'a100'?"),
        (["--dtype", "int8"], "unknown dtype 'int8'"),
        (["--experts", "1"], "top_k is 2: there are only 1 experts"),
        (["--ranks", "0"], "ranks is 0"),
        (["--ranks", "4097"], "ranks is 4097: a simulation has at most 4096"),
        (["--tokens", "9" * 30], "a simulation has at most"),
        (["--sweep", "4..8"], "--sweep says the ranks: leave --ranks out"),
        (["--seed", "-1"], "seed is -1: it must be at least 0"),
        (["--zipf", "nan"], "zipf is nan: it must be between 0 and 10\n"),
        (["--hot", "1.5"], "hot is 1.5: it must be between 0 and 1\n"),
        (["--link", "200Gbit/s"], "link '200Gbit/s': the latency is missing, as in 200Gbit/s,3us"),
        (["--inside", "200Gbits,3us"], "unknown link '200Gbits,3us'"),
    ],
)
def test_what_cannot_be(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*SMALL, *arguments]) == 2
    told = capsys.readouterr().err
    assert message in told and told.count("\n") == 1


def test_sweeps_and_links(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*ANY_SIZE, "--sweep", "16"]) == 2
    assert "--sweep is '16'" in capsys.readouterr().err
    assert clusters.wire("200GBIT/S, 3us") == clusters.wire("25GB/s,3us") == clusters.Wire(25.0, 3.0, "given")
