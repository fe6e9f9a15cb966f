"""Task vectors, added."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from moesaic.convert.merging.method import MERGES, MergeMethod, weighted_sum
from moesaic.convert.merging.vectors import Piece


@MERGES.register("task_arithmetic")
class TaskArithmetic(MergeMethod):
    """θ₀ + λ · Σ w·τ (Editing Models with Task Arithmetic, section 2): a negative weight takes a task out of the base.

    Args:
        scale: λ. The paper's sum of unweighted task vectors is ``weights`` of 1 with λ of about 0.3 to 0.5.
    """

    def __init__(self, *, scale: float = 1.0) -> None:
        self.scale = scale

    def merge(self, piece: Piece, weights: Sequence[float], learned: Any) -> Tensor:
        return piece.base.add(weighted_sum(piece.deltas, weights), alpha=self.scale)
