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

LARGEST_PROGRAM = 50_000
"""Products of the exact program: beyond it HiGHS does not get through the root of its tree in a minute."""
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

    def loads(self, bin_of: IntArray) -> FloatArray:
        """``[B]``: the load of each bin."""
        return np.bincount(bin_of, weights=self.load, minlength=len(self.limit))

    def fits(self, bin_of: IntArray) -> bool:
        """Whether no bin has more load than its limit."""
        return bool((self.loads(bin_of) <= self.limit + _TOLERANCE).all())


@dataclass(frozen=True)
class Problem:
    """Put every unit into a bin so that as much weight as possible is between units of one bin.

    Args:
        pairs: for each two neighbouring layers ``[U, U']``: the share of the tokens' transitions from a unit to one of
            the next layer.
    """

    layers: Sequence[Layer]
    pairs: Sequence[FloatArray]

    @property
    def bins(self) -> int:
        return len(self.layers[0].limit)

    @cached_property
    def interchangeable(self) -> bool:
        """Whether bins can swap everything that they hold."""
        return all(
            (layer.capacity == layer.capacity[:, :1]).all() and (layer.limit == layer.limit[0]).all()
            for layer in self.layers
        )

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


def pair_bound(problem: Problem) -> float:
    """No assignment keeps more than this: every two neighbouring layers as well as they could be alone.

    A unit stays with at most as many of the next layer as a bin holds of them. For equal bins without a binding limit
    of load it is what the linear relaxation of the exact program gives, found without solving that.
    """
    optimize = scipy_optimize()
    from scipy import sparse

    bound = 0.0
    for weight, here, there in zip(problem.pairs, problem.layers, problem.layers[1:], strict=False):
        capacity, next_capacity = here.capacity.sum(axis=0), there.capacity.sum(axis=0)
        rows, columns = weight.shape
        if not weight.size:
            continue
        per_row = sparse.kron(sparse.eye_array(rows), np.ones((1, columns)))
        per_column = sparse.kron(np.ones((1, rows)), sparse.eye_array(columns))
        matrix = sparse.vstack([per_row, per_column, np.ones((1, weight.size))], format="csr")
        most = [next_capacity.max()] * rows + [capacity.max()] * columns + [int(capacity @ next_capacity)]
        found = optimize.linprog(-weight.ravel(), A_ub=matrix, b_ub=most, bounds=(0, 1), method="highs")
        assert found.status == 0, found.message  # it has the solution 0, and is bounded by 1
        bound -= float(found.fun)
    return bound


@dataclass(frozen=True)
class Exact:
    """What HiGHS found in its time: the best assignment, or None, and what no assignment exceeds."""

    assignment: Assignment | None
    bound: float
    is_optimal: bool


def solve_exactly(problem: Problem, seconds: float, at_least: float = -math.inf) -> Exact:
    """ExFlow's integer program: x[l, u, b] = 1 where unit u of layer l is in bin b.

    Exploiting Inter-Layer Expert Affinity for Accelerating Mixture-of-Experts Model Inference, section IV. The product
    y[l, u, v, b] of two choices takes the place of its absolute difference per token: tokens of one transition have
    one variable. The rows Σ_v y[l, u, v, b] = x[l, u, b] · (units of the next layer in b), and those of v, are products
    of the capacities' rows with a choice (Adams and Sherali): they make the relaxation tight enough to be of use.

    Args:
        seconds: the most time. at_least: what is known to be reachable; worse ones are not looked for.
    """
    optimize = scipy_optimize()
    began = time.monotonic()
    program = _Program(problem)
    matrix, low, high = program.rows(at_least)
    options = {"time_limit": max(0.0, seconds - (time.monotonic() - began)), "mip_rel_gap": 0.0}
    found = optimize.milp(
        program.objective(),
        integrality=program.integrality(),
        bounds=optimize.Bounds(0, program.highest()),
        constraints=optimize.LinearConstraint(matrix, low, high),
        options=options,
    )
    bound = math.inf if found.mip_dual_bound is None else -float(found.mip_dual_bound)
    assignment = None if found.x is None else program.assignment(found.x)
    return Exact(assignment, bound, found.status == 0)


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

    def integrality(self) -> IntArray:
        # Products of whole choices are whole by themselves.
        return np.concatenate([np.ones(self.num_choices), np.zeros(self.size - self.num_choices)]).astype(np.int64)

    def highest(self) -> FloatArray:
        """1, and 0 where bins that are alike would only be tried in other orders: unit u goes to the bins up to u."""
        most = np.ones(self.size)
        if self.problem.interchangeable:
            most[self.choices[0][np.triu_indices(n=len(self.choices[0]), k=1, m=self.bins)]] = 0
        return most

    def rows(self, at_least: float) -> tuple[Any, FloatArray, FloatArray]:
        """(matrix, least, most) of all constraints."""
        self._terms: list[tuple[IntArray, IntArray, FloatArray]] = []
        self._low: list[FloatArray] = []
        self._high: list[FloatArray] = []
        self._count = 0
        for layer, ids in zip(self.problem.layers, self.choices, strict=True):
            self._add([(ids, 1.0)], 1, 1)
            for kind, capacity in enumerate(layer.capacity):
                self._add([(ids[layer.kind == kind].T, 1.0)], capacity, capacity)
            self._add([(ids.T, layer.load[None, :])], -np.inf, layer.limit)
        for level, ids in enumerate(self.products):
            self._link(self.problem.layers[level + 1], self.choices[level], ids)
            self._link(self.problem.layers[level], self.choices[level + 1], ids.transpose(1, 0, 2))
        if math.isfinite(at_least):
            products = np.concatenate([ids.ravel() for ids in self.products])[None, :]
            weights = -self.objective()[products]
            self._add([(products, weights)], at_least - _TOLERANCE, np.inf)
        return self._matrix(), np.concatenate(self._low), np.concatenate(self._high)

    def _link(self, partners: Layer, choices: IntArray, products: IntArray) -> None:
        """Products ``[U, V, B]`` with choices ``[U, B]``: at most each choice, and by kind as many as a bin holds."""
        flat = products.transpose(0, 2, 1)  # [U, B, V]
        each = np.broadcast_to(choices[:, :, None], flat.shape)
        self._add([(flat.reshape(-1, 1), 1.0), (each.reshape(-1, 1), -1.0)], -np.inf, 0)
        for kind, capacity in enumerate(partners.capacity):
            held = -np.tile(capacity.astype(np.float64), len(choices))[:, None]
            own = flat[:, :, partners.kind == kind].reshape(choices.size, -1)
            self._add([(own, 1.0), (choices.reshape(-1, 1), held)], 0, 0)

    def _add(self, parts: Sequence[tuple[IntArray, Any]], low: Any, high: Any) -> None:
        """Rows Σ factor · variable; each part is ``[rows, terms]`` variables and factors that broadcast to it."""
        rows = len(parts[0][0])
        for ids, factors in parts:
            which = np.repeat(np.arange(self._count, self._count + rows), ids.shape[1])
            self._terms.append((which, ids.ravel(), np.broadcast_to(factors, ids.shape).ravel().astype(np.float64)))
        self._low.append(np.broadcast_to(np.asarray(low, dtype=np.float64), rows))
        self._high.append(np.broadcast_to(np.asarray(high, dtype=np.float64), rows))
        self._count += rows

    def _matrix(self) -> Any:
        from scipy import sparse

        rows, columns, factors = (np.concatenate(part) for part in zip(*self._terms, strict=True))
        return sparse.csr_array((factors, (rows, columns)), shape=(self._count, self.size))

    def assignment(self, solution: FloatArray) -> Assignment:
        return [solution[ids].argmax(axis=1).astype(np.int64) for ids in self.choices]
