"""What at least two tasks need."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moesaic.convert.merging.method import MERGES, MergeMethod, weighted_sum
from moesaic.convert.merging.vectors import Piece
from moesaic.errors import ConfigError


@MERGES.register("consensus")
class Consensus(MergeMethod):
    """Consensus task arithmetic of Localizing Task Information for Improved Model Merging and Compression (sections 4
    and 5): a weight matters to a task where |τ| > κ · |Σ τ − τ|, the task vector against the rest of their unweighted
    sum; weights that matter to fewer than ``tasks`` of them keep the base's value, the others are those of task
    arithmetic.

    Args:
        threshold: κ (the paper's λ), smaller for masks with more in them. tasks: how many must need a weight, 2 in the
            paper; 1 removes only what none needs. scale: λ of task arithmetic.
    """

    models = (2, None)

    def __init__(self, *, threshold: float = 0.4, tasks: int = 2, scale: float = 1.0) -> None:
        if threshold <= 0:
            raise ConfigError(f"threshold is {threshold}: it must be above 0")
        if tasks < 1:
            raise ConfigError(f"tasks is {tasks}: it must be at least 1")
        self.threshold, self.tasks, self.scale = threshold, tasks, scale

    def merge(self, piece: Piece, weights: Sequence[float], learned: Any) -> Tensor:
        together = weighted_sum(piece.deltas, [1.0] * len(piece.deltas))
        needed = torch.zeros_like(together)
        for delta in piece.deltas:
            needed += delta.abs() > self.threshold * (together - delta).abs()
        added = torch.where(needed >= self.tasks, weighted_sum(piece.deltas, weights), 0.0)
        return piece.base.add(added, alpha=self.scale)
