"""Attention over a paged KV cache, and its registration with transformers as ``"moesaic"``.

S sequences · T tokens of this step, of all sequences one after the other · H query heads · d width of a head.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from moesaic.errors import UnsupportedError
from moesaic.experts.native import attention as native

NAME = "moesaic"


@dataclass
class PagedBatch:
    """Which tokens a step computes, and where the keys and values of their sequences lie.

    Attributes:
        tables_SP: int32 ``[S, P]``, the pages of each sequence in order; what follows its last page is not read.
        starts: int32 ``[S + 1]``; rows ``starts[s]`` to ``starts[s + 1] - 1`` of the T tokens are sequence s's.
        contexts: int32 ``[S]``, keys of each sequence, its tokens of this step included (they are the last ones).
        slots_T: int64 ``[T]``, ``page * page_size + offset`` of each token's key.
    """

    tables_SP: Tensor
    starts: Tensor
    contexts: Tensor
    slots_T: Tensor


class AttentionLayer(Protocol):
    """Computes one layer's attention in the place of transformers' own functions."""

    def attend(self, module: nn.Module, query_THd: Tensor, key_THd: Tensor, value_THd: Tensor, how: How) -> Tensor:
        """``[T, H, d]`` queries, ``[T, Hkv, d]`` keys and values of one layer's tokens to ``[T, H, dv]``."""
        ...


@dataclass(frozen=True)
class How:
    """What a layer's attention is like. ``window`` and ``softcap`` are 0 for none; ``sinks`` is ``[H]`` or None."""

    scaling: float
    window: int
    softcap: float
    sinks: Tensor | None


def store(keys_THd: Tensor, values_THd: Tensor, key_pool: Tensor, value_pool: Tensor, slots_T: Tensor) -> None:
    """Write each token's key and value into its slot; shapes as :func:`attend` has them."""
    page_size = value_pool.shape[2]
    pages_T, offsets_T = slots_T // page_size, slots_T % page_size
    key_pool[pages_T, :, :, offsets_T] = keys_THd
    value_pool[pages_T, :, offsets_T] = values_THd


def attend(
    query_THd: Tensor,
    keys_THd: Tensor,
    values_THd: Tensor,
    key_pool: Tensor,
    value_pool: Tensor,
    batch: PagedBatch,
    scaling: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """Store the new keys and values in their pages, then attend causally: ``[T, H, dv]`` in the query's dtype.

    The reference, in float32 and one sequence at a time; ``moesaic.experts.native.attention.attend`` does the same.

    Args:
        query_THd: ``[T, H, dk]``. keys_THd, values_THd: ``[T, Hkv, dk]`` and ``[T, Hkv, dv]``; H a multiple of Hkv.
        key_pool: ``[pages, Hkv, dk, page_size]``. value_pool: ``[pages, Hkv, page_size, dv]``.
        window: a token sees that many keys, itself included; 0: all.
        softcap: scores become ``softcap * tanh(score / softcap)``; 0: they stay.
        sinks: ``[H]``, a score that takes part in each head's softmax and adds nothing (Xiao et al., Efficient
            streaming language models with attention sinks).
    """
    store(keys_THd, values_THd, key_pool, value_pool, batch.slots_T)
    out_THd = query_THd.new_empty(*query_THd.shape[:2], value_pool.shape[3])
    starts, contexts = batch.starts.tolist(), batch.contexts.tolist()
    for index, (context, start, end) in enumerate(zip(contexts, starts[:-1], starts[1:], strict=True)):
        pages = batch.tables_SP[index, : -(-context // value_pool.shape[2])].long()
        keys_HdC = key_pool[pages].permute(1, 2, 0, 3).flatten(2)[..., :context].float()
        values_HCd = value_pool[pages].transpose(0, 1).flatten(1, 2)[:, :context].float()
        scores_HTC = _grouped(query_THd[start:end].float().transpose(0, 1), keys_HdC) * scaling
        if softcap:
            scores_HTC = softcap * torch.tanh(scores_HTC / softcap)
        scores_HTC = scores_HTC.masked_fill_(_hidden(end - start, context, window, query_THd.device), -torch.inf)
        out_THd[start:end] = _grouped(_softmax(scores_HTC, sinks), values_HCd).transpose(0, 1)
    return out_THd


def _grouped(a_HTx: Tensor, b_hxy: Tensor) -> Tensor:
    """``[H, T, y]``: the rows of the heads that share one of ``b`` in one product."""
    rows = a_HTx.unflatten(0, (b_hxy.shape[0], -1)).flatten(1, 2)
    out: Tensor = (rows @ b_hxy).view(*a_HTx.shape[:2], -1)
    return out


def _hidden(num_tokens: int, context: int, window: int, device: torch.device) -> Tensor:
    """``[T, C]``: which keys a token does not see."""
    ahead = torch.arange(context, device=device) - torch.arange(context - num_tokens, context, device=device)[:, None]
    return (ahead > 0) | (ahead <= -window) if window else ahead > 0


def _softmax(scores_HTC: Tensor, sinks: Tensor | None) -> Tensor:
    if sinks is None:
        return scores_HTC.softmax(-1)
    sinks_HT1 = sinks.float()[:, None, None].expand(*scores_HTC.shape[:2], 1)
    return torch.cat([scores_HTC, sinks_HT1], -1).softmax(-1)[..., :-1]


class PagedLayers:
    """The KV cache of a step: each attention module with its pools, and the batch.

    Args:
        pools: attention module to its key and value pool.
    """

    def __init__(self, pools: Mapping[nn.Module, tuple[Tensor, Tensor]], batch: PagedBatch) -> None:
        self.pools = pools
        self.batch = batch

    def attend(self, module: nn.Module, query_THd: Tensor, key_THd: Tensor, value_THd: Tensor, how: How) -> Tensor:
        """See :class:`AttentionLayer`."""
        key_pool, value_pool = self.pools[module]
        run = attend if native.refusal(query_THd, key_pool, value_pool) else native.attend
        return run(
            query_THd,
            key_THd,
            value_THd,
            key_pool,
            value_pool,
            self.batch,
            how.scaling,
            how.window,
            how.softcap,
            how.sinks,
        )


_LAYERS: ContextVar[AttentionLayer | None] = ContextVar("attention layers of the step", default=None)


@contextmanager
def attention_by(layers: AttentionLayer) -> Iterator[None]:
    """Let ``layers`` compute the attention of forward passes inside."""
    token = _LAYERS.set(layers)
    try:
        yield
    finally:
        _LAYERS.reset(token)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function ``"moesaic"``: heads ``[1, H, T, d]`` to ``[1, T, H, dv]``.

    Raises:
        UnsupportedError: outside a step of an engine, or for attention that is not causal or has a bias.
    """
    layers = _LAYERS.get()
    if layers is None:
        raise UnsupportedError(f"attention {NAME!r} works inside moesaic.serve.Engine only: set another one")
    if options.get("position_bias") is not None or attention_mask is not None:
        raise _unsupported(module, "it adds a bias or a mask of its own to the scores")
    if not getattr(module, "is_causal", True) or options.get("is_causal") is False:
        raise _unsupported(module, "it is not causal")
    how = How(
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=sliding_window or 0,
        softcap=softcap or 0.0,
        sinks=s_aux,
    )
    out_THd = layers.attend(module, query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1), how)
    return out_THd.unsqueeze(0), None


def _unsupported(module: nn.Module, reason: str) -> UnsupportedError:
    return UnsupportedError(f"the engine cannot run {type(module).__name__}: {reason}")


# Without a mask function of the same name transformers makes no mask at all, which is what is wanted: masks over the
# tokens of many sequences in a row would be wrong, and their making costs more than a small model's step.
ALL_ATTENTION_FUNCTIONS.register(NAME, attention_forward)
