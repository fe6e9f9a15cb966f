"""As many experts as it takes to be sure: those of highest probability until their sum reaches a threshold."""

from __future__ import annotations

import torch
from torch import Tensor

from moesaic.errors import ConfigError
from moesaic.routing.balancing import BALANCERS, Balancer, mean_over_tokens
from moesaic.routing.router import ROUTERS, Router
from moesaic.routing.routing import Routing


@ROUTERS.register("top_p")
class TopP(Router):
    """Top-p routing (Harder Tasks Need More Experts: Dynamic Routing in MoE Models, section 3.2).

    P is the softmax of the logits. A token takes the fewest experts, in order of P, whose P sum to ``threshold`` at
    least; their weights are their P. ``top_k`` is the most that it may take, where the paper has no such limit: a token
    that would need more keeps its ``top_k`` best. Unused slots are null, so a token costs what it takes.

    Left alone, training makes P even, because more experts predict better: the paper adds the balancer ``entropy``
    with the coefficient 1e-4, and ``load_balancing`` with 1e-2 (section 3.3).

    Args:
        threshold: p, above 0 and at most 1; the paper's 0.4 takes 1.8 of 16 experts after training.
        normalize: divide the weights by their sum (the paper does not).
    """

    is_adaptive = True

    def __init__(
        self, d_model: int, num_experts: int, top_k: int, *, threshold: float = 0.4, normalize: bool = False
    ) -> None:
        super().__init__(d_model, num_experts, top_k)
        if not 0 < threshold <= 1:
            raise ConfigError(f"threshold is {threshold}: it must be above 0 and at most 1")
        self.threshold, self.normalize = threshold, normalize

    def forward(self, x_TD: Tensor, top_k: int | None = None) -> Routing:
        logits_TE = self.logits(x_TD)
        scores_TE = logits_TE.softmax(dim=-1)
        weights_TK, expert_ids_TK = scores_TE.topk(self.slots(top_k), dim=-1)
        with torch.no_grad():
            # A slot is needed where those before it do not reach the threshold; the first one always is.
            reached_TK = weights_TK.cumsum(dim=-1).roll(1, dims=-1) >= self.threshold
            reached_TK[:, 0] = False
        routing = Routing(expert_ids_TK, weights_TK, scores_TE, logits_TE).without(reached_TK)
        if self.normalize:
            routing.weights = routing.weights / routing.weights.sum(dim=-1, keepdim=True)
        return routing


@BALANCERS.register("entropy")
class Entropy(Balancer):
    """Mean over the tokens of −Σ_e P_e · log P_e (Harder Tasks Need More Experts, section 3.3: the dynamic loss).

    In nats: 0 for a router that is certain, log E for one that knows nothing. Scores that do not sum to 1 over the
    experts are normalized per token first.
    """

    def loss(self, routing: Routing, counts_E: Tensor) -> Tensor:
        share_TE = routing.scores / routing.scores.sum(dim=-1, keepdim=True).clamp(min=1e-9)
        # Below the smallest float's logarithm there is nothing to gain, and the gradient of 0 · log 0 is infinite.
        log_TE = share_TE.clamp(min=torch.finfo(share_TE.dtype).tiny).log()
        return mean_over_tokens(-(share_TE * log_TE).sum(dim=-1, keepdim=True), routing).squeeze()
