"""The kernels on tensors: outputs, grids and arguments. Importing this needs Triton."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from moesaic.experts.activations import ACTIVATIONS
from moesaic.experts.triton import kernels, tuning

_BLOCK = 1024  # columns of an elementwise kernel's program, at most
_BLOCK_ROW = 32


def matmul(
    a: Tensor,
    w_EIO: Tensor,
    bias_EO: Tensor | None,
    permutation: Tensor,
    inverse_TK: Tensor,
    offsets_E: Tensor,
    weights_TK: Tensor | None,
    gather: bool,
    combine: bool,
    activation: str,
) -> Tensor:
    """See :func:`moesaic.experts.triton.ops.matmul`."""
    num_experts, num_inputs, width = w_EIO.shape
    gated = bool(activation) and ACTIVATIONS.get(activation).gated
    width = width // 2 if gated else width
    num_rows, num_slots = permutation.shape[0], inverse_TK.numel()
    if min(num_rows, num_slots, num_inputs, width) == 0:
        return a.new_zeros(inverse_TK.shape[0] if combine else num_rows, width)
    out = a.new_empty(num_slots if combine else num_rows, width)

    def grid(meta: dict[str, Any]) -> tuple[int]:
        # An expert's last tile may be all but empty; the rows that belong to nobody are one expert more.
        row_tiles = num_rows // meta["BLOCK_ROW"] + min(num_experts + 1, num_rows)
        return _programs(a.device, row_tiles * triton.cdiv(width, meta["BLOCK_OUT"]), meta["PROGRAMS"])

    with _device(a):
        tuning.MATMUL[a.element_size()][grid](
            *(a, w_EIO, bias_EO, out, permutation, offsets_E, weights_TK),
            *(num_rows, num_slots, _bucket(num_rows, num_experts)),
            *(*a.stride(), *w_EIO.stride(), *((0, 0) if bias_EO is None else bias_EO.stride())),
            E=num_experts,
            IN=num_inputs,
            OUT=width,
            TOP_K=inverse_TK.shape[1],
            PADDED_E=triton.next_power_of_2(num_experts + 1),
            GATHER=gather,
            SCATTER=combine,
            ACTIVATION=activation,
            GATED=gated,
            PRECISION=_precision(),
        )
    return _sum_slots(out, inverse_TK, num_rows) if combine else out


def _sum_slots(slots: Tensor, inverse_TK: Tensor, num_rows: int) -> Tensor:
    (num_tokens, top_k), width = inverse_TK.shape, slots.shape[1]
    out = slots.new_empty(num_tokens, width)
    block = min(_BLOCK, triton.next_power_of_2(width))
    with _device(slots):
        kernels.sum_slots_kernel[(num_tokens, triton.cdiv(width, block))](
            slots, inverse_TK, out, num_rows, TOP_K=top_k, WIDTH=width, BLOCK=block
        )
    return out


def outer(
    a: Tensor,
    b: Tensor,
    permutation: Tensor,
    offsets_E: Tensor,
    num_slots: int,
    top_k: int,
    gather_a: bool,
    gather_b: bool,
    out_EIO: Tensor,
) -> None:
    """Fill ``out``, of any strides; see :func:`moesaic.experts.triton.ops.outer`."""
    num_experts, num_inputs, num_outputs = out_EIO.shape
    if permutation.shape[0] == 0:
        out_EIO.zero_()
    if 0 in (permutation.shape[0], num_inputs, num_outputs):
        return

    def grid(meta: dict[str, Any]) -> tuple[int]:
        tiles = triton.cdiv(num_inputs, meta["BLOCK_IN"]) * triton.cdiv(num_outputs, meta["BLOCK_OUT"])
        return _programs(a.device, num_experts * tiles, meta["PROGRAMS"])

    with _device(a):
        tuning.OUTER[a.element_size()][grid](
            *(a, b, out_EIO, permutation, offsets_E),
            *(num_slots, _bucket(permutation.shape[0], num_experts)),
            *(*a.stride(), *b.stride(), *out_EIO.stride()),
            E=num_experts,
            IN=num_inputs,
            OUT=num_outputs,
            TOP_K=top_k,
            GATHER_A=gather_a,
            GATHER_B=gather_b,
            PRECISION=_precision(),
        )


def weigh(
    grad_NF: Tensor, h_NF: Tensor, weights_TK: Tensor, permutation: Tensor, offsets_E: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`moesaic.experts.triton.ops.weigh`."""
    num_rows, width = h_NF.shape
    grad_h, weighted, grad_weights = grad_NF.new_empty(num_rows, width), grad_NF.new_empty(num_rows, width), None
    grad_weights = torch.zeros_like(weights_TK, memory_format=torch.contiguous_format)  # null slots have no row
    if num_rows:
        with _device(h_NF):
            kernels.weigh_rows_kernel[(num_rows,)](
                *(grad_NF, h_NF, weights_TK, permutation, offsets_E, grad_h, weighted, grad_weights),
                *(weights_TK.numel(), *h_NF.stride()),
                E=offsets_E.shape[0],
                WIDTH=width,
                BLOCK=min(_BLOCK, triton.next_power_of_2(width)),
            )
    return grad_h, weighted, grad_weights


def sum_rows(
    a: Tensor,
    permutation: Tensor,
    offsets_E: Tensor,
    weights_TK: Tensor | None,
    num_slots: int,
    top_k: int,
    gather: bool,
) -> Tensor:
    """See :func:`moesaic.experts.triton.ops.sum_rows`."""
    num_experts, width = offsets_E.shape[0], a.shape[1]
    if permutation.shape[0] == 0:
        return a.new_zeros(num_experts, width)
    out = a.new_empty(num_experts, width)
    block = min(_BLOCK // _BLOCK_ROW * 2, triton.next_power_of_2(width))
    with _device(a):
        kernels.sum_rows_kernel[(num_experts, triton.cdiv(width, block))](
            *(a, out, permutation, offsets_E, weights_TK, num_slots, *a.stride()),
            TOP_K=top_k,
            WIDTH=width,
            GATHER=gather,
            BLOCK_ROW=_BLOCK_ROW,
            BLOCK=block,
        )
    return out


def _bucket(num_rows: int, num_experts: int) -> int:
    """Rows of an average expert, rounded up to a power of two: what the block sizes are tuned for."""
    return int(triton.next_power_of_2(triton.cdiv(num_rows, num_experts)))


def _precision() -> str:
    """How factors are multiplied; in float32 as PyTorch's own matmuls are set to."""
    if tuning.INTERPRETED:
        return "widened"
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def _programs(device: torch.device, tiles: int, programs: int) -> tuple[int]:
    return (min(tiles, _multiprocessors(device) * programs),)


@cache
def _multiprocessors(device: torch.device) -> int:
    if tuning.INTERPRETED:
        return 3  # so that programs take several tiles, and not equally many
    return torch.cuda.get_device_properties(device).multi_processor_count


def _device(x: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, which another GPU than that of ``x`` may be."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else nullcontext()
