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

from moesaic.errors import ConfigError, DataError, did_you_mean
from moesaic.parallel.layout import chunk
from moesaic.parallel.placement.program import FloatArray, IntArray, Problem, scipy_optimize
from moesaic.parallel.placement.stages import Stage, solve, within_limits

MAX_IMBALANCE = 1.2
"""The load of a layer's busiest rank, over an even share, that a placement may reach by default."""
OBJECTIVES = ("transitions", "rows")


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
    objective: str = "transitions",
) -> Solution:
    """The placement that is best by an objective.

    ``"transitions"``, ExFlow's: the most transitions between consecutive MoE layers stay on one rank. That saves where
    a token goes from rank to rank with its layers. ``"rows"``: a token's experts of one layer are on the fewest ranks.
    That saves here, where tokens have a rank and their rows come back to it; ranks are then named so that as many
    transitions stay as that allows.

    Each rank gets as many experts of a layer as the contiguous split gives it, and no more than ``max_imbalance`` of an
    even share of the layer's slots, or what an even spreading of the heaviest experts reaches where that is more. First
    a search; then, where the program is small enough, HiGHS goes on from there and may prove that nothing is better.
    With several hosts, experts are placed on hosts first, then on the ranks of each (ExFlow's staged program).

    Args:
        routing: of the same N tokens in each layer, from first to last.
        hosts: equally many ranks each, neighbours together. seconds: about the most that it may take.

    Raises:
        ConfigError: for a number out of range, an unknown objective, hosts that do not divide the ranks, or more ranks
            than a layer has experts.
        DataError: where there is nothing to go by: fewer than two layers, or no transition between them.
        MissingDependencyError: without scipy.
    """
    check_numbers(ranks, hosts, seconds, max_imbalance, objective)
    check_routing(routing, ranks, objective)
    scipy_optimize()
    began = time.monotonic()
    units = [_Units.of(layer, ranks) for layer in routing]
    problem = _problem(routing, units, ranks, max_imbalance, objective)
    contiguous = Placement.contiguous(routing, ranks).rank_of
    now = [each.bins(rank_of) for each, rank_of in zip(units, contiguous, strict=True)]
    assignment, stages = solve(problem, now, hosts, seconds)
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


def check_numbers(ranks: int, hosts: int, seconds: float, max_imbalance: float, objective: str) -> None:
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
    if objective not in OBJECTIVES:
        raise ConfigError(f"no such objective {objective!r}: {did_you_mean(objective, OBJECTIVES)}")


def check_routing(routing: Sequence[LayerRouting], ranks: int, objective: str) -> None:
    """Refuse layers that there is nothing to place in.

    Raises:
        ConfigError, DataError: as :func:`place`.
    """
    by_transitions = objective == "transitions"
    if len(routing) < 1 + by_transitions:
        raise DataError(f"the routing is of {len(routing)} MoE layers: a placement by {objective} needs more")
    for level, layer in enumerate(routing):
        if ranks > layer.num_experts:
            raise ConfigError(
                f"ranks is {ranks}, but MoE layer {level} has {layer.num_experts} experts: ranks then own slices of "
                "every expert of a block, which have no placement; give at most as many ranks as experts"
            )
    if by_transitions and not any(weight.sum() > 0 for weight in _pairs([layer.shares for layer in routing])):
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


def _problem(
    routing: Sequence[LayerRouting], units: Sequence[_Units], ranks: int, max_imbalance: float, objective: str
) -> Problem:
    layers = [
        within_limits(each.summed(layer.load), each.kind, each.capacity, max_imbalance / ranks)
        for layer, each in zip(routing, units, strict=True)
    ]
    shares = [each.summed(layer.shares) for layer, each in zip(routing, units, strict=True)]
    pairs = [weight / max(1, len(shares) - 1) for weight in _pairs(shares)]
    return Problem(layers, pairs, [share > 0 for share in shares] if objective == "rows" else None)


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
