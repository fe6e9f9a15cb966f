"""What a schedule must say, found by sending tokens one by one; and a layer over many ranks, in float64 on one.

It shares no code with ``moesaic.parallel`` but the plain data that it is asked about.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from tests import reference as layer_reference
from torch import Tensor

from moesaic.parallel.plan import Plan

Slots = Sequence[Sequence[int]]  # the expert ids of each token; from the number of experts on: a null slot


@dataclass(frozen=True)
class Geometry:
    """Where experts live, in words: whole on one rank each, or sliced over equally many ranks."""

    experts: int
    width: int
    ranks: int

    @property
    def slices(self) -> int:
        return 1 if self.experts >= self.ranks else self.ranks // math.gcd(self.experts, self.ranks)

    def owners(self, expert: int) -> list[int]:
        """The ranks that own the expert's slices, slice 0 first."""
        if self.slices == 1:
            each = math.ceil(self.experts / self.ranks)
            return [expert // each]
        each = self.experts // math.gcd(self.experts, self.ranks)
        first = expert // each * self.slices
        return list(range(first, first + self.slices))

    def hidden(self, slice_: int) -> range:
        each = math.ceil(self.width / self.slices)
        return range(min(self.width, slice_ * each), min(self.width, (slice_ + 1) * each))


@dataclass
class Traffic:
    """Who sends and computes what, counted one token at a time."""

    rows: Counter[tuple[int, int]] = field(default_factory=Counter)  # (from, to)
    own_slots: Counter[tuple[int, int]] = field(default_factory=Counter)  # (rank, expert)
    fetched_slots: Counter[tuple[int, int]] = field(default_factory=Counter)
    needed: set[tuple[int, int, int]] = field(default_factory=set)  # (rank, expert, slice), the owned ones not


def traffic(slots_of_rank: Sequence[Slots], geometry: Geometry, plan: Plan) -> Traffic:
    """Send every token of every rank where the plan sends it."""
    answer = Traffic()
    for rank, tokens in enumerate(slots_of_rank):
        fetched = fetched_by(rank, tokens, geometry, plan)
        for expert in fetched:
            answer.needed |= {(rank, expert, slice_) for slice_ in range(geometry.slices)}
        for e in (e for ids in tokens for e in ids if e in fetched):
            answer.fetched_slots[rank, e] += 1
        for block in blocks(geometry):
            for owner in receivers(rank, block, geometry, plan):
                answer.rows[rank, owner] += rows_to(block, tokens, fetched)
                for e in (e for ids in tokens for e in ids if e in block and e not in fetched):
                    answer.own_slots[owner, e] += 1
                    answer.needed |= {(owner, e, slice_) for slice_ in replica_of(owner, block, geometry, plan)}
    answer.needed -= {(r, e, s) for e in range(geometry.experts) for s, r in enumerate(geometry.owners(e))}
    return answer


def fetched_by(rank: int, tokens: Slots, geometry: Geometry, plan: Plan) -> set[int]:
    """The experts that a rank computes by itself, because their weights come to it."""
    wanted = Counter(e for ids in tokens for e in ids)
    return {e for e in plan.fetched if wanted[e] >= max(plan.least, 1) and geometry.owners(e) != [rank]}


def blocks(geometry: Geometry) -> list[list[int]]:
    """The experts that live together."""
    together: dict[int, list[int]] = {}
    for e in range(geometry.experts):
        together.setdefault(geometry.owners(e)[0], []).append(e)
    return list(together.values())


def receivers(rank: int, block: Sequence[int], geometry: Geometry, plan: Plan) -> list[int]:
    """The ranks of a block that take tokens of ``rank``: one in each replica."""
    owners = geometry.owners(block[0])
    step = len(owners) // (plan.replicas or len(owners))
    return [owners[first + rank % step] for first in range(0, len(owners), step)]


def replica_of(owner: int, block: Sequence[int], geometry: Geometry, plan: Plan) -> range:
    """The slices that ``owner`` must have to compute its replica's share of the hidden width."""
    owners = geometry.owners(block[0])
    step = len(owners) // (plan.replicas or len(owners))
    first = owners.index(owner) // step * step
    return range(first, first + step)


def rows_to(block: Sequence[int], tokens: Slots, fetched: set[int]) -> int:
    """Rows to a block: one for each token that wants some of it; or, if less where some of it is fetched, per slot."""
    wanting = sum(any(e in block for e in ids) for ids in tokens)
    slots = sum(e in block and e not in fetched for ids in tokens for e in ids)
    return min(wanting, slots) if fetched & set(block) else wanting


def counted(slots_of_rank: Sequence[Slots], geometry: Geometry) -> tuple[list[list[int]], list[list[int]]]:
    """(slots of each rank for each expert, tokens of each rank that want something of each block)."""
    counts = [[sum(list(ids).count(e) for ids in tokens) for e in range(geometry.experts)] for tokens in slots_of_rank]
    rows = [
        [sum(any(e in block for e in ids) for ids in tokens) for block in blocks(geometry)] for tokens in slots_of_rank
    ]
    return counts, rows


def owned(geometry: Geometry, sizes: Sequence[int]) -> Mapping[int, set[tuple[int, int, int]]]:
    """Every rank's own elements of the weights: (expert, slice, element)."""
    elements: dict[int, set[tuple[int, int, int]]] = {rank: set() for rank in range(geometry.ranks)}
    for e in range(geometry.experts):
        for slice_, rank in enumerate(geometry.owners(e)):
            elements[rank] |= {(e, slice_, i) for i in range(sizes[slice_])}
    return elements


# ------------------------------------------------------------------------------------------- many ranks, on one, slowly


def experts_of_ranks(
    tensors: Mapping[str, Tensor],
    activation: str,
    inputs: Sequence[tuple[Tensor, Tensor, Tensor, Tensor]],
    times: int = 1,
) -> dict[str, Any]:
    """Outputs and gradients of a layer's experts in float64: each rank's tokens one by one through whole experts.

    Args:
        tensors: of all experts.
        inputs: of each rank: features, ids, routing weights, and the gradient of the output.
        times: so often the output goes through the experts again, by the same ids and weights.

    Returns:
        ``output``, and the gradients ``x`` and ``weights``: a tensor for each rank; those of ``tensors``: the mean over
        the ranks.
    """
    parameters = {f"experts.{name}": each.double().requires_grad_() for name, each in tensors.items()}
    answer: dict[str, Any] = {"output": [], "x": [], "weights": []}
    for x, ids, weights, upstream in inputs:
        x, weights = x.double().requires_grad_(), weights.double().requires_grad_()
        output = x
        for _ in range(times):
            output = through_experts(output, ids.tolist(), weights, parameters, activation)
        if output.requires_grad:
            (output * upstream.double()).sum().backward()
        answer["output"].append(output.detach())
        answer["x"].append(torch.zeros_like(x) if x.grad is None else x.grad)
        answer["weights"].append(torch.zeros_like(weights) if weights.grad is None else weights.grad)
    for name in tensors:
        parameter = parameters[f"experts.{name}"]
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        answer[name] = grad.detach() / len(inputs)
    return answer


def through_experts(
    x: Tensor, ids: Slots, weights: Tensor, parameters: Mapping[str, Tensor], activation: str
) -> Tensor:
    """One token, one slot at a time."""
    experts, rows = parameters["experts.up"].shape[0], []
    for token, taken, shares in zip(x, ids, weights, strict=True):
        y = 0 * token
        for e, share in zip(taken, shares, strict=True):
            if e < experts:
                y = y + share * layer_reference.expert(token, parameters, e, activation)
        rows.append(y)
    return torch.stack(rows) if rows else x * 1
