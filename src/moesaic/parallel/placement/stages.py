"""Solving a placement: by its objective, all ranks at once or hosts first; what was found, and what is proved of it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moesaic.parallel.placement.program import (
    LARGEST_PROGRAM,
    Assignment,
    FloatArray,
    IntArray,
    Layer,
    Problem,
    pair_bound,
    solve_exactly,
)
from moesaic.parallel.placement.rows import place_for_rows
from moesaic.parallel.placement.search import balanced, relabel, search

_EQUAL = 1e-9
_SEARCH_SHARE = 0.3
"""Of the time that there is, the most that is spent on the search before the exact program."""


@dataclass(frozen=True)
class Stage:
    """One solved program.

    Args:
        name: what was placed where.
        value: by ``"transitions"`` the mean share of them that stay, the more the better; by ``"rows"`` the ranks (or
            hosts) that a token needs in a layer, on average, the fewer the better.
        bound: no placement has a better value. is_optimal: whether the two are proved equal.
        exact: whether HiGHS was given the program itself, besides what gives a bound quickly.
    """

    name: str
    objective: str
    value: float
    bound: float
    is_optimal: bool
    exact: bool

    @property
    def gap(self) -> float:
        """What the bound leaves open, in the value's unit."""
        return abs(self.bound - self.value)


def within_limits(load: FloatArray, kind: IntArray, capacity: IntArray, limit: float) -> Layer:
    """A layer with ``limit`` for every bin, or what an even spreading reaches where that is more."""
    free = Layer(load, kind, capacity, np.full(capacity.shape[1], np.inf))
    least = free.loads(balanced(free)).max()
    return Layer(load, kind, capacity, np.full(capacity.shape[1], max(limit, least)))


def solve(problem: Problem, now: Assignment, hosts: int, seconds: float) -> tuple[Assignment, list[Stage]]:
    """An assignment of units to ranks, and the programs that gave it: one, or one for the hosts and one for each."""
    if hosts == 1:
        assignment, stage = _solve("experts on ranks", problem, now, seconds)
        return assignment, [stage]
    per_host = problem.bins // hosts
    coarse = Problem([_on_hosts(layer, hosts) for layer in problem.layers], problem.pairs, problem.takes)
    host_of, stage = _solve("experts on hosts", coarse, [bins // per_host for bins in now], seconds / 2)
    stages = [stage]
    assignment = [bins.copy() for bins in now]
    for host in range(hosts):
        own = [np.flatnonzero(bins == host) for bins in host_of]
        part = _part(problem, own, slice(host * per_host, (host + 1) * per_host))
        start = [balanced(layer) for layer in part.layers]
        within, stage = _solve(f"experts of host {host} on its ranks", part, start, seconds / 2 / hosts)
        stages.append(stage)
        for bins, units, found in zip(assignment, own, within, strict=True):
            bins[units] = host * per_host + found
    return assignment, stages


def _on_hosts(layer: Layer, hosts: int) -> Layer:
    capacity = layer.capacity.reshape(len(layer.capacity), hosts, -1).sum(axis=2)
    return within_limits(layer.load, layer.kind, capacity, float(layer.limit[0]) * len(layer.limit) / hosts)


def _part(problem: Problem, own: Sequence[IntArray], bins: slice) -> Problem:
    """Some units of each layer, and some bins for them."""
    layers = [
        within_limits(layer.load[units], layer.kind[units], layer.capacity[:, bins], float(layer.limit[0]))
        for layer, units in zip(problem.layers, own, strict=True)
    ]
    pairs = [weight[np.ix_(here, there)] for weight, here, there in zip(problem.pairs, own, own[1:], strict=False)]
    takes = problem.takes and [taken[:, units] for taken, units in zip(problem.takes, own, strict=True)]
    return Problem(layers, pairs, takes)


def _solve(name: str, problem: Problem, now: Assignment, seconds: float) -> tuple[Assignment, Stage]:
    return (_by_transitions if problem.takes is None else _by_rows)(name, problem, now, seconds)


def _by_transitions(name: str, problem: Problem, now: Assignment, seconds: float) -> tuple[Assignment, Stage]:
    deadline = time.monotonic() + seconds
    starts = [[balanced(layer) for layer in problem.layers]]
    if all(layer.fits(bins) for layer, bins in zip(problem.layers, now, strict=True)):
        starts.append(now)
    found = search(problem, starts, seconds * _SEARCH_SHARE)
    kept, bound = problem.kept(found), pair_bound(problem, deadline)
    is_optimal, exact = bound - kept < _EQUAL, False
    if not is_optimal and problem.products() <= LARGEST_PROGRAM and (left := deadline - time.monotonic()) > 0:
        exact = True
        result = solve_exactly(problem, left)
        if result.assignment is not None and problem.kept(result.assignment) > kept:
            found, kept = result.assignment, problem.kept(result.assignment)
        bound = min(bound, result.bound)
        is_optimal = result.is_optimal or bound - kept < _EQUAL
    return found, Stage(name, "transitions", kept, max(bound, kept), is_optimal, exact)


def _by_rows(name: str, problem: Problem, now: Assignment, seconds: float) -> tuple[Assignment, Stage]:
    """Layer by layer: none has to do with another but for which rank is called what."""
    assert problem.takes is not None
    deadline = time.monotonic() + seconds
    layers = []
    for level, (layer, takes, bins) in enumerate(zip(problem.layers, problem.takes, now, strict=True)):
        left = (deadline - time.monotonic()) / (len(now) - level)
        layers.append(place_for_rows(layer, takes, bins, left))
    assignment = [layer.bin_of for layer in layers]
    relabel(problem, assignment)
    value, bound = (float(np.mean([getattr(layer, key) for layer in layers])) for key in ("needed", "bound"))
    exact = all(layer.exact or layer.needed - layer.bound < _EQUAL for layer in layers)
    return assignment, Stage(name, "rows", value, bound, value - bound < 1e-6, exact)
