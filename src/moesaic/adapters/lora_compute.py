"""Experts with low-rank parts: the projections one by one, so that something can be added to each.

N routed rows · D model width · F expert hidden width · G = 2F where a gate is fused, else F · E experts.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from moesaic.dispatch import Dispatch
from moesaic.eager import is_eager
from moesaic.errors import UnsupportedError
from moesaic.experts import ExpertWeights, QuantizedMatrix
from moesaic.experts.dequantizing import quantized_matmul
from moesaic.experts.grouped import add_bias, grouped_matmul
from moesaic.experts.native import linear
from moesaic.experts.row_invariance import is_row_invariant


class Parts(Protocol):
    """What is added, row by row; a row's token and its expert follow from the dispatch."""

    def add_up(self, h_NG: Tensor, x_ND: Tensor, dispatch: Dispatch) -> Tensor:
        """The up projection ``h_NG``, before the activation, plus the parts of its inputs."""

    def add_down(self, y_ND: Tensor, h_NF: Tensor, dispatch: Dispatch) -> Tensor:
        """The down projection ``y_ND`` plus the parts of its inputs."""


def compute_unfused(x_TD: Tensor, dispatch: Dispatch, weights: ExpertWeights, parts: Parts) -> Tensor:
    """``[T, D]`` to ``[T, D]``: what the backends compute, with low-rank parts; differentiable."""
    x_ND = dispatch.gather(x_TD)
    h_NG = add_bias(_up(x_ND, weights, dispatch.offsets), weights.up_bias, dispatch)
    h_NF = weights.activation.apply(parts.add_up(h_NG, x_ND, dispatch))
    y_ND = add_bias(_down(h_NF, weights, dispatch.offsets), weights.down_bias, dispatch)
    y_ND = parts.add_down(y_ND, h_NF, dispatch)
    return dispatch.combine(y_ND if weights.post_norm is None else weights.post_norm(y_ND))


def grouped_rows(x_NI: Tensor, w_EIO: Tensor, offsets_E: Tensor) -> Tensor:
    """:func:`grouped_matmul`; where no gradient is recorded, on the native kernels.

    PyTorch's own takes a multiple of their time for the few rows an expert that serving has, and in bfloat16 generates
    code for every new number of rows.

    Raises:
        UnsupportedError: where rows must not depend on one another, and the native kernels cannot see to it.
    """
    reason: str | None = "it is traced, or records gradients"
    if not torch.is_grad_enabled() and is_eager(x_NI, w_EIO):
        w_EOI = w_EIO.transpose(1, 2)
        reason = linear.refusal(x_NI, w_EOI)
        if reason is None:
            return linear.grouped_linear(x_NI, w_EOI, offsets_E, row_invariant=is_row_invariant())
    if is_row_invariant():
        raise UnsupportedError(f"low-rank parts cannot be computed row by row: {reason}")
    return grouped_matmul(x_NI, w_EIO, offsets_E)


def _up(x_ND: Tensor, weights: ExpertWeights, offsets_E: Tensor) -> Tensor:
    if weights.format is not None:
        return _quantized_rows(x_ND, weights.up_codes(), offsets_E)
    return grouped_rows(x_ND, weights.up_EDG(), offsets_E)


def _down(h_NF: Tensor, weights: ExpertWeights, offsets_E: Tensor) -> Tensor:
    if weights.format is not None:
        return _quantized_rows(h_NF, weights.down_codes(), offsets_E)
    return grouped_rows(h_NF, weights.down_EFD(), offsets_E)


def _quantized_rows(x_NI: Tensor, w_EOI: QuantizedMatrix, offsets_E: Tensor) -> Tensor:
    if not is_row_invariant():
        return quantized_matmul(x_NI, w_EOI, offsets_E)
    out_NO = x_NI.new_zeros(x_NI.shape[0], w_EOI.codes.shape[1])
    for expert, rows in _groups(offsets_E):
        w_OI = w_EOI[expert : expert + 1].dequantize(x_NI.dtype)[0]
        out_NO[rows] = linear.linear(x_NI[rows], w_OI, row_invariant=True)
    return out_NO


def _groups(offsets_E: Tensor) -> list[tuple[int, slice]]:
    """The experts that have rows, each with them."""
    ends = offsets_E.numpy()
    starts = np.concatenate([[0], ends[:-1]])
    return [(int(expert), slice(int(starts[expert]), int(ends[expert]))) for expert in np.flatnonzero(ends > starts)]
