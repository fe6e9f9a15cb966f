"""Which experts live together: ExFlow's placement of experts on ranks, from the routing of a text, and what it saves.

Exploiting Inter-Layer Expert Affinity for Accelerating Mixture-of-Experts Model Inference, section IV: an expert of a
layer says much about the token's experts in the next one. Experts that follow each other often go to one rank.

L MoE layers · E experts of a layer · W ranks · N tokens · K slots per token.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np

from moesaic.errors import ConfigError, DataError
from moesaic.parallel.layout import chunk
from moesaic.parallel.placement_program import (
    LARGEST_PROGRAM,
    Assignment,
    FloatArray,
    IntArray,
    Layer,
    Problem,
    pair_bound,
    scipy_optimize,
    solve_exactly,
)
from moesaic.parallel.placement_search import balanced, search

MAX_IMBALANCE = 1.2
"""The load of a layer's busiest rank, over an even share, that a placement may reach by default."""
_EQUAL = 1e-9
_SEARCH_SHARE = 0.3
"""Of the time that there is, the most that is spent on the search before the exact program."""


@dataclass(frozen=True)
class LayerRouting:
    """Which experts N tokens took in one MoE layer.

    Args:
        expert_ids: ``[N, K]`` int64; ids from ``num_experts`` on are slots without an expert.
        groups: equal groups of neighbouring experts that the router chooses among first; they stay groups.
    """

    expert_ids: IntArray
    num_experts: int
    groups: int = 1

    @cached_property
    def shares(self) -> FloatArray:
        """``[N, E]``: a token's slots of each expert over all its slots; each row sums to 1, or is 0."""
        counts = np.zeros((len(self.expert_ids), self.num_experts + 1))
        ids = np.minimum(self.expert_ids, self.num_experts)
        np.add.at(counts, (np.arange(len(ids))[:, None], ids), 1.0)
        counts = counts[:, : self.num_experts]
        shares: FloatArray = counts / np.maximum(1, counts.sum(axis=1, keepdims=True))
        return shares

    @property
    def load(self) -> FloatArray:
        """``[E]``: each expert's share of the slots; 0 where there are none."""
        real = self.expert_ids[self.expert_ids < self.num_experts]
        return np.bincount(real, minlength=self.num_experts) / max(1, real.size)


@dataclass(frozen=True)
class Placement:
    """Each layer's experts on ranks: ``rank_of[l]`` is ``[E]`` int64, and ``groups[l]`` the layer's groups."""

    ranks: int
    rank_of: tuple[IntArray, ...]
    groups: tuple[int, ...]

    @classmethod
    def contiguous(cls, routing: Sequence[LayerRouting], ranks: int) -> Placement:
        """Where the experts are by themselves: as :class:`moesaic.parallel.layout.ExpertLayout` splits them."""
        places = (np.repeat(np.arange(ranks), chunk_sizes(layer.num_experts, ranks)) for layer in routing)
        return cls(ranks, tuple(places), tuple(layer.groups for layer in routing))

    def order(self, layer: int) -> IntArray:
        """``[E]``: the expert that each position is to hold, for the contiguous split to give this placement."""
        rank_of = self.rank_of[layer]
        experts = np.arange(len(rank_of))
        group = experts // (len(rank_of) // self.groups[layer])
        return np.lexsort((experts, group, rank_of))


@dataclass(frozen=True)
class LayerTraffic:
    """What one layer's tokens cost between W ranks on H hosts, of a text's routing.

    Args:
        crossing, host_crossing: of the transitions to the next MoE layer, the share between two ranks, and between two
            hosts (ExFlow's measure); None for the last layer. With K slots a token has K · K transitions of weight
            1 / (K · K).
        rows, host_rows: rows that a token sends to other ranks, and to other hosts: one to each rank that has experts
            of it, the token itself being on any rank with the same probability.
        imbalance: slots of the busiest rank over an even share.
    """

    crossing: float | None
    host_crossing: float | None
    rows: float
    host_rows: float
    imbalance: float


@dataclass(frozen=True)
class Stage:
    """One solved program.

    Args:
        name: what was placed where. kept: the mean share of transitions that stay. bound: no placement keeps more.
        is_optimal: whether the two are proved equal. exact: whether HiGHS was given the program itself, besides the
            bound.
    """

    name: str
    kept: float
    bound: float
    is_optimal: bool
    exact: bool

    @property
    def gap(self) -> float:
        """What the bound leaves open, as a share of all transitions."""
        return max(0.0, self.bound - self.kept)


@dataclass(frozen=True)
class Solution:
    """A placement, and the programs that gave it; ``seconds`` that it took."""

    placement: Placement
    stages: tuple[Stage, ...]
    seconds: float


def place(
    routing: Sequence[LayerRouting],
    ranks: int,
    *,
    hosts: int = 1,
    seconds: float = 60.0,
    max_imbalance: float = MAX_IMBALANCE,
) -> Solution:
    """The placement that keeps the most transitions between consecutive MoE layers on one rank.

    Each rank gets as many experts of a layer as the contiguous split gives it, and no more than ``max_imbalance`` of an
    even share of the layer's slots, or what an even spreading of the heaviest experts reaches where that is more. First
    a search; then, where the program is small enough, HiGHS goes on from there and may prove that nothing is better.
    With several hosts, experts are placed on hosts first, then on the ranks of each (ExFlow's staged program).

    Args:
        routing: of the same N tokens in each layer, from first to last.
        hosts: equally many ranks each, neighbours together. seconds: about the most that it may take.

    Raises:
        ConfigError: for a number out of range, hosts that do not divide the ranks, or more ranks than a layer has
            experts.
        DataError: where there is nothing to go by: fewer than two layers, or no transition between them.
        MissingDependencyError: without scipy.
    """
    check_numbers(ranks, hosts, seconds, max_imbalance)
    check_routing(routing, ranks)
    scipy_optimize()
    began = time.monotonic()
    units = [_Units.of(layer, ranks) for layer in routing]
    everything = _problem(routing, units, ranks, max_imbalance)
    contiguous = Placement.contiguous(routing, ranks).rank_of
    now = [each.bins(rank_of) for each, rank_of in zip(units, contiguous, strict=True)]
    if hosts == 1:
        assignment, stage = _solve("experts on ranks", everything, now, seconds)
        stages = [stage]
    else:
        assignment, stages = _solve_staged(everything, now, hosts, seconds)
    rank_of = tuple(each.rank_of(bins) for each, bins in zip(units, assignment, strict=True))
    placement = Placement(ranks, rank_of, tuple(layer.groups for layer in routing))
    return Solution(placement, tuple(stages), time.monotonic() - began)


def traffic(routing: Sequence[LayerRouting], placement: Placement, hosts: int = 1) -> list[LayerTraffic]:
    """What each layer costs under a placement, counted on the routing of any text."""
    per_host = placement.ranks // hosts
    crossings, host_crossings = (
        _crossings(routing, [rank_of // size for rank_of in placement.rank_of]) for size in (1, per_host)
    )
    measured = []
    for level, (layer, rank_of) in enumerate(zip(routing, placement.rank_of, strict=True)):
        on_rank = layer.shares @ np.eye(placement.ranks)[rank_of] > 0  # [N, W]
        needed = float(on_rank.sum(axis=1).mean())
        busiest = np.bincount(rank_of, weights=layer.load, minlength=placement.ranks).max()
        measured.append(
            LayerTraffic(
                crossing=crossings[level],
                host_crossing=host_crossings[level],
                rows=needed * (1 - 1 / placement.ranks),
                host_rows=needed * (1 - 1 / hosts),
                imbalance=float(busiest) * placement.ranks,
            )
        )
    return measured


def chunk_sizes(num_experts: int, ranks: int) -> IntArray:
    """``[W]``: how many experts each rank owns."""
    return np.array([len(chunk(num_experts, ranks, rank)) for rank in range(ranks)])


def check_numbers(ranks: int, hosts: int, seconds: float, max_imbalance: float) -> None:
    """Refuse settings that no placement can have.

    Raises:
        ConfigError: the message names the setting.
    """
    if ranks < 1:
        raise ConfigError(f"ranks is {ranks}: it must be at least 1")
    if hosts < 1 or ranks % hosts:
        raise ConfigError(f"hosts is {hosts}: it must be at least 1 and divide ranks = {ranks}")
    if not seconds > 0:
        raise ConfigError(f"seconds is {seconds}: it must be above 0")
    if not max_imbalance >= 1:
        raise ConfigError(f"imbalance is {max_imbalance}: it must be at least 1, an even share")


def check_routing(routing: Sequence[LayerRouting], ranks: int) -> None:
    """Refuse layers that there is nothing to place in.

    Raises:
        ConfigError, DataError: as :func:`place`.
    """
    if len(routing) < 2:
        raise DataError(f"the routing is of {len(routing)} MoE layers: a placement by transitions needs at least 2")
    for level, layer in enumerate(routing):
        if ranks > layer.num_experts:
            raise ConfigError(
                f"ranks is {ranks}, but MoE layer {level} has {layer.num_experts} experts: ranks then own slices of "
                "every expert of a block, which have no placement; give at most as many ranks as experts"
            )
    if not any(weight.sum() > 0 for weight in _pairs([layer.shares for layer in routing])):
        raise DataError("no token of the routing has experts in two consecutive MoE layers")


@dataclass(frozen=True)
class _Units:
    """What of a layer is moved as a whole: groups, where a rank owns whole ones; else experts, each within its group.

    ``capacity`` and ``kind`` as :class:`Layer` has them; ``size`` experts in a unit.
    """

    size: int
    kind: IntArray
    capacity: IntArray

    @classmethod
    def of(cls, layer: LayerRouting, ranks: int) -> _Units:
        size = layer.num_experts // layer.groups
        owned = chunk_sizes(layer.num_experts, ranks)
        if layer.groups > 1 and not (owned % size).any():
            return cls(size, np.zeros(layer.groups, dtype=np.int64), owned[None, :] // size)
        group = np.repeat(np.arange(layer.groups), size)
        place = np.repeat(np.arange(ranks), owned)
        capacity = np.zeros((layer.groups, ranks), dtype=np.int64)
        np.add.at(capacity, (group, place), 1)
        return cls(1, group, capacity)

    def summed(self, values: FloatArray) -> FloatArray:
        """``[..., E]`` to ``[..., U]``."""
        summed: FloatArray = values.reshape(*values.shape[:-1], -1, self.size).sum(axis=-1)
        return summed

    def bins(self, rank_of: IntArray) -> IntArray:
        """``[E]`` to ``[U]``."""
        return rank_of[:: self.size].copy()

    def rank_of(self, bins: IntArray) -> IntArray:
        """``[U]`` to ``[E]``."""
        return np.repeat(bins, self.size)


def _problem(routing: Sequence[LayerRouting], units: Sequence[_Units], ranks: int, max_imbalance: float) -> Problem:
    layers = [
        _within_limits(each.summed(layer.load), each.kind, each.capacity, max_imbalance / ranks)
        for layer, each in zip(routing, units, strict=True)
    ]
    pairs = _pairs([each.summed(layer.shares) for layer, each in zip(routing, units, strict=True)])
    return Problem(layers, [weight / max(1, len(pairs)) for weight in pairs])


def _within_limits(load: FloatArray, kind: IntArray, capacity: IntArray, limit: float) -> Layer:
    """A layer with ``limit`` for every bin, or what an even spreading reaches where that is more."""
    free = Layer(load, kind, capacity, np.full(capacity.shape[1], np.inf))
    least = free.loads(balanced(free)).max()
    return Layer(load, kind, capacity, np.full(capacity.shape[1], max(limit, least)))


def _pairs(shares: Sequence[FloatArray]) -> list[FloatArray]:
    """For each two neighbouring layers ``[U, U']``, the transitions' shares: they sum to 1, or are 0 without any."""
    pairs = []
    for here, there in pairwise(shares):
        together = here.T @ there
        pairs.append(together / max(together.sum(), 1e-300))
    return pairs


def _crossings(routing: Sequence[LayerRouting], bin_of: Sequence[IntArray]) -> list[float | None]:
    pairs = _pairs([layer.shares for layer in routing])
    shares: list[float | None] = [
        float(weight[here[:, None] != there[None, :]].sum())
        for weight, here, there in zip(pairs, bin_of, bin_of[1:], strict=False)
    ]
    return [*shares, None]


def _solve(name: str, problem: Problem, now: Assignment, seconds: float) -> tuple[Assignment, Stage]:
    deadline = time.monotonic() + seconds
    starts = [[balanced(layer) for layer in problem.layers]]
    if all(layer.fits(bins) for layer, bins in zip(problem.layers, now, strict=True)):
        starts.append(now)
    found = search(problem, starts, seconds * _SEARCH_SHARE)
    kept, bound = problem.kept(found), pair_bound(problem)
    is_optimal, exact = bound - kept < _EQUAL, False
    if not is_optimal and problem.products() <= LARGEST_PROGRAM and (left := deadline - time.monotonic()) > 0:
        exact = True
        result = solve_exactly(problem, left, kept)
        if result.assignment is not None and problem.kept(result.assignment) > kept:
            found, kept = result.assignment, problem.kept(result.assignment)
        bound = min(bound, result.bound)
        is_optimal = result.is_optimal or bound - kept < _EQUAL
    return found, Stage(name, kept, max(bound, kept), is_optimal, exact)


def _solve_staged(problem: Problem, now: Assignment, hosts: int, seconds: float) -> tuple[Assignment, list[Stage]]:
    """Hosts first; then each host alone, with the experts that it got."""
    per_host = problem.bins // hosts
    coarse = [
        _within_limits(
            layer.load,
            layer.kind,
            layer.capacity.reshape(len(layer.capacity), hosts, per_host).sum(axis=2),
            float(layer.limit[0]) * per_host,
        )
        for layer in problem.layers
    ]
    host_of, stage = _solve(
        "experts on hosts", Problem(coarse, problem.pairs), [bins // per_host for bins in now], seconds / 2
    )
    stages = [stage]
    assignment = [bins.copy() for bins in now]
    for host in range(hosts):
        own = [np.flatnonzero(bins == host) for bins in host_of]
        mine = slice(host * per_host, (host + 1) * per_host)
        layers = [
            _within_limits(layer.load[units], layer.kind[units], layer.capacity[:, mine], float(layer.limit[0]))
            for layer, units in zip(problem.layers, own, strict=True)
        ]
        pairs = [weight[np.ix_(here, there)] for weight, here, there in zip(problem.pairs, own, own[1:], strict=False)]
        start = [balanced(layer) for layer in layers]
        within, stage = _solve(
            f"experts of host {host} on its ranks", Problem(layers, pairs), start, seconds / 2 / hosts
        )
        stages.append(stage)
        for bins, units, found in zip(assignment, own, within, strict=True):
            bins[units] = host * per_host + found
    return assignment, stages
