"""Alternating runs in one process: in every round each contender once, so that what disturbs one disturbs all."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

# A limit of the machine may take this share of the time that the contenders take.
_LIMITS_SHARE = 0.2


@dataclass(frozen=True)
class Times:
    """Seconds of the runs of one contender, in the order in which they were made."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return float(np.median(self.seconds))

    def quartiles(self) -> tuple[float, float]:
        """The first and the third quartile."""
        low, high = np.percentile(self.seconds, [25, 75])
        return float(low), float(high)

    def ratio_of(self, other: Times) -> tuple[float, float, float]:
        """How many times as long ``other`` took: the ratio of the medians, and the quartiles of round by round."""
        rounds = np.array(other.seconds) / np.array(self.seconds)
        low, high = np.percentile(rounds, [25, 75])
        return other.median / self.median, float(low), float(high)


def timed(work: Callable[[], object]) -> float:
    """Seconds that one run of ``work`` takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def alternate(
    contenders: Mapping[str, Callable[[int], float]],
    limits: Mapping[str, Callable[[], float]],
    seconds: float,
    least_rounds: int = 5,
    most_rounds: int = 200,
) -> tuple[dict[str, Times], dict[str, float]]:
    """Run all contenders in turn, round after round, with measurements of the machine's limits between the rounds.

    The order within a round is drawn anew each time: who comes first finds the caches in another state than who comes
    after a contender that is like it, which at one token is a tenth of the time.

    Args:
        contenders: name to a function that takes the number of the round, runs once, and returns the seconds it took.
        limits: name to a function that measures once and returns a rate; run while all of them together take less than
            a fifth of the time, and at least three times.
        seconds: how long to go on; at least ``least_rounds`` and at most ``most_rounds`` rounds are made.

    Returns:
        The times of each contender, and the median rate of each limit.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    rates: dict[str, list[float]] = {name: [] for name in limits}
    spent_on_limits, start = 0.0, time.perf_counter()
    dice = random.Random(0)
    for number in range(most_rounds):
        for name in dice.sample(list(contenders), len(contenders)):
            times[name].append(contenders[name](number))
        for name, measure in limits.items():
            spent = time.perf_counter() - start
            if len(rates[name]) < 3 or spent_on_limits < _LIMITS_SHARE * spent:
                spent_on_limits += timed(lambda name=name, measure=measure: rates[name].append(measure()))  # type: ignore[misc]
        if number + 1 >= least_rounds and time.perf_counter() - start >= seconds:
            break
    return (
        {name: Times(tuple(found)) for name, found in times.items()},
        {name: float(np.median(found)) for name, found in rates.items()},
    )
