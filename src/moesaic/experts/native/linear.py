"""A linear layer on the native kernels: what the experts' products are, for one matrix.

T tokens · I inputs · O outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moesaic.experts.native import library


def refusal(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> str | None:
    """Why :func:`linear` cannot run this call, or None."""
    reason: str | None = library.missing()
    if reason:
        return reason
    tensors = [x, weight] if bias is None else [x, weight, bias]
    if any(tensor.device.type != "cpu" for tensor in tensors):
        return "it computes on a CPU"
    if x.dtype not in library.FLOATS or any(tensor.dtype != x.dtype for tensor in tensors):
        return "it takes features, weight and bias of one dtype: float32, bfloat16 or float16"
    if weight.ndim != 2 or 1 not in weight.stride():
        return "neither the inputs nor the outputs of the weight are contiguous"
    return None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, row_invariant: bool = False) -> Tensor:
    """``[..., I]`` to ``[..., O]``: ``x @ weight.T + bias``, without gradients; accumulated in float32.

    Args:
        x: float32, bfloat16 or float16. weight: ``[O, I]``, in either memory order, and bias ``[O]`` in the same dtype.
        row_invariant: give every row the same bits whatever other rows there are.
    """
    x_TI = x.reshape(-1, x.shape[-1])
    if x_TI.stride(1) != 1:
        x_TI = x_TI.contiguous()
    bias = bias if bias is None else bias.contiguous()
    outputs, inputs = weight.shape
    out_TO = x.new_empty(x_TI.shape[0], outputs)
    dtype = library.FLOATS[x.dtype]
    # The stride of a dimension of size 1 may be anything: exactly one of the two has to be 1.
    out_stride, in_stride = weight.stride() if weight.stride(1) == 1 or weight.stride(0) != 1 else (1, weight.stride(1))
    library.linear(
        library.Linear(
            x_TI.shape[0],
            inputs,
            outputs,
            dtype,
            torch.get_num_threads(),
            x_TI.data_ptr(),
            x_TI.stride(0),
            library.Matrix(
                weight.data_ptr(),
                None,
                None if bias is None else bias.data_ptr(),
                0,
                out_stride,
                in_stride,
                dtype,
                0,
            ),
            out_TO.data_ptr(),
            row_invariant,
        )
    )
    return out_TO.view(*x.shape[:-1], outputs)
