"""A grouped matmul with quantized weights: one expert at a time is turned into floats, multiplied by, and forgotten."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moesaic.experts.quantized import QuantFormat, QuantizedMatrix


def quantized_matmul(x_NI: Tensor, w_EOI: QuantizedMatrix, offsets_E: Tensor) -> Tensor:
    """``[N, I]`` times, for the rows of expert e, ``w[e]`` transposed: ``[N, O]``; differentiable in ``x``.

    Args:
        x_NI: of any floating dtype; the weights are dequantized to it.
        offsets_E: ``[E]`` int32, ascending ends of each expert's rows. Rows from ``offsets_E[-1]`` on give zeros.
    """
    arguments = (w_EOI.codes, w_EOI.scale, w_EOI.format.bits, w_EOI.format.group, w_EOI.inputs, offsets_E)
    out_NO: Tensor = _QuantizedMatmul.apply(x_NI, *arguments)  # type: ignore[no-untyped-call]
    return out_NO


# One operator, for the number of rows of each expert is read on the way, which a compiler cannot look through.
@torch.library.custom_op("moesaic::quantized_matmul", mutates_args=())
def _quantized_matmul(
    x: Tensor, codes: Tensor, scale: Tensor, bits: int, group: int, inputs: int, offsets: Tensor, transposed: bool
) -> Tensor:
    w_EOI = QuantizedMatrix(QuantFormat(bits, group), codes, scale, inputs)
    out = x.new_zeros(x.shape[0], inputs if transposed else codes.shape[1])
    start = 0
    for expert, end in enumerate(offsets.tolist()):
        if end > start:
            w_OI = w_EOI[expert : expert + 1].dequantize(x.dtype)[0]
            torch.mm(x[start:end], w_OI if transposed else w_OI.t(), out=out[start:end])
            start = end
    return out


@_quantized_matmul.register_fake
def _(
    x: Tensor, codes: Tensor, scale: Tensor, bits: int, group: int, inputs: int, offsets: Tensor, transposed: bool
) -> Tensor:
    return x.new_empty(x.shape[0], inputs if transposed else codes.shape[1])


class _QuantizedMatmul(torch.autograd.Function):
    @staticmethod
    def forward(
        x_NI: Tensor, codes: Tensor, scale: Tensor, bits: int, group: int, inputs: int, offsets_E: Tensor
    ) -> Tensor:
        op: Any = torch.ops.moesaic.quantized_matmul
        return op(x_NI, codes, scale, bits, group, inputs, offsets_E, False)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, codes, scale, *ctx.format, offsets_E = inputs
        ctx.save_for_backward(codes, scale, offsets_E)

    @staticmethod
    def backward(ctx: Any, grad_NO: Tensor) -> tuple[Tensor | None, ...]:
        codes, scale, offsets_E = ctx.saved_tensors
        op: Any = torch.ops.moesaic.quantized_matmul
        return op(grad_NO.contiguous(), codes, scale, *ctx.format, offsets_E, True), *[None] * 6
