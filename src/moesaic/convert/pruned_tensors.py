"""The tensors of a mixture of experts with fewer experts, each made when it is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from moesaic.convert.grouping import Groups
from moesaic.convert.meter import watch
from moesaic.convert.source import TensorSource
from moesaic.convert.stored_experts import StoredExperts
from moesaic.convert.writing import Output
from moesaic.hf.configuration import MoesaicConfig
from moesaic.hf.placement import MoEBlock
from moesaic.routing import ROUTERS


class PrunedTensors:
    """How the tensors of one MoE layer are made.

    Args:
        groups: the old experts that each new one is made of, led by the one that stays.
        counts: how often each old expert was taken: the weights of an average.
    """

    def __init__(self, block: MoEBlock, experts: StoredExperts, groups: Groups, counts: Sequence[float]) -> None:
        self.block, self.experts, self.groups = block, experts, groups
        self._counts = counts
        self._orders: dict[int, list[Tensor]] = {}

    @property
    def kept(self) -> float:
        """The share of the routed slots that the experts that stay had."""
        total = sum(self._counts)
        return sum(self._counts[group[0]] for group in self.groups) / total if total else 0.0

    def shares(self, group: Sequence[int]) -> list[float]:
        """The members' weights: how often each is taken, or all alike where none ever was."""
        counts = [self._counts[expert] for expert in group]
        total = sum(counts)
        return [count / total if total else 1 / len(group) for count in counts]

    def part(self, part: str, number: int) -> Tensor:
        """A part of the new expert ``number``."""
        group = self.groups[number]
        if len(group) == 1:
            return self.experts.read(part, group[0])
        if number not in self._orders:
            self._orders[number] = self.experts.orders(group)
        return self.experts.average(part, group, self.shares(group), self._orders[number])

    def fused(self, part: str) -> Tensor:
        """All new experts' parts in one tensor."""
        made = watch(torch.empty(len(self.groups), *self.experts.shape(part), dtype=self.experts.dtype(part)))
        for number in range(len(self.groups)):
            made[number] = self.part(part, number)
        return made

    def router_axis(self, shape: Sequence[int]) -> int:
        """Which axis of a router's tensor counts the experts: the first of their number, also where D is the same."""
        return list(shape).index(self.block.num_experts)

    def router(self, source: TensorSource, name: str) -> Tensor:
        """A tensor of the router with one row or entry for each new expert."""
        old = source.read(name)
        axis = self.router_axis(old.shape)
        rows = old.movedim(axis, 0)
        made = torch.stack([self._row(rows, group) for group in self.groups])
        if isinstance(source.config, MoesaicConfig):
            kind, parameter = ROUTERS.get(source.config.router), name.rpartition(".")[2]
            factor = kind.factor_with_fewer(parameter, self.block.num_experts, len(self.groups))
            if factor != 1:
                made = (made.double() * factor).to(made.dtype)
        return made.movedim(0, axis).contiguous()

    def _row(self, rows: Tensor, group: Sequence[int]) -> Tensor:
        """The members' mean. A gate's row gets the mean length of its members' rows as well: those that have little in
        common shorten each other, and the merged expert would hardly be taken."""
        if len(group) == 1:
            return rows[group[0]]
        own = torch.stack([rows[expert].double() for expert in group])
        shares = torch.tensor(self.shares(group), dtype=torch.float64)
        mixed = torch.tensordot(shares, own, dims=1)
        if mixed.numel() > 1:
            lengths = own.flatten(1).norm(dim=1)
            mixed = mixed * ((shares * lengths).sum() / mixed.norm().clamp(min=1e-30))
        row: Tensor = mixed.to(rows.dtype)
        return row


def pruned_outputs(source: TensorSource, layers: Mapping[int, PrunedTensors]) -> list[Output]:
    """Every tensor of the new model, in the order of the old one."""
    made: dict[str, Output | None] = {}
    for layer in layers.values():
        for name in layer.block.router:
            shape = list(source.shape(name))
            shape[layer.router_axis(shape)] = len(layer.groups)
            made[name] = Output(name, tuple(shape), source.dtype(name), partial(layer.router, source, name))
        for part in layer.experts.parts:
            each, dtype = layer.experts.shape(part), layer.experts.dtype(part)
            if layer.experts.fused:
                name = layer.experts.name(part, 0)
                made[name] = Output(name, (len(layer.groups), *each), dtype, partial(layer.fused, part))
                continue
            for number in range(layer.block.num_experts):
                name = layer.experts.name(part, number)
                is_there = number < len(layer.groups)
                made[name] = Output(name, each, dtype, partial(layer.part, part, number)) if is_there else None
    outputs = (
        made.get(name, Output(name, source.shape(name), source.dtype(name), partial(source.read, name)))
        for name in source.names
    )
    return [output for output in outputs if output is not None]
