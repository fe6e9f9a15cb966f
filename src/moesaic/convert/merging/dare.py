"""Drop at random, and rescale."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moesaic.convert.merging.method import MERGES, MergeMethod, check_share, weighted_sum
from moesaic.convert.merging.ties import agreeing_mean
from moesaic.convert.merging.vectors import Piece, TaskVectors
from moesaic.convert.seeds import generator


@dataclass(frozen=True)
class Draw:
    """What the random masks of one tensor are drawn by."""

    seed: int
    name: str


class _Dare(MergeMethod):
    def __init__(self, *, density: float = 0.5, scale: float = 1.0) -> None:
        check_share("density", density)
        self.density, self.scale = density, scale

    def learn(self, vectors: TaskVectors, weights: Sequence[float], seed: int) -> Draw:
        return Draw(seed, vectors.name)

    def dropped(self, piece: Piece, draw: Draw) -> list[Tensor]:
        """The task vectors with a random 1 − density of their values 0, the others divided by the density."""
        rescaled = []
        for model, delta in enumerate(piece.deltas):
            random = generator(draw.seed, draw.name, model, piece.rows.start)
            stays = torch.rand(delta.shape, generator=random) < self.density
            rescaled.append(torch.where(stays, delta / self.density, 0.0))
        return rescaled


@MERGES.register("dare")
class Dare(_Dare):
    """Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free Lunch (DARE, section 3.2):
    a random share p of each task vector is dropped and the rest divided by 1 − p, which keeps its mean; then task
    arithmetic.

    Args:
        density: 1 − p, the share that stays. scale: λ of task arithmetic.
    """

    def merge(self, piece: Piece, weights: Sequence[float], learned: Draw) -> Tensor:
        return piece.base.add(weighted_sum(self.dropped(piece, learned), weights), alpha=self.scale)


@MERGES.register("dare_ties")
class DareTies(_Dare):
    """DARE as :class:`Dare`, then the election of signs and the mean of what agrees, as TIES does after its trimming.

    Args:
        density: the share that stays. scale: λ.
    """

    shares = True

    def merge(self, piece: Piece, weights: Sequence[float], learned: Draw) -> Tensor:
        return piece.base.add(agreeing_mean(self.dropped(piece, learned), weights), alpha=self.scale)
