"""Alternating runs, medians, and what else the machine does."""

from __future__ import annotations

import pytest
import torch

from moesaic.bench import limits
from moesaic.bench.limits import OtherProcesses
from moesaic.bench.timing import Times, alternate
from moesaic.bench.workload import Bank


def test_contenders_take_turns() -> None:
    log: list[tuple[str, int]] = []

    def contender(name: str, seconds: float) -> object:
        def run(number: int) -> float:
            log.append((name, number))
            return seconds * (number + 1)

        return run

    times, _ = alternate({"a": contender("a", 1.0), "b": contender("b", 2.0)}, {}, seconds=0, least_rounds=20)  # type: ignore[dict-item]
    rounds = [log[i : i + 2] for i in range(0, len(log), 2)]
    assert [sorted(each) for each in rounds] == [[("a", number), ("b", number)] for number in range(20)]
    assert {each[0][0] for each in rounds} == {"a", "b"}  # neither is always the first
    assert times["a"].seconds[:3] == (1.0, 2.0, 3.0)
    assert times["b"].seconds[:3] == (2.0, 4.0, 6.0)


def test_no_more_rounds_than_allowed() -> None:
    times, rates = alternate({"a": lambda number: 0.0}, {"read": lambda: 5.0}, seconds=3600, most_rounds=7)
    assert len(times["a"].seconds) == 7
    assert rates == {"read": 5.0}


def test_limits_take_a_small_share_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now, measured = 0.0, 0

    def run(number: int) -> float:
        nonlocal now
        now += 1.0
        return 1.0

    def measure() -> float:
        nonlocal now, measured
        now += 10.0
        measured += 1
        return float(measured)

    monkeypatch.setattr("moesaic.bench.timing.time.perf_counter", lambda: now)
    times, rates = alternate({"a": run}, {"read": measure}, seconds=1e9, most_rounds=400)
    assert len(times["a"].seconds) == 400
    # 400 s of runs: a fifth of 500 s is ten measurements of 10 s.
    assert measured in (10, 11)
    assert rates["read"] == pytest.approx((measured + 1) / 2)


def test_medians_quartiles_and_ratios() -> None:
    ours, theirs = Times((1.0, 2.0, 3.0, 4.0, 100.0)), Times((2.0, 2.0, 9.0, 8.0, 100.0))
    assert ours.median == 3.0
    assert ours.quartiles() == (2.0, 4.0)
    # ratio of the medians; quartiles of 2, 1, 3, 2, 1
    assert ours.ratio_of(theirs) == (8 / 3, 1.0, 2.0)
    assert ours.ratio_of(ours) == (1.0, 1.0, 1.0)


def test_limits_are_measured() -> None:
    banks = [Bank(torch.zeros(2, 8, 64, dtype=torch.bfloat16), torch.zeros(2, 64, 4, dtype=torch.bfloat16))]
    found = limits.limits(banks, torch.bfloat16)
    assert {"read", "matmul"} <= set(found) <= set(limits.LIMITS)
    assert all(measure() > 0 for measure in found.values())


def test_without_the_native_kernels_reading_is_a_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moesaic.bench.limits.library.missing", lambda: "no compiler")
    banks = [Bank(torch.zeros(2, 8, 64, dtype=torch.bfloat16), torch.zeros(2, 64, 4, dtype=torch.bfloat16))]
    found = limits.limits(banks, torch.bfloat16)
    assert set(found) == {"read", "matmul"}
    assert found["read"]() > 0


def test_what_others_use(monkeypatch: pytest.MonkeyPatch) -> None:
    told, own = "cpu  100 0 100 800 0 0 0 0 0 0\ncpu0 1 2 3", 1.0
    monkeypatch.setattr("moesaic.bench.limits.Path.read_text", lambda path: told)
    monkeypatch.setattr("moesaic.bench.limits.os.sysconf", lambda name: 100)
    monkeypatch.setattr("moesaic.bench.limits.time.process_time", lambda: own)
    others = OtherProcesses(ours=0.0)
    assert others.share(0.0) is None  # no time has passed
    # 4 s later, of which 3 s were busy: 1 s by us, 0.5 s by our child
    told, own = "cpu  300 0 200 900 0 0 0 0 0 0\n", 2.0
    assert others.share(0.5) == pytest.approx(1.5 / 4)


def test_where_nobody_tells_what_others_use(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: object) -> str:
        raise FileNotFoundError

    monkeypatch.setattr("moesaic.bench.limits.Path.read_text", refuse)
    assert OtherProcesses(0.0).share(0.0) is None
