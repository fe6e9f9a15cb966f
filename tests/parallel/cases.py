"""Workloads and plans of the grid, as plain data that every process makes alike.

W ranks · E experts · T tokens · D model width · F expert hidden width · K slots per token.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from tests import reference as layer_reference
from tests.parallel.reference import Geometry
from torch import Tensor

from moesaic.parallel.plan import Plan

ROUTINGS = ("balanced", "skewed", "to one")
TOKENS = {"equal": (6, 6, 6, 6, 6, 6, 6, 6), "unequal": (9, 4, 0, 13, 1, 0, 6, 2), "none first": (0, 5)}


@dataclass(frozen=True)
class Shape:
    """The experts of a layer. D and F are such that slices differ in size."""

    experts: int
    d_model: int = 6
    d_ff: int = 10
    activation: str = "swiglu"
    bias: bool = False
    transposed: bool = False
    dtype: torch.dtype = torch.float32

    def tensors(self) -> dict[str, Tensor]:
        """The whole weights as a module stores them."""
        return {name: self.stored(tensor) for name, tensor in self.plain_tensors().items()}

    def stored(self, plain: Tensor) -> Tensor:
        """A tensor, or its gradient, as a module stores it."""
        return plain.transpose(1, 2).contiguous() if self.transposed and plain.ndim == 3 else plain

    def plain_tensors(self) -> dict[str, Tensor]:
        """``up`` [E, 2F, D], ``down`` [E, D, F], and biases."""
        generator = torch.Generator().manual_seed(self.experts)
        up = 2 * self.d_ff if self.activation in ("swiglu", "geglu") else self.d_ff
        shapes = {"up": (up, self.d_model), "down": (self.d_model, self.d_ff)}
        if self.bias:
            shapes |= {"up_bias": (up,), "down_bias": (self.d_model,)}
        made = {
            name: torch.randn(self.experts, *shape, generator=generator).div(shape[-1] ** 0.5 if shape[1:] else 1)
            for name, shape in shapes.items()
        }
        return {name: tensor.to(self.dtype) for name, tensor in made.items()}


@dataclass(frozen=True)
class Workload:
    """What the ranks of one call are given."""

    shape: Shape
    ranks: int
    routing: str = "skewed"
    tokens: tuple[int, ...] = TOKENS["equal"]
    nulls: bool = False
    capacity: float = 0.0
    top_k: int = 2
    silent: tuple[int, ...] = ()  # ranks whose output nothing depends on

    @property
    def geometry(self) -> Geometry:
        return Geometry(self.shape.experts, self.shape.d_ff, self.ranks)

    def slots(self, rank: int) -> list[list[int]]:
        """The experts of each of a rank's tokens; E and more for a null slot."""
        experts, top_k = self.shape.experts, 1 if self.routing == "to one" else min(self.top_k, self.shape.experts)
        chance = random.Random(f"{self} {rank}")
        ids = []
        for token in range(self.tokens[rank]):
            if self.routing == "to one":
                taken = [experts - 1]
            elif self.routing == "balanced":
                taken = [(rank + token * top_k + k) % experts for k in range(top_k)]
            else:
                order = sorted(range(experts), key=lambda e: chance.random() ** (1 + e))
                taken = order[-top_k:]
            ids.append([experts + chance.randrange(3) if self.nulls and chance.random() < 0.3 else e for e in taken])
        return self._limited(ids, top_k) if self.capacity else ids

    def _limited(self, ids: list[list[int]], top_k: int) -> list[list[int]]:
        null, settings = layer_reference.NULL, layer_reference.Settings(self.shape.experts, top_k)
        settings.capacity_factor = self.capacity
        kept, _ = layer_reference.limit(
            [[null if e >= self.shape.experts else e for e in row] for row in ids], settings
        )
        return [[self.shape.experts if e == null else e for e in row] for row in kept]

    def inputs(self, rank: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Features, ids, routing weights, and the gradient of the output, of a rank."""
        generator = torch.Generator().manual_seed(1000 + rank)
        slots = self.slots(rank)
        top_k = len(slots[0]) if slots else 1 if self.routing == "to one" else min(self.top_k, self.shape.experts)
        x_TD, upstream_TD = torch.randn(2, len(slots), self.shape.d_model, generator=generator)
        weights_TK = torch.rand(len(slots), top_k, generator=generator) + 0.1
        ids_TK = torch.tensor(slots, dtype=torch.int64).view(len(slots), top_k)
        if rank in self.silent:
            upstream_TD.zero_()
        return x_TD.to(self.shape.dtype), ids_TK, weights_TK, upstream_TD.to(self.shape.dtype)

    def hottest(self) -> list[int]:
        """All experts, the ones with most slots first."""
        counts = Counter(e for rank in range(self.ranks) for ids in self.slots(rank) for e in ids)
        return sorted(range(self.shape.experts), key=lambda e: -counts[e])


def workloads(ranks: int, experts: int, routing: str) -> list[Workload]:
    """Every combination of equal and unequal tokens, of ranks without any, null slots, and capacity."""
    spreads = [tokens[:ranks] for tokens in TOKENS.values() if len(tokens) >= ranks]
    combinations = itertools.product(spreads, (False, True), (0.0, 0.75))
    return [
        Workload(Shape(experts), ranks, routing, tokens, nulls, capacity) for tokens, nulls, capacity in combinations
    ]


def plans(workload: Workload) -> list[Plan]:
    """Every plan that means something for a workload."""
    return [plan for of_strategy in BY_STRATEGY for plan in of_strategy(workload)]


def sample(workload: Workload, number: int) -> list[Plan]:
    """Some of them, others for each workload; as many of each strategy, as long as there are any."""
    chance = random.Random(str(workload))
    by_strategy = [list(of_strategy(workload)) for of_strategy in BY_STRATEGY]
    for each in (by_strategy, *by_strategy):
        chance.shuffle(each)
    in_turn = itertools.chain.from_iterable(itertools.zip_longest(*by_strategy))
    return list(itertools.islice((plan for plan in in_turn if plan is not None), number))


def one_of_each(workload: Workload) -> list[Plan]:
    """A plan of every strategy with every overlap and every exchange; what else it says is drawn, workload by
    workload."""
    chance, found = random.Random(f"each {workload}"), plans(workload)
    chance.shuffle(found)
    return list({(plan.strategy, plan.overlap, plan.exchange): plan for plan in found}.values())


def tokens_plans(workload: Workload) -> Iterator[Plan]:
    for overlap, exchange, replicas in itertools.product((1, 2, 4), exchanges(workload), degrees(workload)):
        yield Plan("tokens", overlap=overlap, exchange=exchange, replicas=replicas)


def weights_plans(workload: Workload) -> Iterator[Plan]:
    everything = tuple(range(workload.shape.experts))
    for overlap, exchange, gather in itertools.product((1, 2, 4), exchanges(workload), ("direct", "relay")):
        yield Plan("weights", everything, overlap=overlap, exchange=exchange, gather=gather)


def hybrid_plans(workload: Workload) -> Iterator[Plan]:
    hottest = workload.hottest()
    half = max(1, len(hottest) // 2)
    # One hot expert, several, all but the hottest, and some of which most ranks have too few slots to fetch them.
    sets = ((hottest[:1], 1), (hottest[:half], 1), (hottest[1:], 1), (hottest[:half], 3), (hottest, 5))
    options = itertools.product(sets, (1, 2, 4), exchanges(workload), ("direct", "relay"), degrees(workload))
    for (fetched, least), overlap, exchange, gather, replicas in options:
        yield Plan("hybrid", tuple(sorted(fetched)), least, overlap, exchange, gather, replicas)


BY_STRATEGY = (tokens_plans, weights_plans, hybrid_plans)


def exchanges(workload: Workload) -> tuple[str, ...]:
    return ("direct", "hierarchical") if workload.ranks in (4, 8) else ("direct",)


def degrees(workload: Workload) -> tuple[int, ...]:
    slices = workload.geometry.slices
    return (0, *(r for r in range(1, slices) if slices % r == 0))
