"""Expert capacity: how many rows one expert may take, and who is dropped beyond it."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from moesaic.errors import ConfigError
from moesaic.routing.routing import Routing


def expert_capacity(num_tokens: int, top_k: int, num_experts: int, factor: float) -> int:
    """Rows that one expert may take at capacity factor ``factor``: ``ceil(|factor| · T · K / E)``, at most T · K.

    Tutel: Adaptive Mixture-of-Experts at Scale, dynamic capacity; the sign of the factor is read by
    :func:`limit_capacity` and by the layer.

    Raises:
        ConfigError: for a factor that is not finite.
    """
    if not abs(factor) < math.inf:  # math.isfinite does not compile
        raise ConfigError(f"capacity_factor is {factor}: it must be finite")
    return math.ceil(min(abs(factor) * num_tokens * top_k / num_experts, num_tokens * top_k))


def ffn_factor(factor: float, num_ffn: int, num_zero_computation: int, tau: float = 1.0) -> float:
    """What to give ``expert_capacity(T, K, num_ffn, ...)`` for a feed-forward expert that has others beside it.

    Its capacity is |factor| · T · K · τ / (τ·E + Z) rows, a zero-computation expert's 1 / τ times as many (MoE++,
    its heterogeneous expert capacity, which has no K: there a factor of 1 is room for one choice of every token, here
    for all).
    """
    if not num_zero_computation:
        return factor
    return factor * tau * num_ffn / (tau * num_ffn + num_zero_computation)


def limit_capacity(routing: Routing, factor: float, tau: float = 1.0) -> Routing:
    """Make the slots beyond an expert's capacity null, and count them in ``dropped``.

    First choices go before second ones, and earlier tokens before later ones (GShard, algorithm 1). The weights of a
    token's remaining slots are not changed. ``factor == 0`` is dropless and returns the routing as it came.

    A limit is not causal: the capacity goes by the number of all tokens, and later tokens' first choices push out
    earlier ones' second choices. Text that is written token by token so takes other slots than the same text read at
    once.

    Args:
        routing: for T tokens, K slots, E experts; slots that are null already take no capacity.
        factor: ``> 0`` and ``< 0`` limit alike here; only the former also pads (see ``Dispatch.from_routing``).
        tau: where ``routing.num_ffn`` says that there are zero-computation experts, the capacity of a feed-forward
            expert divided by theirs.
    """
    if factor == 0:
        return routing
    num_tokens, top_k = routing.expert_ids.shape
    num_ffn = routing.num_experts if routing.num_ffn is None else routing.num_ffn
    place_TK = position_in_expert(routing.expert_ids, routing.counts())
    own = ffn_factor(factor, num_ffn, routing.num_experts - num_ffn, tau)
    over_TK = place_TK >= expert_capacity(num_tokens, top_k, num_ffn, own)
    if num_ffn < routing.num_experts:
        theirs = place_TK >= expert_capacity(num_tokens, top_k, num_ffn, own / tau)
        over_TK = torch.where(routing.expert_ids < num_ffn, over_TK, theirs)
    over_TK &= routing.expert_ids < routing.num_experts
    return replace(routing.without(over_TK), dropped=over_TK.sum())


def position_in_expert(expert_ids_TK: Tensor, counts_E: Tensor) -> Tensor:
    """``[T, K]`` int64: the place of each slot in its expert's queue, all first choices before all second ones."""
    num_tokens, top_k = expert_ids_TK.shape
    ids = expert_ids_TK.t().reshape(-1)
    ends = torch.cat([counts_E.cumsum(0), ids.new_full((1,), ids.numel())])
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    ordered, order = torch.sort(ids, stable=True)
    rank = torch.arange(ids.numel(), device=ids.device) - starts[ordered.clamp(max=counts_E.numel())]
    return torch.empty_like(rank).scatter_(0, order, rank).view(top_k, num_tokens).t()
