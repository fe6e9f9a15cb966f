"""The plain average."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from moesaic.convert.merging.method import MERGES, MergeMethod, weighted_sum
from moesaic.convert.merging.vectors import Piece


@MERGES.register("linear")
class Linear(MergeMethod):
    """The weighted average of the fine-tuned models, Σ w·θ / Σ w (Model soups: averaging weights of multiple fine-tuned
    models improves accuracy without increasing inference time, section 2, "uniform soup").

    A weight that is 0 in the base and in all models stays 0: the average of models that were pruned by one mask, each
    trained further, has that mask (Sparse Model Soups: A Recipe for Improved Pruning via Model Averaging).
    """

    shares = True

    def merge(self, piece: Piece, weights: Sequence[float], learned: Any) -> Tensor:
        whole = sum(weights)
        return piece.base + weighted_sum(piece.deltas, [weight / whole for weight in weights])
