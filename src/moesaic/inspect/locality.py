"""Whether tokens that follow each other take the same experts: what a cache of experts could hope for.

Both metrics are those of Not All Models Suit Expert Offloading: On Local Routing Consistency of Mixture-of-Expert
Models; plain numpy. N tokens · E experts · P passages · m tokens of a segment.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moesaic.inspect.trace import FloatArray, IntArray, LayerTrace

SEGMENTS = (4, 16, 64)
"""Tokens of the segments that a report looks at."""
CACHES = (1, 2, 4)
"""Sizes of caches that a report looks at, as multiples of the experts that a token takes."""
FUTURE = 16
"""Tokens that a report's cache knows ahead."""

Edges = Sequence[tuple[int, int]]
"""(start, stop) of each passage in the trace."""


@dataclass(frozen=True)
class SegmentRouting:
    """``performance``: SRP, from 0 to 1. ``size``: how many experts the best segment router opens for one that a token
    takes, in the mean."""

    performance: float
    size: float


def used(layer: LayerTrace) -> npt.NDArray[np.bool_]:
    """``[N, E]``: whether a token takes an expert."""
    used_NE = np.zeros((len(layer.expert_ids), layer.num_experts + 1), dtype=bool)
    np.put_along_axis(used_NE, np.minimum(layer.expert_ids, layer.num_experts), True, axis=1)
    return used_NE[:, :-1]


def segment_histogram(used_NE: npt.NDArray[np.bool_], edges: Edges, m: int) -> IntArray:
    """``[E, m + 1]``: h(e, f), in how many segments expert e is taken by exactly f tokens.

    A segment is m tokens in a row of one passage; each place where one fits counts, so that they overlap.
    """
    num_experts = used_NE.shape[1]
    histogram = np.zeros((num_experts, m + 1), dtype=np.int64)
    before_NE = np.concatenate([np.zeros((1, num_experts), dtype=np.int64), used_NE.cumsum(axis=0)])
    for start, stop in edges:
        if stop - start >= m:
            taken_SE = before_NE[start + m : stop + 1] - before_NE[start : stop + 1 - m]
            cells = taken_SE + np.arange(num_experts) * (m + 1)
            histogram += np.bincount(cells.ravel(), minlength=histogram.size).reshape(histogram.shape)
    return histogram


def segment_routing(histogram: IntArray) -> SegmentRouting:
    """SRP of a group of experts, from the sum of their rows of :func:`segment_histogram` (``[m + 1]``).

    SRP(E, m) = max over a of 2 Σ_{f ≥ a} f h(f) / (m Σ_{f ≥ a} h(f) + Σ f h(f)): the largest F1 score with which a
    router that opens or closes an expert for m tokens at once can stand for the real one (equations 3 to 6; by their
    proof the best one opens all expert-segment pairs above one threshold). 0 without segments, or without experts.
    """
    m = len(histogram) - 1
    tokens = np.arange(m + 1) * histogram
    opened, found = (values[::-1].cumsum()[::-1] for values in (histogram, tokens))
    total = int(tokens.sum())
    if not total:
        return SegmentRouting(0.0, 0.0)
    # A threshold of 0 opens everything that 1 opens, and pairs that nobody takes.
    f1 = 2 * found[1:] / (m * opened[1:] + total)
    best = 1 + int(f1.argmax())
    return SegmentRouting(float(f1[best - 1]), float(m * opened[best] / total))


def expert_routing(histogram: IntArray) -> FloatArray:
    """``[E]``: SRP(e, m) of each expert alone, from ``[E, m + 1]`` (equation 4)."""
    return np.array([segment_routing(row).performance for row in histogram], dtype=np.float64)


def cache_size(used_NE: npt.NDArray[np.bool_], ratio: float) -> int:
    """Experts in a cache of ``ratio`` times those that a token takes in the mean: at least what one token takes, at
    most all."""
    taken_N = used_NE.sum(axis=1)
    return int(min(max(round(ratio * float(taken_N.mean())), int(taken_N.max()), 1), used_NE.shape[1]))


def cache_hits(used_NE: npt.NDArray[np.bool_], edges: Edges, sizes: Sequence[int], future: int = FUTURE) -> IntArray:
    """``[len(sizes)]``: how many of the experts that tokens take (the number of True in ``used_NE``) are in a cache.

    The cache of Segment Cache Best Hit Rate (section 2.3): it begins empty with each passage, loads what a token takes,
    and evicts, of those that the token does not take, the experts that fewest of the next ``future`` tokens take; of
    equals the one that was used longest ago, as in the authors' code. As there, an expert that comes for the first time
    while the cache has room is a hit: it could have been there before. Their code counts the token itself among the
    ``future`` ones, and loads its experts one by one, so that one of them may evict another; here it is as the text
    says. With one expert a token both give the same hits, theirs for ``future + 1``. Two experts last used by the same
    token go by their number.
    """
    used_PLE = _padded(used_NE, edges)
    length, num_experts = used_PLE.shape[1:]
    before_PLE = np.concatenate([np.zeros_like(used_PLE[:, :1], dtype=np.int32), used_PLE.cumsum(axis=1)], axis=1)
    size_R1 = np.asarray(sizes, dtype=np.int64)[:, None]
    cached_RPE = np.zeros((len(sizes), len(used_PLE), num_experts), dtype=bool)
    last_PE = np.full((len(used_PLE), num_experts), -1, dtype=np.int64)
    hits_R = np.zeros(len(sizes), dtype=np.int64)
    for t in range(length):
        needed_PE = used_PLE[:, t]
        found_RP = (cached_RPE & needed_PE).sum(axis=2)
        room_RP = size_R1 - cached_RPE.sum(axis=2)
        hits_R += (found_RP + np.minimum(needed_PE.sum(axis=1) - found_RP, room_RP)).sum(axis=1)
        cached_RPE |= needed_PE
        last_PE[needed_PE] = t
        over_RP = cached_RPE.sum(axis=2) - size_R1
        if (over_RP > 0).any():
            wanted_PE = before_PLE[:, min(t + 1 + future, length)] - before_PLE[:, t + 1]
            worth_PE = wanted_PE * (length + 1) + last_PE + 1
            worth_RPE = np.where(cached_RPE & ~needed_PE, worth_PE, np.iinfo(np.int64).max)
            order_RPE = worth_RPE.argsort(axis=2, kind="stable")
            evicted_RPE = np.zeros_like(cached_RPE)
            np.put_along_axis(evicted_RPE, order_RPE, np.arange(num_experts) < over_RP[:, :, None], axis=2)
            cached_RPE &= ~evicted_RPE
    return hits_R


def _padded(used_NE: npt.NDArray[np.bool_], edges: Edges) -> npt.NDArray[np.bool_]:
    """``[P, L, E]``: passages side by side, filled up with tokens that take nothing."""
    padded = np.zeros((len(edges), max(stop - start for start, stop in edges), used_NE.shape[1]), dtype=bool)
    for p, (start, stop) in enumerate(edges):
        padded[p, : stop - start] = used_NE[start:stop]
    return padded


@dataclass(frozen=True)
class LayerLocality:
    """Of one layer: histograms by segment, and (taken, hits by size of cache)."""

    histograms: Mapping[int, IntArray]
    taken: int
    hits: IntArray

    @classmethod
    def of(cls, layer: LayerTrace, edges: Edges) -> LayerLocality:
        used_NE = used(layer)
        sizes = [cache_size(used_NE, ratio) for ratio in CACHES]
        histograms = {m: segment_histogram(used_NE, edges, m) for m in SEGMENTS}
        return cls(histograms, int(used_NE.sum()), cache_hits(used_NE, edges, sizes))

    def report(self) -> dict[str, Any]:
        """``segments``, ``caches`` as :func:`whole` has them, and ``experts``: SRP of each with segments of 16."""
        return {**whole([self]), "experts": expert_routing(self.histograms[16])}


def whole(layers: Sequence[LayerLocality]) -> dict[str, Any]:
    """Of several layers as one group of experts: ``segments`` {m: performance, size}, ``caches`` {multiple: hit rate}.

    A layer's cache is its own; the hit rate is that of all their experts together.
    """
    segments = {}
    for m in SEGMENTS:
        one = segment_routing(np.sum([layer.histograms[m].sum(axis=0) for layer in layers], axis=0))
        segments[str(m)] = {"performance": one.performance, "size": one.size}
    taken = sum(layer.taken for layer in layers)
    hits_R = np.sum([layer.hits for layer in layers], axis=0)
    return {
        "segments": segments,
        "caches": {str(ratio): float(hits_R[r] / taken) if taken else 0.0 for r, ratio in enumerate(CACHES)},
    }
