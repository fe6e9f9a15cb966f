"""Placing one layer's experts so that its tokens need few ranks: what moesaic's own exchange of tokens costs.

There a token's row travels once to each rank that has experts of it, and its result comes back. So experts that are
taken together go to one rank; what other layers do has no part in it.

S sets of units that tokens take together · U units · B bins.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moesaic.parallel.placement.program import (
    FloatArray,
    IntArray,
    Layer,
    Rows,
    in_order,
    lower_bound,
    minimize,
)
from moesaic.parallel.placement.search import PATIENCE, balanced, shuffle, swap_best

LARGEST_SETS = 2_000
"""Sets times bins of the exact program: beyond it the bound of HiGHS stays where it begins, at a bin for each token."""


@dataclass(frozen=True)
class FewBins:
    """``bin_of`` ``[U]``; ``needed``: the bins that a token needs, on average; ``bound``: no placement needs fewer;
    ``exact``: whether HiGHS was given the program."""

    bin_of: IntArray
    needed: float
    bound: float
    exact: bool


def place_for_rows(layer: Layer, takes: npt.NDArray[np.bool_], now: IntArray, seconds: float) -> FewBins:
    """The placement of one layer whose tokens need the fewest bins, by search, and by HiGHS where it is small enough.

    Args:
        takes: ``[N, U]``, whether a token takes a unit. now: ``[U]``, where the units are.
    """
    deadline = time.monotonic() + seconds
    rows, counts = np.unique(takes, axis=0, return_counts=True)
    some = rows.any(axis=1)
    sets, shares = rows[some].astype(np.float64), counts[some] / max(1, len(takes))
    tokens = _Tokens(layer, sets, shares)
    starts = [balanced(layer), *([now.copy()] if layer.fits(now) else [])]
    best = tokens.search(starts, time.monotonic() + seconds / 2)
    needed = tokens.needed(best)
    # A token of several experts needs a bin, and as many as hold its experts where they are all its own.
    largest = max(1, int(layer.capacity.sum(axis=0).max()))
    bound = float(shares @ np.ceil(sets.sum(axis=1) / largest))
    exact = needed - bound > 1e-9 and len(sets) * len(layer.limit) <= LARGEST_SETS
    if exact:
        found = _solve(layer, sets, shares, deadline - time.monotonic())
        bound = max(bound, lower_bound(found))
        if found.x is not None:
            other = found.x[: layer.load.size * len(layer.limit)].reshape(len(layer), -1).argmax(axis=1)
            best = min(best, other, key=tokens.needed)
            needed = tokens.needed(best)
    return FewBins(best, needed, min(bound, needed), exact)


def _solve(layer: Layer, sets: FloatArray, shares: FloatArray, seconds: float) -> Any:
    """HiGHS on: x[u, b] = 1 where unit u is in bin b, z[s, b] = 1 where set s has a unit there; the fewest z."""
    bins = len(layer.limit)
    choices = np.arange(len(layer) * bins).reshape(-1, bins)
    needs = choices.size + np.arange(len(sets) * bins).reshape(-1, bins)
    rows = Rows(choices.size + needs.size)
    rows.add_layer(layer, choices)
    capacity = layer.capacity.sum(axis=0)
    for members, own in zip(sets > 0, needs, strict=True):
        there = choices[members]  # [units, B]
        each = np.broadcast_to(own, there.shape)
        rows.add([(there.reshape(-1, 1), 1.0), (each.reshape(-1, 1), -1.0)], -np.inf, 0)
        # At most as many of them as the bin holds: what makes the relaxation of use.
        rows.add([(there.T, 1.0), (own[:, None], -capacity[:, None])], -np.inf, 0)
    cost = np.concatenate([np.zeros(choices.size), np.repeat(shares, bins)])
    highest = np.ones(rows.size)
    if layer.interchangeable:
        highest[in_order(choices)] = 0
    return minimize(cost, choices.size, highest, rows, seconds)


class _Tokens:
    """What the tokens of one layer take together: ``sets`` ``[S, U]`` of zeros and ones, ``shares`` ``[S]`` of N."""

    def __init__(self, layer: Layer, sets: FloatArray, shares: FloatArray) -> None:
        self.layer, self.sets, self.shares = layer, sets.astype(np.float32), shares
        self.weighted = (self.sets * shares[:, None]).astype(np.float32)
        self.together = (self.weighted.T @ self.sets).astype(np.float64)
        np.fill_diagonal(self.together, 0)
        self.random = np.random.default_rng(0)

    def needed(self, bin_of: IntArray) -> float:
        """Bins that a token needs, on average."""
        return float(self.shares @ (self._on_bins(bin_of) > 0).sum(axis=1))

    def search(self, starts: list[IntArray], deadline: float) -> IntArray:
        """First for the most pairs of units that share sets and a bin, which is quick, then for what counts."""
        found = [self._pair_up(start) for start in starts]
        best = max(found, key=self._paired)
        patience = PATIENCE
        while patience and time.monotonic() < deadline:
            tried = best.copy()
            shuffle(self.layer, tried, int(self.random.integers(1, 2 + len(tried) // 4)), self.random)
            self._pair_up(tried)
            patience = PATIENCE if self._paired(tried) > self._paired(best) + 1e-12 else patience - 1
            best = max(best, tried, key=self._paired)
        return min([self._spread_less(bins, deadline) for bins in (best, *found)], key=self.needed)

    def _on_bins(self, bin_of: IntArray) -> FloatArray:
        """``[S, B]``: how many units of each set are in each bin."""
        return self.sets @ np.eye(len(self.layer.limit))[bin_of]

    def _paired(self, bin_of: IntArray) -> float:
        return float(self.together[bin_of[:, None] == bin_of[None, :]].sum())

    def _pair_up(self, bin_of: IntArray) -> IntArray:
        everyone = np.arange(len(bin_of))
        while True:
            gains = self.together @ np.eye(len(self.layer.limit))[bin_of]  # [U, B]
            own, there = gains[everyone, bin_of], gains[:, bin_of]
            gain = there + there.T - own[:, None] - own[None, :] - 2 * self.together
            if not swap_best(self.layer, bin_of, gain):
                return bin_of

    def _spread_less(self, bin_of: IntArray, deadline: float) -> IntArray:
        """Swaps by what they change of :meth:`needed`."""
        bin_of = bin_of.copy()
        while time.monotonic() < deadline:
            on_bins = self._on_bins(bin_of)
            alone = self.weighted * (on_bins[:, bin_of] == 1)  # [S, U]: nobody else of the set in the unit's bin
            leaves = (alone.T @ self.sets).astype(np.float64)  # [u, v]: sets with both that u is alone in its bin for
            enters = (self.weighted.T @ (on_bins == 0))[:, bin_of].astype(np.float64)  # [u, v]: v's bin is new to them
            less = np.diag(leaves)
            gain = less[:, None] + less[None, :] - enters - enters.T - leaves - leaves.T
            # float32 sums are good to about 1e-7: smaller gains may be none, and would go round in circles.
            gain[(gain < 1e-6) | (bin_of[:, None] == bin_of[None, :])] = 0
            if not swap_best(self.layer, bin_of, gain):
                break
        return bin_of
