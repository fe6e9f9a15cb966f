"""The gate of MoE++: a layer's logits are added to by those of the layer before; its loss for experts of two kinds."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from moesaic.errors import ConfigError
from moesaic.routing.balancing import BALANCERS, Balancer, mean_over_tokens, shares
from moesaic.routing.context import RoutingContext
from moesaic.routing.router import ROUTERS, Router, float32_linear
from moesaic.routing.routing import Routing


@ROUTERS.register("gating_residual")
class GatingResidual(Router):
    """The pathway-aware router (MoE++: Accelerating Mixture-of-Experts Methods with Zero-Computation Experts, its
    gating residuals): G_l(x) = W·x + W_g·G_{l-1}, G_0 being nothing.

    Softmax over all columns, then the K most probable. Parameters: ``weight`` (W, ``[E, D]``) and ``residual`` (W_g,
    ``[E, E]``; without effect in the first MoE layer, which has nothing before it), E being all columns.

    Args:
        normalize: divide the K weights by their sum, as ``softmax_topk`` does. The paper's equation does not; the
            published code does, over the weights that are not the zero expert's.
    """

    reads_context: ClassVar[bool] = True

    def __init__(self, d_model: int, num_experts: int, top_k: int, *, normalize: bool = True) -> None:
        super().__init__(d_model, num_experts, top_k)
        self.normalize = normalize
        self.residual = nn.Parameter(torch.empty(num_experts, num_experts))
        nn.init.normal_(self.residual, std=0.02)

    def reset_parameters(self, std: float = 0.02) -> None:
        """Draw both weights from a normal distribution."""
        super().reset_parameters(std)
        if "residual" in self._parameters:  # not there yet while the base class is built
            nn.init.normal_(self.residual, std=std)

    def forward(self, x_TD: Tensor, top_k: int | None = None, context: RoutingContext | None = None) -> Routing:
        logits_TE = self.logits(x_TD)
        before_TE = context.carried if context is not None else None
        if before_TE is None and torch.is_grad_enabled():
            before_TE = torch.zeros_like(logits_TE)  # so that W_g has a gradient, be it 0: ranks average it
        if before_TE is not None:
            logits_TE = logits_TE + self._residual(before_TE, x_TD.shape[0])
        scores_TE = logits_TE.softmax(dim=-1)
        weights_TK, expert_ids_TK = scores_TE.topk(self.slots(top_k), dim=-1)
        if self.normalize:
            weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
        return Routing(expert_ids_TK, weights_TK, scores_TE, logits_TE, carry=logits_TE)

    def _residual(self, carried_TE: Tensor, num_tokens: int) -> Tensor:
        if carried_TE.shape != (num_tokens, self.num_experts):
            raise ConfigError(
                f"the layer before left {list(carried_TE.shape)}, but this gating residual takes the logits of "
                f"{num_tokens} tokens for {self.num_experts} experts"
            )
        return float32_linear(carried_TE, self.residual)


@BALANCERS.register("heterogeneous_load_balancing")
class HeterogeneousLoadBalancing(Balancer):
    """E · Σ_e η_e · f_e · P_e, η being 1 for feed-forward and τ for zero-computation experts (MoE++, its
    heterogeneous load balance loss).

    Below 1, τ lets more tokens go to the experts that cost nothing. With τ = 1 this is ``load_balancing``. f is a share
    of the slots and E, the number of all columns, goes before the sum, so that an even load gives 1 (τ = 1); the
    paper's f is a share of the tokens, and nothing goes before the sum: E / K times less. It works with any router
    that has scores.

    Args:
        tau: τ; the paper takes 0.75.
    """

    def __init__(self, *, tau: float = 0.75) -> None:
        super().__init__()
        if not tau > 0:
            raise ConfigError(f"tau is {tau}: it must be above 0")
        self.tau = tau

    def loss(self, routing: Routing, counts_E: Tensor) -> Tensor:
        fraction_E = counts_E / counts_E.sum().clamp(min=1)
        terms_E = fraction_E * mean_over_tokens(shares(routing.scores), routing)
        first = routing.num_experts if routing.num_ffn is None else routing.num_ffn
        return routing.num_experts * (terms_E[:first].sum() + self.tau * terms_E[first:].sum())
