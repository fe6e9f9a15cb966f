"""Null experts in the choice: a token takes as many true experts as it needs, at most K."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from moesaic.routing.balancing import BALANCERS, LoadBalancing
from moesaic.routing.router import ROUTERS, Router
from moesaic.routing.routing import Routing


@ROUTERS.register("null_experts")
class NullExperts(Router):
    """Top-k routing over true and null experts, weighted over the true ones only (AdaMoE: Token-Adaptive
    Routing with Null Experts for Mixture-of-Experts Language Models, its null experts).

    A softmax over all E + M columns, of which the last M are null experts; the K most probable are taken, K being
    raised so that the true experts among them are on average as many as before. A token's weights are the
    probabilities of its true experts divided by their sum; a token that took none keeps what its residual holds.

    The null experts are the layer's zero-computation experts, of which ``{"zero": M}`` are the paper's:
    ``MoEConfig(router="null_experts", zero_computation_experts={"zero": 8}, top_k=4, ...)``. Without any, this is
    ``softmax_topk``. Their balancing loss is ``null_load_balancing``.
    """

    is_adaptive: ClassVar[bool] = True

    def forward(self, x_TD: Tensor, top_k: int | None = None) -> Routing:
        logits_TE = self.logits(x_TD)
        scores_TE = logits_TE.softmax(dim=-1)
        share_TK, expert_ids_TK = scores_TE.topk(self.slots(top_k), dim=-1)
        true_experts = self.num_experts if self.num_ffn is None else self.num_ffn
        share_TK = share_TK.masked_fill(expert_ids_TK >= true_experts, 0.0)
        # The least normal number: a token without a true expert divides 0 by it.
        weights_TK = share_TK / share_TK.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(share_TK.dtype).tiny)
        return Routing(expert_ids_TK, weights_TK, scores_TE, logits_TE, num_ffn=self.num_ffn)


@BALANCERS.register("null_load_balancing")
class NullLoadBalancing(LoadBalancing):
    """The load-balancing loss with the load of the null experts averaged (AdaMoE, its load-balancing loss).

    (E + M) · Σ_e f̃_e · P_e, where f̃_e is f_e for a true expert, and for a null expert the mean of all null experts' f:
    which of them a token takes does not matter, so only their use altogether is balanced. Where the load is even,
    M·K / (E + M) of a token's slots are null on average. f is a share of the slots, so that an even load gives 1; a
    share of the tokens, as in the published code, gives K times as much. (That code means to average too, but slices
    the axis of the slots, which leaves f as it was; here it is as the paper says.)

    Zero-computation experts of any kind count as null.
    """

    def loss(self, routing: Routing, counts_E: Tensor) -> Tensor:
        first = routing.num_experts if routing.num_ffn is None else routing.num_ffn
        null_counts = counts_E[first:].float()
        if null_counts.numel():
            counts_E = torch.cat([counts_E[:first].float(), null_counts.mean().expand_as(null_counts)])
        return super().loss(routing, counts_E)
