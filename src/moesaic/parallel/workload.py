"""What all ranks know of one step after the counts exchange: enough to derive everything else alike.

W ranks · E experts · B blocks of experts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from moesaic.parallel.layout import ExpertLayout

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Workload:
    """The work of one layer in one step, the same object on every rank.

    Attributes:
        layout: of the layer's experts.
        counts_WE: ``[W, E]``, slots of each rank's tokens for each expert.
        rows_WB: ``[W, B]``, tokens of each rank that want at least one expert of a block.
        tokens_W: ``[W]``.
        d_model, top_k: D, K.
        dtype: of features and weights as they travel.
        slice_elements: elements of each slice of an expert, biases included; one number where experts are whole.
        grad: whether a backward pass will follow.
    """

    layout: ExpertLayout
    counts_WE: IntArray
    rows_WB: IntArray
    tokens_W: IntArray
    d_model: int
    top_k: int
    dtype: torch.dtype
    slice_elements: tuple[int, ...]
    grad: bool

    def without_counts(self) -> Workload:
        """Its sizes alone, without what grows with the square of the ranks."""
        none = np.empty((0, 0), dtype=np.int64)
        return replace(self, counts_WE=none, rows_WB=none, tokens_W=none[0:0].ravel())

    @property
    def expert_elements(self) -> int:
        """Elements of one whole expert, biases included."""
        return sum(self.slice_elements)

    @property
    def meta_bytes(self) -> int:
        """Bytes of a row's K weights and K expert ids: float32 and int32, 64 bits each where features are float64."""
        return 2 * self.top_k * max(4, self.dtype.itemsize)

    @property
    def row_bytes(self) -> int:
        """Bytes of one token's row with its weights and ids: on the way to the experts, and, with gradients in the
        places of features and weights, on the way back in the backward pass. A multiple of 8."""
        return -(-(self.result_bytes + self.meta_bytes) // 8) * 8

    @property
    def result_bytes(self) -> int:
        """Bytes of one row without them: of the result, and of its gradient."""
        return self.d_model * self.dtype.itemsize
