"""One grouped matmul per projection, through ``torch.nn.functional.grouped_mm``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from moesaic.dispatch import Dispatch
from moesaic.experts.backend import BACKENDS, Backend
from moesaic.experts.dequantizing import quantized_matmul
from moesaic.experts.weights import ExpertWeights

_ALIGNMENT = 16  # bytes; grouped_mm's demand on addresses and strides
# oneDNN, which multiplies bf16 and fp16 on a CPU, generates code for each shape that it has not met yet, which takes
# longer than an expert's multiplication itself; and an expert gets another number of rows at every step. So beyond a
# few rows we multiply a multiple of this many: soon every shape has been met.
_ROWS = 32


class GroupedBackend(Backend):
    """Rows grouped by expert, two grouped matmuls, everything else elementwise over all rows at once."""

    preference = 10

    def run(self, x_TD: Tensor, dispatch: Dispatch, weights: ExpertWeights) -> Tensor:
        x_ND = dispatch.gather(x_TD)
        h_NG = add_bias(_up(x_ND, weights, dispatch.offsets), weights.up_bias, dispatch)
        h_NF = weights.activation.apply(h_NG)
        y_ND = add_bias(_down(h_NF, weights, dispatch.offsets), weights.down_bias, dispatch)
        return dispatch.combine(y_ND if weights.post_norm is None else weights.post_norm(y_ND))


def _up(x_ND: Tensor, weights: ExpertWeights, offsets_E: Tensor) -> Tensor:
    if weights.format is not None:
        return quantized_matmul(x_ND, weights.up_codes(), offsets_E)
    return grouped_matmul(x_ND, weights.up_EDG(), offsets_E)


def _down(h_NF: Tensor, weights: ExpertWeights, offsets_E: Tensor) -> Tensor:
    if weights.format is not None:
        return quantized_matmul(h_NF, weights.down_codes(), offsets_E)
    return grouped_matmul(h_NF, weights.down_EFD(), offsets_E)


def add_bias(h_NX: Tensor, bias_EX: Tensor | None, dispatch: Dispatch) -> Tensor:
    """Every row plus its expert's bias, where there are any; differentiable."""
    if bias_EX is None:
        return h_NX
    expert_of_row = dispatch.expert_of_row().clamp(max=bias_EX.shape[0] - 1)
    added: Tensor = _AddBias.apply(h_NX, bias_EX, expert_of_row, dispatch.offsets)  # type: ignore[no-untyped-call]
    return added


class _AddBias(torch.autograd.Function):
    """Autograd's own gradient of the indexing would be summed in the bias's precision, by threads in any order."""

    @staticmethod
    def forward(h_NX: Tensor, bias_EX: Tensor, expert_of_row: Tensor, offsets_E: Tensor) -> Tensor:
        return h_NX + bias_EX[expert_of_row]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[3])

    @staticmethod
    def backward(ctx: Any, grad_NX: Tensor) -> tuple[Tensor | None, ...]:
        (offsets_E,) = ctx.saved_tensors
        # As many columns of ones as grouped_mm's alignment asks for; each gives the same sums.
        ones = grad_NX.new_ones(grad_NX.shape[0], _ALIGNMENT // grad_NX.element_size())
        return grad_NX, grouped_outer(ones, grad_NX, offsets_E)[:, 0], None, None


def grouped_matmul(x_NI: Tensor, w_EIO: Tensor, offsets_E: Tensor) -> Tensor:
    """``[N, I]`` times, for the rows of expert e, ``w[e]`` (``[I, O]``): ``[N, O]``; one differentiable op.

    Args:
        offsets_E: ``[E]`` int32, ascending ends of each expert's rows. Rows from ``offsets_E[-1]`` on give zeros.
    """
    out_NO: Tensor = _GroupedMatmul.apply(x_NI, w_EIO, offsets_E)  # type: ignore[no-untyped-call]
    return out_NO


def grouped_outer(x_NI: Tensor, y_NO: Tensor, offsets_E: Tensor) -> Tensor:
    """``[E, I, O]``: for each expert, its rows of ``x`` transposed times its rows of ``y``; differentiable."""
    out_EIO: Tensor = _GroupedOuter.apply(x_NI, y_NO, offsets_E)  # type: ignore[no-untyped-call]
    return out_EIO


# ``grouped_mm`` as it comes cannot be compiled in float32, refuses odd strides, returns padded ones, and leaves rows
# that belong to nobody uninitialized. One custom op in front of it settles the four, and falls back to a matmul an
# expert.


@torch.library.custom_op("moesaic::grouped_matmul", mutates_args=())
def _grouped_matmul(x_NI: Tensor, w_EIO: Tensor, offsets_E: Tensor) -> Tensor:
    num_rows, num_outputs = x_NI.shape[0], w_EIO.shape[2]
    if num_rows and _grouped_mm_takes(x_NI, w_EIO):
        out_NO = F.grouped_mm(x_NI, w_EIO, offs=offsets_E).contiguous()
        if x_NI.device.type != "cpu" or int(offsets_E[-1]) < num_rows:
            rows = torch.arange(num_rows, device=x_NI.device)
            out_NO.masked_fill_((rows >= offsets_E[-1]).unsqueeze(-1), 0.0)
        return out_NO
    out_NO = x_NI.new_zeros(num_rows, num_outputs)

    def multiply(expert: int, rows: slice) -> None:
        wide = _window(rows, num_rows) if _generates_code(x_NI) else rows
        if wide == rows:
            torch.mm(x_NI[rows], w_EIO[expert], out=out_NO[rows])
        else:  # the neighbours' rows are multiplied in vain
            out_NO[rows] = torch.mm(x_NI[wide], w_EIO[expert])[rows.start - wide.start : rows.stop - wide.start]

    _each_group(offsets_E, multiply)
    return out_NO


@_grouped_matmul.register_fake
def _(x_NI: Tensor, w_EIO: Tensor, offsets_E: Tensor) -> Tensor:
    return x_NI.new_empty(x_NI.shape[0], w_EIO.shape[2])


@torch.library.custom_op("moesaic::grouped_outer", mutates_args=())
def _grouped_outer(x_NI: Tensor, y_NO: Tensor, offsets_E: Tensor) -> Tensor:
    num_experts, num_inputs, num_outputs = offsets_E.shape[0], x_NI.shape[1], y_NO.shape[1]
    if x_NI.shape[0] and x_NI.device.type != "cpu" and _aligned(x_NI) and _aligned(y_NO):
        out_EIO = F.grouped_mm(x_NI.t(), y_NO, offs=offsets_E).contiguous()
        if x_NI.device.type == "cuda" and torch.cuda.get_device_capability(x_NI.device) >= (10, 0):
            # Blackwell's kernel leaves the experts without rows uninitialized (PyTorch issue 172439).
            idle_E = offsets_E == torch.cat([offsets_E.new_zeros(1), offsets_E[:-1]])
            out_EIO.masked_fill_(idle_E.view(-1, 1, 1), 0.0)
        return out_EIO
    # On a CPU grouped_mm is a loop itself; this one leaves the experts without rows at zero for free.
    out_EIO = x_NI.new_zeros(num_experts, num_inputs, num_outputs)

    rounds = _generates_code(x_NI)

    def multiply(expert: int, rows: slice) -> None:
        x_RI, y_RO = (_with_zeros(each[rows]) if rounds else each[rows] for each in (x_NI, y_NO))
        torch.mm(x_RI.t(), y_RO, out=out_EIO[expert])

    _each_group(offsets_E, multiply)
    return out_EIO


@_grouped_outer.register_fake
def _(x_NI: Tensor, y_NO: Tensor, offsets_E: Tensor) -> Tensor:
    return x_NI.new_empty(offsets_E.shape[0], x_NI.shape[1], y_NO.shape[1])


def _each_group(offsets_E: Tensor, work: Callable[[int, slice], object]) -> None:
    start = 0
    for expert, end in enumerate(offsets_E.tolist()):
        if end > start:
            work(expert, slice(start, end))
            start = end


def _generates_code(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16)


def _rounded(rows: int) -> int:
    return rows if rows <= _ROWS else -(-rows // _ROWS) * _ROWS


def _with_zeros(x_RI: Tensor) -> Tensor:
    """``x`` with as many rows of zeros after its own as make their number a rounded one."""
    missing = _rounded(x_RI.shape[0]) - x_RI.shape[0]
    return F.pad(x_RI, (0, 0, 0, missing)) if missing else x_RI


def _window(rows: slice, num_rows: int) -> slice:
    """A slice of a rounded length that holds ``rows``; ``rows`` itself where there are not as many."""
    length = _rounded(rows.stop - rows.start)
    if length > num_rows:
        return rows
    start = min(rows.start, num_rows - length)
    return slice(start, start + length)


class _GroupedMatmul(torch.autograd.Function):
    """The operator's gradient; not given to ``register_autograd``, which knows no ``torch.func`` transforms."""

    @staticmethod
    def forward(x_NI: Tensor, w_EIO: Tensor, offsets_E: Tensor) -> Tensor:
        return torch.ops.moesaic.grouped_matmul(x_NI, w_EIO, offsets_E)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad_NO: Tensor) -> tuple[Tensor | None, ...]:
        x_NI, w_EIO, offsets_E = ctx.saved_tensors
        grad_x = grad_w = None
        if ctx.needs_input_grad[0]:
            grad_x = grouped_matmul(grad_NO, w_EIO.transpose(1, 2), offsets_E)
        if ctx.needs_input_grad[1]:
            # The gradient in the weight's own memory order: a weight stored as [E, O, I] is seen here transposed.
            if w_EIO.stride(-1) == 1:
                grad_w = grouped_outer(x_NI, grad_NO, offsets_E)
            else:
                grad_w = grouped_outer(grad_NO, x_NI, offsets_E).transpose(1, 2)
        return grad_x, grad_w, None


class _GroupedOuter(torch.autograd.Function):
    @staticmethod
    def forward(x_NI: Tensor, y_NO: Tensor, offsets_E: Tensor) -> Tensor:
        return torch.ops.moesaic.grouped_outer(x_NI, y_NO, offsets_E)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad_EIO: Tensor) -> tuple[Tensor, Tensor, None]:
        x_NI, y_NO, offsets_E = ctx.saved_tensors
        grad_x = grouped_matmul(y_NO, grad_EIO.transpose(1, 2), offsets_E)
        return grad_x, grouped_matmul(x_NI, grad_EIO, offsets_E), None


def _grouped_mm_takes(x_NI: Tensor, w_EIO: Tensor) -> bool:
    if _generates_code(x_NI) and x_NI.shape[0] > _ROWS:
        return False
    if x_NI.device.type == "cuda" and torch.cuda.get_device_capability(x_NI.device) < (8, 0):
        return False
    return x_NI.dtype in (torch.bfloat16, torch.float16, torch.float32) and _aligned(x_NI) and _aligned(w_EIO)


def _aligned(x: Tensor) -> bool:
    """Whether one of the last two strides is 1, the other one a multiple of 16 bytes, and the address is aligned."""
    rows, columns = x.stride()[-2:]
    wide = rows if columns == 1 else columns
    lengthwise = x.shape[-1] if columns == 1 else x.shape[-2]
    return (
        1 in (rows, columns)
        and wide >= max(1, lengthwise)
        and wide * x.element_size() % _ALIGNMENT == 0
        and x.data_ptr() % _ALIGNMENT == 0
    )


BACKENDS.register("grouped")(GroupedBackend())
