"""Softmax over all experts, then the K most probable ones."""

from __future__ import annotations

from torch import Tensor

from moesaic.routing.gate import Gate
from moesaic.routing.router import ROUTERS, Router
from moesaic.routing.routing import Routing


@ROUTERS.register("softmax_topk")
class SoftmaxTopK(Router):
    """Top-k routing after a softmax over all experts (Switch Transformers, section 2.1, with k > 1 as in GShard).

    Args:
        normalize: divide the K weights by their sum, so that they sum to 1 (Mixtral, Qwen3-MoE with
            ``norm_topk_prob``); without it they keep their share of the whole distribution (OLMoE).
    """

    def __init__(self, d_model: int, num_experts: int, top_k: int, *, normalize: bool = True) -> None:
        super().__init__(d_model, num_experts, top_k)
        self.normalize = normalize

    def forward(self, x_TD: Tensor, top_k: int | None = None) -> Routing:
        logits_TE = self.logits(x_TD)
        scores_TE = logits_TE.softmax(dim=-1)
        weights_TK, expert_ids_TK = scores_TE.topk(self.slots(top_k), dim=-1)
        if self.normalize:
            weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
        return Routing(expert_ids_TK, weights_TK, scores_TE, logits_TE)

    def linear_gate(self) -> Gate:
        return Gate("softmax", self.weight, normalize=self.normalize)
