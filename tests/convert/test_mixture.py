"""Shares by excess loss: against the algorithm by hand."""

from __future__ import annotations

import math

import pytest

from moesaic.convert.mixture import ExcessLossMixture
from moesaic.errors import ConfigError


def test_shares_follow_the_excess() -> None:
    mixture = ExcessLossMixture({"code": 1, "prose": 3}, rate=0.5, smoothing=0.2)
    shares = {"code": 0.25, "prose": 0.75}
    known = {"code": 0.0, "prose": 0.0}
    for excess in ({"code": 1.5}, {"prose": -0.3}, {"code": 0.2, "prose": 0.9}):
        mixture.after_step(excess)
        known.update({name: max(0.0, value) for name, value in excess.items()})
        raised = {name: shares[name] * math.exp(0.5 * known[name]) for name in shares}
        raw = {name: value / sum(raised.values()) for name, value in raised.items()}
        shares = {"code": 0.8 * raw["code"] + 0.2 * 0.25, "prose": 0.8 * raw["prose"] + 0.2 * 0.75}
        assert mixture.shares == pytest.approx(shares)
    assert sum(mixture.shares.values()) == pytest.approx(1)


def test_a_huge_excess_leaves_the_others_their_first_part() -> None:
    mixture = ExcessLossMixture({"a": 1, "b": 1}, rate=1.0, smoothing=0.1)
    for _ in range(50):
        mixture.after_step({"a": 5000.0, "b": 0.0})
    assert mixture.shares == pytest.approx({"a": 0.95, "b": 0.05})
    mixture.after_step({"a": 0.0, "b": 1.0})
    assert all(share > 0 for share in mixture.shares.values())


def test_turns_round_soon() -> None:
    """However long one domain was ahead."""
    mixture = ExcessLossMixture({"a": 1, "b": 1})
    for _ in range(1000):
        mixture.after_step({"a": 1.0, "b": 0.0})
    assert mixture.shares["a"] > 0.55
    steps = 0
    while mixture.shares["a"] > mixture.shares["b"]:
        mixture.after_step({"a": 0.0, "b": 1.0})
        steps += 1
    assert steps < 10


def test_without_a_rate_shares_stay() -> None:
    mixture = ExcessLossMixture({"a": 1, "b": 3}, rate=0)
    mixture.after_step({"a": 9.0})
    assert mixture.shares == pytest.approx({"a": 0.25, "b": 0.75})


def test_draws_are_as_many_as_the_shares_say() -> None:
    mixture = ExcessLossMixture({"a": 1, "b": 2, "c": 5})
    drawn = [name for _ in range(100) for name in mixture.draw(8)]
    assert [drawn.count(name) for name in "abc"] == [100, 200, 500]
    assert set(drawn[:8]) == {"a", "b", "c"}


def test_goes_on_where_it_stopped() -> None:
    first = ExcessLossMixture({"a": 1, "b": 2})
    first.draw(5)
    first.after_step({"a": 2.0})
    second = ExcessLossMixture({"a": 1, "b": 2})
    second.load(first.state())
    assert first.draw(20) == second.draw(20)
    for mixture in (first, second):
        mixture.after_step({"b": 1.0})
    assert first.state() == second.state()


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="must be some, all above 0"):
        ExcessLossMixture({})
    with pytest.raises(ConfigError, match="all above 0"):
        ExcessLossMixture({"a": 1, "b": 0})
    with pytest.raises(ConfigError, match="rate is -1"):
        ExcessLossMixture({"a": 1}, rate=-1)
    with pytest.raises(ConfigError, match="smoothing is 2"):
        ExcessLossMixture({"a": 1}, smoothing=2)
