"""Attention of new tokens over a paged KV cache on the native kernels.

T new tokens · S sequences · P pages of a sequence · H heads · h heads of keys and values · d their width.
"""

from __future__ import annotations

from ctypes import c_int64
from typing import Protocol

import torch
from torch import Tensor

from moesaic.experts.native import library

PAGE_SIZE = 16


class Batch(Protocol):
    """Which tokens belong to which sequence, and where their keys and values lie.

    Attributes:
        tables_SP: int32, the pages of each sequence in order.
        starts: int32 ``[S + 1]``, the first token of each sequence; the last entry is T.
        contexts: int32 ``[S]``, the keys of each sequence, its new tokens' included.
        slots_T: int64, ``page * PAGE_SIZE + place`` for each new token's key; negative for padding.
    """

    tables_SP: Tensor
    starts: Tensor
    contexts: Tensor
    slots_T: Tensor


def refusal(query_THd: Tensor, key_pool: Tensor, value_pool: Tensor) -> str | None:
    """Why :func:`attend` cannot run this call, or None."""
    reason: str | None = library.missing()
    if reason:
        return reason
    tensors = (query_THd, key_pool, value_pool)
    if any(tensor.device.type != "cpu" for tensor in tensors):
        return "it computes on a CPU"
    if query_THd.dtype not in library.FLOATS or any(tensor.dtype != query_THd.dtype for tensor in tensors):
        return "it takes queries and pools of one dtype: float32, bfloat16 or float16"
    if key_pool.shape[3] != PAGE_SIZE:
        return f"it takes pages of {PAGE_SIZE} tokens"
    return None


def attend(
    query_THd: Tensor,
    keys_THd: Tensor,
    values_THd: Tensor,
    key_pool: Tensor,
    value_pool: Tensor,
    batch: Batch,
    scaling: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """Store the new keys and values in their pages, then attend causally; ``[T, H, d]`` contiguous.

    Computed in float32. A row's result depends on its own sequence and position only, bit for bit, however the
    sequence's tokens are spread over calls.

    Args:
        query_THd: ``[T, H, d]``. keys_THd, values_THd: ``[T, h, d]``, where h divides H; the last dimension contiguous.
        key_pool: ``[pages, h, d, PAGE_SIZE]``. value_pool: ``[pages, h, PAGE_SIZE, d]``; contiguous.
        window: keys that a token sees, itself included; 0: all.
        softcap: logits become ``softcap * tanh(logits / softcap)``; 0: they stay.
        sinks: ``[H]``, logits that take part in the softmax without a value.
    """
    tokens, heads, key_width = query_THd.shape
    out_THd = query_THd.new_empty(tokens, heads, value_pool.shape[3])
    query_THd, keys_THd, values_THd = (
        tensor if tensor.stride(2) == 1 else tensor.contiguous() for tensor in (query_THd, keys_THd, values_THd)
    )
    sinks = None if sinks is None else sinks.float().contiguous()
    tables_SP = batch.tables_SP.contiguous()
    library.attend(
        library.Attention(
            tokens,
            heads,
            key_pool.shape[1],
            key_width,
            value_pool.shape[3],
            batch.contexts.shape[0],
            tables_SP.shape[1],
            library.FLOATS[query_THd.dtype],
            torch.get_num_threads(),
            query_THd.data_ptr(),
            keys_THd.data_ptr(),
            values_THd.data_ptr(),
            *((c_int64 * 2)(*tensor.stride()[:2]) for tensor in (query_THd, keys_THd, values_THd)),
            *(each.data_ptr() for each in (batch.slots_T, tables_SP, batch.starts, batch.contexts)),
            None if sinks is None else sinks.data_ptr(),
            key_pool.data_ptr(),
            value_pool.data_ptr(),
            out_THd.data_ptr(),
            window,
            scaling,
            softcap,
        )
    )
    return out_THd
