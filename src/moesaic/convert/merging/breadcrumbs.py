"""Task vectors without their largest and smallest values."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from moesaic.convert.merging.method import MERGES, MergeMethod, check_share, share_of, weighted_sum
from moesaic.convert.merging.vectors import Piece, TaskVectors, magnitudes_at
from moesaic.errors import ConfigError


@MERGES.register("breadcrumbs")
class Breadcrumbs(MergeMethod):
    """Model Breadcrumbs: Scaling Multi-Task Model Merging with Sparse Masks (section 3): of each tensor's task vector
    both tails are masked, the outliers and the negligible changes; then θ₀ + λ · Σ w·(m ⊙ τ).

    Values of one magnitude at a border stay, all of them: in bfloat16 many changes are of the same few steps.

    The paper's percentiles β and γ are 1 − ``outliers`` − ``density`` and 1 − ``outliers``. (The authors' program takes
    them of each row, the paper of each layer, as is done here.)

    Args:
        density: share of the values that stays. outliers: share of the largest ones that is masked. scale: λ.
    """

    def __init__(self, *, density: float = 0.1, outliers: float = 0.01, scale: float = 1.0) -> None:
        check_share("density", density)
        if not 0 <= outliers < 1 or density + outliers > 1 + 1e-9:
            raise ConfigError(
                f"outliers is {outliers}: it must be at least 0, and with density = {density} at most 1 in sum"
            )
        self.density, self.outliers, self.scale = density, outliers, scale

    def learn(self, vectors: TaskVectors, weights: Sequence[float], seed: int) -> list[tuple[float, float]]:
        """Of each model the smallest and the largest magnitude that stay."""
        masked = min(math.floor(self.outliers * vectors.size + 1e-6), vectors.size - 1)
        last = min(masked + share_of(self.density, vectors.size), vectors.size)
        return [(least, most) for most, least in magnitudes_at(vectors, [masked + 1, last])]

    def merge(self, piece: Piece, weights: Sequence[float], learned: list[tuple[float, float]]) -> Tensor:
        kept = []
        for delta, (least, most) in zip(piece.deltas, learned, strict=True):
            size = delta.abs()
            kept.append(torch.where((size >= least) & (size <= most), delta, 0.0))
        return piece.base.add(weighted_sum(kept, weights), alpha=self.scale)
