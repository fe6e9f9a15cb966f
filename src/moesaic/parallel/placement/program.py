"""Placing experts as an integer program: the problem, its exact solution by HiGHS, and a bound that is quick to get.

L layers · U units of a layer (experts, or groups of experts that stay together) · B bins (ranks, or hosts).
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from moesaic.errors import MissingDependencyError

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]
Assignment = list[IntArray]
"""For each layer ``[U]``: the bin of each unit."""

LARGEST_PROGRAM = 15_000
"""Products of the exact program: with more, HiGHS adds nothing to the search and the quick bound in a minute."""
_TOLERANCE = 1e-9


@dataclass(frozen=True)
class Layer:
    """What one layer brings to the problem.

    Args:
        load: ``[U]``, the units' shares of the slots.
        kind: ``[U]`` int64; capacities are given for each kind, so that groups of units may have bins of their own.
        capacity: ``[kinds, B]`` int64: exactly so many units of a kind go into a bin.
        limit: ``[B]``: the most load that a bin may have.
    """

    load: FloatArray
    kind: IntArray
    capacity: IntArray
    limit: FloatArray

    def __len__(self) -> int:
        return len(self.load)

    @cached_property
    def interchangeable(self) -> bool:
        """Whether bins can swap everything that they hold."""
        return bool((self.capacity == self.capacity[:, :1]).all() and (self.limit == self.limit[0]).all())

    def loads(self, bin_of: IntArray) -> FloatArray:
        """``[B]``: the load of each bin."""
        return np.bincount(bin_of, weights=self.load, minlength=len(self.limit)).astype(np.float64)

    def fits(self, bin_of: IntArray) -> bool:
        """Whether no bin has more load than its limit."""
        return bool((self.loads(bin_of) <= self.limit + _TOLERANCE).all())


@dataclass(frozen=True)
class Problem:
    """Put every unit into a bin so that as much weight as possible is between units of one bin.

    Args:
        pairs: for each two neighbouring layers ``[U, U']``: the share of the tokens' transitions from a unit to one of
            the next layer.
        takes: for each layer ``[N, U]``, whether a token takes a unit; None for a placement by transitions.
    """

    layers: Sequence[Layer]
    pairs: Sequence[FloatArray]
    takes: Sequence[npt.NDArray[np.bool_]] | None = None

    @property
    def bins(self) -> int:
        return len(self.layers[0].limit)

    @property
    def interchangeable(self) -> bool:
        """Whether bins can swap everything that they hold."""
        return all(layer.interchangeable for layer in self.layers)

    def kept(self, assignment: Assignment) -> float:
        """Σ over neighbouring layers of the weight between units of one bin: the objective."""
        return sum(
            float(weight[here[:, None] == there[None, :]].sum())
            for weight, here, there in zip(self.pairs, assignment, assignment[1:], strict=False)
        )

    def products(self) -> int:
        """How many products of two choices the exact program has."""
        return sum(weight.size for weight in self.pairs) * self.bins


def scipy_optimize() -> Any:
    """``scipy.optimize``.

    Raises:
        MissingDependencyError: where scipy is not installed.
    """
    try:
        import scipy.optimize
    except ImportError as error:
        raise MissingDependencyError("placing experts needs scipy: pip install 'moesaic[place]'") from error
    return scipy.optimize


def pair_bound(problem: Problem, deadline: float = math.inf) -> float:
    """No assignment keeps more than this: every two neighbouring layers as well as they could be alone.

    A unit stays with at most as many of the next layer as a bin holds of them. For equal bins without a binding limit
    of load it is what the linear relaxation of the exact program gives, found without solving that.

    Args:
        deadline: by ``time.monotonic``; layers after it are bounded more loosely: by the largest weights of each unit.
    """
    optimize = scipy_optimize()
    from scipy import sparse

    bound = 0.0
    for weight, here, there in zip(problem.pairs, problem.layers, problem.layers[1:], strict=False):
        capacity, next_capacity = here.capacity.sum(axis=0), there.capacity.sum(axis=0)
        rows, columns = weight.shape
        if not weight.size:
            continue
        if time.monotonic() > deadline:
            bound += min(_largest(weight, int(next_capacity.max())), _largest(weight.T, int(capacity.max())))
            continue
        per_row = sparse.kron(sparse.eye_array(rows), np.ones((1, columns)))
        per_column = sparse.kron(np.ones((1, rows)), sparse.eye_array(columns))
        matrix = sparse.vstack([per_row, per_column, np.ones((1, weight.size))], format="csr")
        most = [next_capacity.max()] * rows + [capacity.max()] * columns + [int(capacity @ next_capacity)]
        found = optimize.linprog(-weight.ravel(), A_ub=matrix, b_ub=most, bounds=(0, 1), method="highs")
        assert found.status == 0, found.message  # it has the solution 0, and is bounded by 1
        bound -= float(found.fun)
    return bound


def _largest(weight: FloatArray, count: int) -> float:
    """The sum of the ``count`` largest weights of each row."""
    return float(-np.sort(-weight, axis=1)[:, :count].sum())


@dataclass(frozen=True)
class Exact:
    """What HiGHS found in its time: the best assignment, or None, and what no assignment exceeds."""

    assignment: Assignment | None
    bound: float
    is_optimal: bool


def solve_exactly(problem: Problem, seconds: float) -> Exact:
    """ExFlow's integer program: x[l, u, b] = 1 where unit u of layer l is in bin b.

    Exploiting Inter-Layer Expert Affinity for Accelerating Mixture-of-Experts Model Inference, section IV. The product
    y[l, u, v, b] of two choices takes the place of its absolute difference per token: tokens of one transition have
    one variable. The rows Σ_v y[l, u, v, b] = x[l, u, b] · (units of the next layer in b), and those of v, are products
    of the capacities' rows with a choice (Adams and Sherali): they make the relaxation tight enough to be of use.

    A row that asks for more than the search has found would seem to help; HiGHS then takes longer to get through the
    root of its tree, and proves less.
    """
    began = time.monotonic()
    program = _Program(problem)
    rows, highest = program.rows(), program.highest()
    found = minimize(program.objective(), program.num_choices, highest, rows, seconds - (time.monotonic() - began))
    assignment = None if found.x is None else program.assignment(found.x)
    return Exact(assignment, -lower_bound(found), found.status == 0)


def minimize(cost: FloatArray, num_whole: int, highest: FloatArray, rows: Rows, seconds: float) -> Any:
    """HiGHS on variables from 0 to ``highest``, of which the first ``num_whole`` are whole numbers."""
    optimize = scipy_optimize()
    return optimize.milp(
        cost,
        integrality=np.arange(len(cost)) < num_whole,
        bounds=optimize.Bounds(0, highest),
        constraints=optimize.LinearConstraint(rows.matrix(), *rows.limits()),
        options={"time_limit": max(0.0, seconds), "mip_rel_gap": 0.0},
    )


def lower_bound(found: Any) -> float:
    """What HiGHS proved that nothing is below; minus infinity where it proved nothing."""
    return -math.inf if found.mip_dual_bound is None else float(found.mip_dual_bound)


def in_order(choices: IntArray) -> IntArray:
    """Of choices ``[U, B]`` among alike bins, those that need not be tried: unit u goes to the bins up to u."""
    units, bins = choices.shape
    return choices[np.triu_indices(n=units, k=1, m=bins)]


class Rows:
    """The constraints of a program over ``size`` variables, collected row by row."""

    def __init__(self, size: int) -> None:
        self.size, self.count = size, 0
        self._terms: list[tuple[IntArray, IntArray, FloatArray]] = []
        self._limits: list[tuple[FloatArray, FloatArray]] = []

    def add(self, parts: Sequence[tuple[IntArray, Any]], low: Any, high: Any) -> None:
        """Rows low ≤ Σ factor · variable ≤ high; each part is ``[rows, terms]`` variables, and factors for them."""
        rows = len(parts[0][0])
        for ids, factors in parts:
            which = np.repeat(np.arange(self.count, self.count + rows), ids.shape[1])
            self._terms.append((which, ids.ravel(), np.broadcast_to(factors, ids.shape).ravel().astype(np.float64)))
        low, high = (np.broadcast_to(np.asarray(limit, dtype=np.float64), rows) for limit in (low, high))
        self._limits.append((low, high))
        self.count += rows

    def add_layer(self, layer: Layer, choices: IntArray) -> None:
        """Every unit in one bin, every bin filled as its capacity says, and within its limit of load."""
        self.add([(choices, 1.0)], 1, 1)
        for kind, capacity in enumerate(layer.capacity):
            self.add([(choices[layer.kind == kind].T, 1.0)], capacity, capacity)
        self.add([(choices.T, layer.load[None, :])], -np.inf, layer.limit)

    def matrix(self) -> Any:
        from scipy import sparse

        rows, columns, factors = (np.concatenate(part) for part in zip(*self._terms, strict=True))
        return sparse.csr_array((factors, (rows, columns)), shape=(self.count, self.size))

    def limits(self) -> tuple[FloatArray, FloatArray]:
        low, high = (np.concatenate(part) for part in zip(*self._limits, strict=True))
        return low, high


class _Program:
    """The variables in one vector: the choices of all layers, then the products of all neighbouring layers."""

    def __init__(self, problem: Problem) -> None:
        self.problem, self.bins = problem, problem.bins
        choices = np.cumsum([0, *(len(layer) * self.bins for layer in problem.layers)])
        products = choices[-1] + np.cumsum([0, *(weight.size * self.bins for weight in problem.pairs)])
        self.choices = [np.arange(start, stop).reshape(-1, self.bins) for start, stop in pairwise(choices)]
        self.products = [
            np.arange(start, stop).reshape(*weight.shape, self.bins)
            for weight, start, stop in zip(problem.pairs, products, products[1:], strict=False)
        ]
        self.num_choices, self.size = int(choices[-1]), int(products[-1])

    def objective(self) -> FloatArray:
        cost = np.zeros(self.size)
        for weight, ids in zip(self.problem.pairs, self.products, strict=True):
            cost[ids] = -weight[:, :, None]
        return cost

    def highest(self) -> FloatArray:
        # Products of whole choices are whole by themselves.
        most = np.ones(self.size)
        if self.problem.interchangeable:
            most[in_order(self.choices[0])] = 0
        return most

    def rows(self) -> Rows:
        rows = Rows(self.size)
        for layer, ids in zip(self.problem.layers, self.choices, strict=True):
            rows.add_layer(layer, ids)
        for level, ids in enumerate(self.products):
            self._link(rows, self.problem.layers[level + 1], self.choices[level], ids)
            self._link(rows, self.problem.layers[level], self.choices[level + 1], ids.transpose(1, 0, 2))
        return rows

    def _link(self, rows: Rows, partners: Layer, choices: IntArray, products: IntArray) -> None:
        """Products ``[U, V, B]`` with choices ``[U, B]``: at most each choice, and by kind as many as a bin holds."""
        flat = products.transpose(0, 2, 1)  # [U, B, V]
        each = np.broadcast_to(choices[:, :, None], flat.shape)
        rows.add([(flat.reshape(-1, 1), 1.0), (each.reshape(-1, 1), -1.0)], -np.inf, 0)
        for kind, capacity in enumerate(partners.capacity):
            held = -np.tile(capacity.astype(np.float64), len(choices))[:, None]
            own = flat[:, :, partners.kind == kind].reshape(choices.size, -1)
            rows.add([(own, 1.0), (choices.reshape(-1, 1), held)], 0, 0)

    def assignment(self, solution: FloatArray) -> Assignment:
        return [solution[ids].argmax(axis=1).astype(np.int64) for ids in self.choices]
