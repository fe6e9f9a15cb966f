"""How many rows each expert of each layer has computed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moesaic.experts import ExpertBank
from moesaic.hf.experts import is_experts_module


class ExpertLoad:
    """Sums up what the expert modules of a model say of their last forward.

    Adapters' copies of experts are slots after the base's: they are counted as such, one addition a layer and step,
    and added to the experts that they are copies of only when somebody asks, or when slots are about to change hands.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, ExpertBank) or is_experts_module(module)
        }
        self._base: dict[str, Tensor] = {}
        self._slots: dict[str, Tensor] = {}

    def add(self) -> None:
        """After a forward pass: add its counts."""
        for name, module in self._modules.items():
            counts = getattr(module, "last_counts", None)
            if counts is None:
                continue
            sums = self._base if len(counts) == module.num_experts else self._slots
            if name not in sums:
                sums[name] = torch.zeros_like(counts)
            elif len(sums[name]) < len(counts):
                sums[name] = torch.cat([sums[name], torch.zeros_like(counts[len(sums[name]) :])])
            sums[name][: len(counts)] += counts

    def fold(self) -> None:
        """Before slots change hands: count copies as the experts that they are copies of."""
        for name, counts in self._slots.items():
            folded: Tensor = self._modules[name].slots.by_expert(counts)
            self._base[name] = self._base[name] + folded if name in self._base else folded
        self._slots.clear()

    def by_layer(self) -> dict[str, list[int]]:
        """Module path to rows per expert since the start, in the model's order."""
        self.fold()
        nothing = torch.zeros(0, dtype=torch.int64)
        return {
            name: self._base.get(name, nothing).tolist() or [0] * int(module.num_experts)
            for name, module in self._modules.items()
        }
