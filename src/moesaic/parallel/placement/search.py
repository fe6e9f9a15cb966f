"""Placing experts by search: good assignments of problems that are too large to be solved exactly.

One layer with its neighbours given is an assignment problem, which is solved exactly; the layers take turns until none
gains, then some units are thrown about and it starts again from there (iterated local search). The best one is kept.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import numpy as np

from moesaic.parallel.placement.program import (
    Assignment,
    FloatArray,
    IntArray,
    Layer,
    Problem,
    scipy_optimize,
)

STARTS = 8
PATIENCE = 60
"""Kicks without a gain after which the search ends."""
_GAIN = 1e-12


def balanced(layer: Layer) -> IntArray:
    """``[U]``: the heaviest unit first, each to the bin with the least load that has room for its kind."""
    room = layer.capacity.copy()
    loads = np.zeros(len(layer.limit))
    bin_of = np.zeros(len(layer), dtype=np.int64)
    for unit in np.argsort(-layer.load, kind="stable"):
        open_bins = np.flatnonzero(room[layer.kind[unit]])
        chosen = open_bins[loads[open_bins].argmin()]
        bin_of[unit] = chosen
        room[layer.kind[unit], chosen] -= 1
        loads[chosen] += layer.load[unit]
    return bin_of


def search(problem: Problem, starts: Iterable[Assignment], seconds: float, *, seed: int = 0) -> Assignment:
    """The best assignment found from ``starts`` (all within the limits) and :data:`STARTS` random ones.

    Args:
        seconds: ends the search where :data:`PATIENCE` has not; the first start is always improved to its end.
    """
    return _Search(problem, seconds, seed).run(list(starts))


class _Search:
    def __init__(self, problem: Problem, seconds: float, seed: int) -> None:
        self.problem = problem
        self.random = np.random.default_rng(seed)
        self.deadline = time.monotonic() + seconds
        self.assign: Callable[..., tuple[IntArray, IntArray]] = scipy_optimize().linear_sum_assignment

    def run(self, starts: list[Assignment]) -> Assignment:
        best = self.descend([each.copy() for each in starts[0]])
        for start in starts[1:]:
            best = self.better(best, self.descend([each.copy() for each in start]))
        for _ in range(STARTS):
            if self.is_late():
                return best
            best = self.better(best, self.descend(self.grown(starts[0])))
        patience = PATIENCE
        while patience and not self.is_late():
            tried = self.descend(self.kicked(best))
            patience = PATIENCE if self.problem.kept(tried) > self.problem.kept(best) + _GAIN else patience - 1
            best = self.better(best, tried)
        return best

    def is_late(self) -> bool:
        return time.monotonic() > self.deadline

    def better(self, one: Assignment, other: Assignment) -> Assignment:
        return other if self.problem.kept(other) > self.problem.kept(one) + _GAIN else one

    def grown(self, start: Assignment) -> Assignment:
        """From one layer thrown about, the others one after another, each given only the neighbour that is there."""
        assignment = [each.copy() for each in start]
        middle = int(self.random.integers(len(assignment)))
        shuffle(self.problem.layers[middle], assignment[middle], len(assignment[middle]), self.random)
        for level in range(middle + 1, len(assignment)):
            self.place(assignment, level, self.from_before(assignment, level))
        for level in range(middle - 1, -1, -1):
            self.place(assignment, level, self.from_after(assignment, level))
        return assignment

    def kicked(self, best: Assignment) -> Assignment:
        """A few neighbouring layers thrown about a little."""
        assignment = [each.copy() for each in best]
        width = int(self.random.integers(1, 4))
        first = int(self.random.integers(max(1, len(assignment) - width + 1)))
        for level in range(first, min(first + width, len(assignment))):
            swaps = int(self.random.integers(1, 2 + len(assignment[level]) // 4))
            shuffle(self.problem.layers[level], assignment[level], swaps, self.random)
        return assignment

    def descend(self, assignment: Assignment) -> Assignment:
        """Layer after layer, forth and back, until none gains."""
        levels = len(assignment)
        gained = True
        while gained:
            before = self.problem.kept(assignment)
            for level in [*range(levels), *range(levels - 2, 0, -1)]:
                gains = np.zeros((len(assignment[level]), self.problem.bins))
                if level:
                    gains += self.from_before(assignment, level)
                if level + 1 < levels:
                    gains += self.from_after(assignment, level)
                self.place(assignment, level, gains)
            relabel(self.problem, assignment)
            gained = self.problem.kept(assignment) > before + _GAIN and not self.is_late()
        return assignment

    def from_before(self, assignment: Assignment, level: int) -> FloatArray:
        """``[U, B]``: what each unit would keep in each bin, of the transitions from the layer before."""
        return self.problem.pairs[level - 1].T @ np.eye(self.problem.bins)[assignment[level - 1]]

    def from_after(self, assignment: Assignment, level: int) -> FloatArray:
        """``[U, B]``: the same of the transitions to the layer after."""
        return self.problem.pairs[level] @ np.eye(self.problem.bins)[assignment[level + 1]]

    def place(self, assignment: Assignment, level: int, gains: FloatArray) -> None:
        """Give one layer the bins with the largest sum of ``gains`` ``[U, B]``, or a better one within the limits."""
        layer, bin_of = self.problem.layers[level], assignment[level]
        ideal = bin_of.copy()
        for kind, capacity in enumerate(layer.capacity):
            units = np.flatnonzero(layer.kind == kind)
            seats = np.repeat(np.arange(self.problem.bins), capacity)
            rows, columns = self.assign(gains[units][:, seats], maximize=True)
            ideal[units[rows]] = seats[columns]
        everyone = np.arange(len(layer))
        if gains[everyone, ideal].sum() <= gains[everyone, bin_of].sum() + _GAIN:
            return
        if layer.fits(ideal):
            bin_of[:] = ideal
        else:
            _swap_within_limits(layer, bin_of, gains)


def relabel(problem: Problem, assignment: Assignment) -> None:
    """Where bins are alike, let all layers from one on swap bins, if more stays with the layer before."""
    if not problem.interchangeable:
        return
    assign = scipy_optimize().linear_sum_assignment
    for level in range(1, len(assignment)):
        bins = np.eye(problem.bins)
        together = bins[assignment[level]].T @ problem.pairs[level - 1].T @ bins[assignment[level - 1]]
        now, then = assign(together, maximize=True)  # [bin now, bin then]
        if together[now, then].sum() > np.trace(together) + _GAIN:
            for later in range(level, len(assignment)):
                assignment[later] = then[assignment[later]]


def swap_best(layer: Layer, bin_of: IntArray, gain: FloatArray) -> bool:
    """Swap the bins of the two units with the largest ``gain`` ``[U, U]`` that the limits allow; whether there is one.

    Args:
        bin_of: changed in place. gain: overwritten.
    """
    if not len(layer):
        return False
    loads = layer.loads(bin_of)
    shift = layer.load[None, :] - layer.load[:, None]  # [u, v]: what u's bin gets more by taking v for u
    fits = loads[bin_of][:, None] + shift <= layer.limit[bin_of][:, None] + 1e-9
    gain[~(fits & fits.T & (layer.kind[:, None] == layer.kind[None, :]))] = 0
    one, other = divmod(int(gain.argmax()), len(layer))
    if gain[one, other] <= _GAIN:
        return False
    bin_of[[one, other]] = bin_of[[other, one]]
    return True


def shuffle(layer: Layer, bin_of: IntArray, swaps: int, random: np.random.Generator) -> None:
    """Swap units of one kind at random, where the limits allow it; ``bin_of`` is changed in place."""
    for _ in range(swaps if len(layer) else 0):
        one, other = random.integers(len(layer), size=2)
        if layer.kind[one] == layer.kind[other]:
            bin_of[[one, other]] = bin_of[[other, one]]
            if not layer.fits(bin_of):
                bin_of[[one, other]] = bin_of[[other, one]]


def _swap_within_limits(layer: Layer, bin_of: IntArray, gains: FloatArray) -> None:
    """Swap the two units that gain most of ``gains`` ``[U, B]`` until no swap within the limits gains."""
    while True:
        own = gains[np.arange(len(layer)), bin_of]
        there = gains[:, bin_of]  # [u, v]: what u would keep in v's bin
        if not swap_best(layer, bin_of, there + there.T - own[:, None] - own[None, :]):
            return
