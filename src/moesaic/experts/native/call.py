"""Tensors as the structs of the C ABI, and the plain calls: no autograd, no dispatcher.

E experts · T tokens · K slots per token · N routed rows · D model width · F expert hidden width · G = 2F with a gate.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moesaic.experts.activations import ACTIVATIONS
from moesaic.experts.native import library
from moesaic.experts.native.library import FLOATS, Gradients, Layer, Matrix
from moesaic.experts.native.memory import filled_by_huge_pages
from moesaic.experts.row_invariance import is_row_invariant

_FORMATS = {**FLOATS, torch.int8: library.INT8, torch.uint8: library.INT4}


class Arguments(NamedTuple):
    """What describes a call, in the order in which the operators take it."""

    x_TD: Tensor
    permutation: Tensor  # [N]
    offsets_E: Tensor
    weights_TK: Tensor
    up: Tensor  # the fields of ExpertWeights from here on
    down: Tensor
    up_bias: Tensor | None
    down_bias: Tensor | None
    up_scale: Tensor | None
    down_scale: Tensor | None
    transposed: bool
    activation: str
    group: int  # inputs per scale of int4, else 0

    @property
    def gate_up_width(self) -> int:
        """G."""
        return self.up.shape[2 if self.transposed else 1]

    @property
    def d_ff(self) -> int:
        """F."""
        width = self.gate_up_width
        return width // 2 if ACTIVATIONS.get(self.activation).gated else width


def strides(matrix: Tensor, transposed: bool) -> tuple[int, int] | None:
    """The strides of a matrix's outputs and of its inputs, one of which is 1; None where neither is.

    Args:
        matrix: ``[E, out, in]``, or ``[E, in, out]`` where ``transposed``.
    """
    _, rows, columns = matrix.stride()
    if columns != 1 and rows != 1:
        # The stride of a dimension of size 1 may be anything.
        if matrix.shape[2] == 1:
            columns = 1
        elif matrix.shape[1] == 1:
            rows = 1
        else:
            return None
    return (columns, rows) if transposed else (rows, columns)


def empty_gradients(a: Arguments, wanted: list[bool]) -> list[Tensor | None]:
    """Memory for what :func:`backward` returns."""
    x, up, down, up_bias, down_bias, weights = wanted
    return [
        a.x_TD.new_empty(a.x_TD.shape) if x else None,
        _empty_like(a.up, a) if up else None,
        _empty_like(a.down, a) if down else None,
        a.up_bias.new_empty(a.up_bias.shape) if up_bias and a.up_bias is not None else None,
        a.down_bias.new_empty(a.down_bias.shape) if down_bias and a.down_bias is not None else None,
        a.weights_TK.new_empty(a.weights_TK.shape, dtype=torch.float32) if weights else None,
    ]


def forward(arguments: Arguments, keep: bool) -> tuple[Tensor, Tensor | None]:
    """``[T, D]``, and with ``keep`` what goes into the activation, ``[N, G]`` (nothing is written to padding rows)."""
    arguments = _readable(arguments)
    x_TD = arguments.x_TD
    layer, out_TD = describe(arguments), filled_by_huge_pages(x_TD.new_empty(x_TD.shape))
    layer.row_invariant = is_row_invariant()
    layer.out = out_TD.data_ptr()
    pre_NG = None
    if keep:
        pre_NG = filled_by_huge_pages(x_TD.new_empty(arguments.permutation.shape[0], arguments.gate_up_width))
        layer.pre = pre_NG.data_ptr()
    library.forward(layer)
    return out_TD, pre_NG


def backward(grad_TD: Tensor, pre_NG: Tensor, arguments: Arguments, wanted: list[bool]) -> list[Tensor | None]:
    """The gradients of x, up, down, up_bias, down_bias and the routing weights, those that are ``wanted``.

    Float weights only. The gradient of the routing weights is float32.
    """
    arguments = _readable(arguments)
    grad_TD, pre_NG = grad_TD.contiguous(), pre_NG.contiguous()
    made = [each if each is None else filled_by_huge_pages(each) for each in empty_gradients(arguments, wanted)]
    layer = describe(arguments)
    layer.pre = pre_NG.data_ptr()
    library.backward(
        layer, Gradients(grad_TD.data_ptr(), *[each if each is None else each.data_ptr() for each in made])
    )
    return made


def _readable(arguments: Arguments) -> Arguments:
    """The arguments with everything contiguous that the ABI wants so; themselves where that is the case already."""
    x_TD, permutation, offsets_E, weights_TK, _, _, up_bias, down_bias, up_scale, down_scale, *_ = arguments
    return arguments._replace(
        x_TD=x_TD if x_TD.stride(1) == 1 or x_TD.shape[1] == 1 else x_TD.contiguous(),
        permutation=permutation.contiguous(),
        offsets_E=offsets_E.contiguous(),
        weights_TK=weights_TK.contiguous(),
        up_bias=None if up_bias is None else up_bias.contiguous(),
        down_bias=None if down_bias is None else down_bias.contiguous(),
        up_scale=None if up_scale is None else up_scale.contiguous(),
        down_scale=None if down_scale is None else down_scale.contiguous(),
    )


def describe(a: Arguments) -> Layer:
    """The call without its outputs. It holds addresses: the tensors must outlive it."""
    tokens, d_model = a.x_TD.shape
    return Layer(
        tokens,
        a.weights_TK.shape[1],
        a.up.shape[0],
        d_model,
        a.d_ff,
        a.permutation.shape[0],
        FLOATS[a.x_TD.dtype],
        FLOATS[a.weights_TK.dtype],
        library.ACTIVATIONS[a.activation],
        torch.get_num_threads(),
        a.x_TD.data_ptr(),
        a.x_TD.stride(0),
        a.permutation.data_ptr(),
        a.offsets_E.data_ptr(),
        a.weights_TK.data_ptr(),
        _matrix(a.up, a.up_scale, a.up_bias, a.transposed, a.group),
        _matrix(a.down, a.down_scale, a.down_bias, a.transposed, a.group),
    )


def _matrix(matrix: Tensor, scale: Tensor | None, bias: Tensor | None, transposed: bool, group: int) -> Matrix:
    return Matrix(
        matrix.data_ptr(),
        None if scale is None else scale.data_ptr(),
        None if bias is None else bias.data_ptr(),
        matrix.stride(0),
        *_strides(matrix, transposed),
        _FORMATS[matrix.dtype],
        group,
    )


def _empty_like(matrix: Tensor, a: Arguments) -> Tensor:
    """The shape of ``matrix``, contiguous in its memory order as the ABI defines it."""
    _, in_stride = _strides(matrix, a.transposed)
    if in_stride != 1 if a.transposed else in_stride == 1:
        return matrix.new_empty(matrix.shape)
    return matrix.new_empty(matrix.shape[0], matrix.shape[2], matrix.shape[1]).transpose(1, 2)


def _strides(matrix: Tensor, transposed: bool) -> tuple[int, int]:
    found = strides(matrix, transposed)
    assert found is not None  # the backend refuses other weights
    return found
