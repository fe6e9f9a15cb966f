"""Trim, elect a sign, merge what agrees."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moesaic.convert.merging.method import MERGES, MergeMethod, check_share, share_of
from moesaic.convert.merging.vectors import Piece, TaskVectors, magnitudes_at


@MERGES.register("ties")
class Ties(MergeMethod):
    """TIES-Merging: Resolving Interference When Merging Models (section 4, algorithm 1).

    1. trim: of each task vector only the largest values stay, ``density`` of them;
    2. elect: every weight gets the sign of the weighted sum of what stayed;
    3. merge: the weighted mean of the values that are not 0 and have the sign elected, times λ, on top of the base.

    The paper trims over the whole model and not each tensor by itself, as is done here (and in the programs in use),
    for no more than one tensor is looked at; where the sum is exactly 0 there is no sign, and the base's weight stays.

    Args:
        density: share of the values that stay, of each tensor. scale: λ.
    """

    shares = True

    def __init__(self, *, density: float = 0.2, scale: float = 1.0) -> None:
        check_share("density", density)
        self.density, self.scale = density, scale

    def learn(self, vectors: TaskVectors, weights: Sequence[float], seed: int) -> list[float]:
        """The smallest magnitude that stays, of each model."""
        return [magnitudes[0] for magnitudes in magnitudes_at(vectors, [share_of(self.density, vectors.size)])]

    def merge(self, piece: Piece, weights: Sequence[float], learned: list[float]) -> Tensor:
        trimmed = [
            torch.where(delta.abs() >= least, delta, 0.0) for delta, least in zip(piece.deltas, learned, strict=True)
        ]
        return piece.base.add(agreeing_mean(trimmed, weights), alpha=self.scale)


def agreeing_mean(deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Of every value the weighted mean over the models where it has the sign of the weighted sum; 0 where none has."""
    sign = torch.zeros_like(deltas[0])
    for delta, weight in zip(deltas, weights, strict=True):
        sign.add_(delta, alpha=weight)
    sign.sign_()
    total, whole = torch.zeros_like(sign), torch.zeros_like(sign)
    for delta, weight in zip(deltas, weights, strict=True):
        agrees = delta * sign > 0
        total.add_(torch.where(agrees, delta, 0.0), alpha=weight)
        whole.add_(agrees, alpha=weight)
    return torch.where(whole > 0, total / whole, 0.0)
