"""Steps of all ranks together, timed in turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch
from torch import distributed

from moesaic.bench.timing import Times, alternate

Step = Callable[[], object]
# Rounds, and how many times as long as the best a contender may have taken in them to stay.
_HEATS = ((1, 1.6), (2, 1.3), (3, 1.12))
_LEAST_ROUNDS, _MOST_ROUNDS = 8, 40


def seconds_of(step: Step) -> float:
    """Seconds from when all ranks begin until the last one is done; the same number on every rank."""
    distributed.barrier()
    start = time.perf_counter()
    step()
    taken = torch.tensor([time.perf_counter() - start], dtype=torch.float64)
    distributed.all_reduce(taken, distributed.ReduceOp.MAX)
    return float(taken)


def take_turns(steps: Mapping[str, Step], rounds: int) -> dict[str, Times]:
    """Every step once in every round, in an order that is drawn anew each time, alike on every rank."""
    contenders = {name: lambda number, step=step: seconds_of(step) for name, step in steps.items()}
    return alternate(contenders, {}, 0.0, rounds, rounds)[0]


def race(steps: Mapping[str, Step], seconds: float, always: tuple[str, ...] = ()) -> dict[str, Times]:
    """As :func:`take_turns`; after each of a few heats only those go on that may still be the fastest.

    Args:
        seconds: about how long the last rounds may take, of which there are between 8 and 40.
        always: names that go on whatever they take.

    Returns:
        The times of all, in the last heat that each was in; those of the fastest and of ``always`` are of the same
        rounds.
    """
    for step in steps.values():
        step()
    found, left = {}, dict(steps)
    for rounds, hopeless in _HEATS:
        found.update(take_turns(left, rounds))
        best = min(found[name].median for name in left)
        left = {name: step for name, step in left.items() if name in always or found[name].median <= hopeless * best}
    round_seconds = sum(found[name].median for name in left)
    return found | take_turns(left, max(_LEAST_ROUNDS, min(_MOST_ROUNDS, round(seconds / round_seconds))))
