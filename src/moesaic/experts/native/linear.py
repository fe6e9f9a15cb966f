"""Linear layers on the native kernels: what the experts' products are, for one matrix or for one a group of rows.

T tokens · N rows in groups · G groups · I inputs · O outputs.
"""

from __future__ import annotations

from ctypes import addressof, c_int32

import torch
from torch import Tensor

from moesaic.experts.native import library


def refusal(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> str | None:
    """Why :func:`linear` (``weight`` ``[O, I]``) or :func:`grouped_linear` (``[G, O, I]``) cannot run, or None."""
    reason: str | None = library.missing()
    if reason:
        return reason
    tensors = [x, weight] if bias is None else [x, weight, bias]
    if any(tensor.device.type != "cpu" for tensor in tensors):
        return "it computes on a CPU"
    if x.dtype not in library.FLOATS or any(tensor.dtype != x.dtype for tensor in tensors):
        return "it takes features, weight and bias of one dtype: float32, bfloat16 or float16"
    if weight.ndim not in (2, 3) or 1 not in weight.stride()[-2:]:
        return "neither the inputs nor the outputs of the weight are contiguous"
    return None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, row_invariant: bool = False) -> Tensor:
    """``[..., I]`` to ``[..., O]``: ``x @ weight.T + bias``, without gradients; accumulated in float32.

    Args:
        x: float32, bfloat16 or float16. weight: ``[O, I]``, in either memory order, and bias ``[O]`` in the same dtype.
        row_invariant: give every row the same bits whatever other rows there are.
    """
    x_TI = _rows(x.reshape(-1, x.shape[-1]))
    out_TO = x.new_empty(x_TI.shape[0], weight.shape[0])
    all_rows = c_int32(x_TI.shape[0])
    _run(x_TI, weight[None], bias, addressof(all_rows), out_TO, row_invariant)
    return out_TO.view(*x.shape[:-1], weight.shape[0])


def grouped_linear(x_NI: Tensor, weight_GOI: Tensor, offsets_G: Tensor, *, row_invariant: bool = False) -> Tensor:
    """``[N, I]`` to ``[N, O]``: each row by its group's weight; as :func:`linear`, all groups in one call.

    Args:
        offsets_G: int32, the row that follows each group's last one. Rows behind all groups are zeros.
    """
    rows, used = x_NI.shape[0], int(offsets_G[-1]) if len(offsets_G) else 0
    out_NO = x_NI.new_empty(rows, weight_GOI.shape[1])
    out_NO[used:] = 0
    offsets_G = offsets_G.contiguous()
    _run(_rows(x_NI), weight_GOI, None, offsets_G.data_ptr(), out_NO, row_invariant)
    return out_NO


def _rows(x_TI: Tensor) -> Tensor:
    return x_TI if x_TI.stride(1) == 1 else x_TI.contiguous()


def _run(
    x_TI: Tensor, weight_GOI: Tensor, bias: Tensor | None, offsets: int, out_TO: Tensor, row_invariant: bool
) -> None:
    bias = bias if bias is None else bias.contiguous()
    groups, outputs, inputs = weight_GOI.shape
    group_stride, out_stride, in_stride = weight_GOI.stride()
    # The stride of a dimension of size 1 may be anything: exactly one of the two has to be 1.
    if in_stride != 1:
        out_stride = 1
    dtype = library.FLOATS[x_TI.dtype]
    library.linear(
        library.Linear(
            x_TI.shape[0],
            inputs,
            outputs,
            groups,
            dtype,
            torch.get_num_threads(),
            x_TI.data_ptr(),
            x_TI.stride(0),
            offsets,
            library.Matrix(
                weight_GOI.data_ptr(),
                None,
                None if bias is None else bias.data_ptr(),
                group_stride,
                out_stride,
                in_stride,
                dtype,
                0,
            ),
            out_TO.data_ptr(),
            row_invariant,
        )
    )
