"""Along the arc between two models."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from moesaic.convert.merging.method import MERGES, MergeMethod
from moesaic.convert.merging.vectors import Piece, TaskVectors
from moesaic.errors import ConfigError

STRAIGHT = 0.9995
"""From this cosine on the arc is as good as its chord, and dividing by its sine is not safe."""


@dataclass(frozen=True)
class Ends:
    """How much of each end of the arc the merged tensor has."""

    first: float
    second: float


@MERGES.register("slerp")
class Slerp(MergeMethod):
    """Spherical linear interpolation (Animating Rotation with Quaternion Curves, section 3.3), each tensor as one
    vector: sin((1−t)Ω)/sin Ω of one end and sin(tΩ)/sin Ω of the other, Ω the angle between both.

    With one fine-tuned model the ends are the base and that model, and its weight is t (1/2 by default). With two the
    ends are their task vectors, added to the base; t is the second one's share of the weights. Nearly parallel vectors
    (cosine above 0.9995 in magnitude) are interpolated along the straight line, as is common.
    """

    models = (1, 2)
    shares = True

    def equal(self, models: int) -> tuple[float, ...]:
        return (0.5,) * models

    def check_weights(self, weights: Sequence[float], models: int, where: str = "weights") -> None:
        super().check_weights(weights, models, where)
        if models == 1 and weights[0] > 1:
            raise ConfigError(f"{where} is {list(weights)}: between the base and one model it must be at most 1")

    def learn(self, vectors: TaskVectors, weights: Sequence[float], seed: int) -> Ends:
        dot = first = second = 0.0
        for piece in vectors:
            a, b = (end.double() for end in _ends(piece))
            dot += float((a * b).sum())
            first += float(a.square().sum())
            second += float(b.square().sum())
        t = weights[0] if len(weights) == 1 else weights[1] / sum(weights)
        cosine = dot / math.sqrt(first * second) if first and second else 1.0
        if abs(cosine) > STRAIGHT:
            return Ends(1 - t, t)
        angle = math.acos(cosine)
        return Ends(math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle))

    def merge(self, piece: Piece, weights: Sequence[float], learned: Ends) -> Tensor:
        a, b = _ends(piece)
        between = learned.first * a + learned.second * b
        return between if len(piece.deltas) == 1 else piece.base + between


def _ends(piece: Piece) -> tuple[Tensor, Tensor]:
    if len(piece.deltas) == 1:
        return piece.base, piece.base + piece.deltas[0]
    return piece.deltas[0], piece.deltas[1]
