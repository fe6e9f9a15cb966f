"""Experts choose their tokens, not tokens their experts: an even load without any loss, but not causal."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moesaic.errors import ConfigError
from moesaic.routing.context import RoutingContext
from moesaic.routing.router import ROUTERS, Router
from moesaic.routing.routing import Routing


@ROUTERS.register("expert_choice")
class ExpertChoice(Router):
    """Expert choice routing (Mixture-of-Experts with Expert Choice Routing, section 3.2).

    S is the softmax of the logits over the experts. Each expert takes the ``ceil(capacity_factor · T / E)`` tokens of
    the batch with its greatest S, which are the weights too. So every expert has the same load, and a token as many
    experts as chose it: none, or all of them.

    A token's slots are ``top_k``, the rest of them null: with ``top_k`` = E nothing is lost, with less a token that
    more experts chose keeps its ``top_k`` best. (The paper's variant with such a limit, section 3.3, solves a linear
    program instead, after which experts have the same load still.)

    It is not causal: whether a token is chosen depends on all the others of the batch, later ones too. Training and
    evaluation so see what will not be there when text is generated, which is refused. After
    :func:`moesaic.parallelize` experts choose among each rank's tokens for themselves.

    Args:
        capacity_factor: c, the experts that a token gets on average.
    """

    reads_context = True
    is_adaptive = True
    is_causal = False

    def __init__(self, d_model: int, num_experts: int, top_k: int, *, capacity_factor: float = 2.0) -> None:
        super().__init__(d_model, num_experts, top_k)
        if capacity_factor <= 0:
            raise ConfigError(f"capacity_factor of router 'expert_choice' is {capacity_factor}: it must be above 0")
        self.capacity_factor = capacity_factor

    def forward(self, x_TD: Tensor, top_k: int | None = None, context: RoutingContext | None = None) -> Routing:
        top_k, mask_T = self.slots(top_k), None if context is None else context.token_mask
        logits_TE = self.logits(x_TD)
        scores_TE = logits_TE.softmax(dim=-1)
        with torch.no_grad():
            chosen_TE = self._chosen(scores_TE, mask_T)
            best_TK = torch.where(chosen_TE, scores_TE, -1.0).topk(top_k, dim=-1)
        routing = Routing(best_TK.indices, scores_TE.gather(1, best_TK.indices), scores_TE, logits_TE)
        return routing.without(best_TK.values < 0)

    def _chosen(self, scores_TE: Tensor, mask_T: Tensor | None) -> Tensor:
        """``[T, E]`` boolean: which experts chose which tokens; padding is neither chosen nor counted."""
        factor, num_experts = self.capacity_factor, self.num_experts
        most = min(math.ceil(factor * scores_TE.shape[0] / num_experts), scores_TE.shape[0])
        wishes_TE = scores_TE if mask_T is None else torch.where(mask_T.unsqueeze(1), scores_TE, -1.0)
        ids_CE = wishes_TE.topk(most, dim=0).indices
        wanted_CE = torch.ones_like(ids_CE, dtype=torch.bool)
        if mask_T is not None:  # how many tokens are no padding stays a tensor: no shape depends on it
            tokens = mask_T.sum()
            capacity = torch.minimum((factor * tokens.double() / num_experts).ceil(), tokens)
            wanted_CE &= torch.arange(most, device=tokens.device).unsqueeze(1) < capacity
        return torch.zeros_like(scores_TE, dtype=torch.bool).scatter(0, ids_CE, wanted_CE)
