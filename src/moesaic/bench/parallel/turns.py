"""Steps of all ranks together, timed in turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch
from torch import distributed

from moesaic.bench.timing import Times, alternate

Step = Callable[[], object]
_FIRST_ROUNDS = 2
_LEAST_ROUNDS = 3
_MOST_ROUNDS = 15
# What takes this many times as long as the best of the first rounds need not be timed more exactly.
_HOPELESS = 1.3


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
    """As :func:`take_turns`; after two rounds only with those that may still be the fastest, and ``always``.

    Args:
        seconds: about how long the later rounds may take, of which there are between 3 and 15.
    """
    for step in steps.values():
        step()
    first = take_turns(steps, _FIRST_ROUNDS)
    best = min(each.median for name, each in first.items())
    last = {name: step for name, step in steps.items() if name in always or first[name].median <= _HOPELESS * best}
    round_seconds = sum(first[name].median for name in last)
    more = take_turns(last, max(_LEAST_ROUNDS, min(_MOST_ROUNDS, round(seconds / round_seconds))))
    return {name: Times((*each.seconds, *more[name].seconds)) if name in more else each for name, each in first.items()}
