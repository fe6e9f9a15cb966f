"""A low-rank adapter added into the base's own weights, and taken out again bit for bit."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moesaic.adapters.lora import LoraAdapter, LoraPart, Target, check_parts, find_targets
from moesaic.errors import UnsupportedError


class MergedLora:
    """An adapter that is part of a model's weights; made by :func:`merge_lora`."""

    def __init__(self, kept: list[tuple[Tensor, Tensor]]) -> None:
        self._kept = kept

    def remove(self) -> None:
        """Put the base's own rows back: every bit is what it was."""
        with torch.no_grad():
            for weight, before in self._kept:
                weight.copy_(before)
        self._kept = []


def merge_lora(model: nn.Module, adapter: LoraAdapter, keep: bool = True) -> MergedLora:
    """Add an adapter into the weights: computed in float32, rounded once to the weights' dtype.

    Args:
        keep: hold a copy of every matrix that changes, for :meth:`MergedLora.remove`; without one it removes nothing.

    Raises:
        CheckpointError: where a part has no matching target in the model; nothing has been changed then.
        UnsupportedError: where a weight is quantized, or shared with another module; nothing has been changed then.
    """
    targets = find_targets(model)
    check_parts(adapter, targets)
    weights = {name: _weight(model, targets[name]) for name in adapter.parts}
    kept = []
    with torch.no_grad():
        for name, part in adapter.parts.items():
            for index, matrix in _matrices(weights[name], part):
                if keep:
                    kept.append((matrix, matrix.clone()))
                delta = part.delta(index).to(matrix.device)
                matrix.copy_(matrix.float() + (delta.t() if targets[name].transposed else delta))
    return MergedLora(kept)


def _matrices(weight: Tensor, part: LoraPart) -> list[tuple[int | None, Tensor]]:
    """Each matrix that changes, with the number of its part among the part's experts."""
    if part.experts is None:
        return [(None, weight)]
    return [(index, weight[expert]) for index, expert in enumerate(part.experts)]


def _weight(model: nn.Module, target: Target) -> Tensor:
    weight = getattr(target.module, target.parameter, None)
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        raise UnsupportedError(f"{target.name} is quantized: an adapter cannot be merged into it, only attached")
    sharing = [
        f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        for name, each in module.named_parameters(recurse=False)
        if each is weight and module is not target.module
    ]
    if sharing:
        raise UnsupportedError(f"{target.name} is also {sharing[0]}: merging an adapter into it would change both")
    return weight.detach()
