"""Learned noise on the logits while training, so that experts near the border get tokens too."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from moesaic.errors import ConfigError
from moesaic.routing.balancing import BALANCERS, Balancer, mean_over_tokens
from moesaic.routing.router import ROUTERS, Router, float32_linear
from moesaic.routing.routing import Routing


@dataclass
class NoisyRouting(Routing):
    """With what the balancer ``load`` needs beside the noisy ``logits``; None where no noise was added.

    Args:
        clean_logits: ``[T, E]`` float32, the logits before the noise.
        noise_std: ``[T, E]`` float32, the noise's standard deviation.
    """

    clean_logits: Tensor | None = None
    noise_std: Tensor | None = None

    def detach(self) -> Routing:
        return Routing.detach(replace(self, clean_logits=None, noise_std=None))


@ROUTERS.register("noisy_topk")
class NoisyTopK(Router):
    """Noisy top-k gating (Outrageously Large Neural Networks: The Sparsely-Gated MoE Layer, equations 3 to 5).

    H = x·W_g + N(0, 1) · softplus(x·W_noise); the K greatest of H, with the softmax over these K as weights. The noise
    is drawn from PyTorch's generator while training only; evaluation takes the K greatest of x·W_g. Scores and logits
    are those of all of H, the noise included.

    Both matrices begin at zero (appendix A), so that nothing but noise decides at first: every expert gets as much.
    The paper balances with ``importance`` and ``load``, each with a coefficient of 0.1 in its language models.
    """

    def __init__(self, d_model: int, num_experts: int, top_k: int) -> None:
        super().__init__(d_model, num_experts, top_k)
        self.noise_weight = nn.Parameter(torch.zeros(num_experts, d_model))

    def reset_parameters(self, std: float = 0.02) -> None:
        """Set both matrices, ``[E, D]``, to zero, whatever ``std`` is."""
        for weight in self.parameters(recurse=False):
            nn.init.zeros_(weight)

    def forward(self, x_TD: Tensor, top_k: int | None = None) -> Routing:
        clean_TE, std_TE = self.logits(x_TD), None
        logits_TE = clean_TE
        if self.training:
            std_TE = nn.functional.softplus(float32_linear(x_TD, self.noise_weight))
            logits_TE = clean_TE + torch.randn_like(clean_TE) * std_TE
        kept_TK, expert_ids_TK = logits_TE.topk(self.slots(top_k), dim=-1)
        routing = (expert_ids_TK, kept_TK.softmax(dim=-1), logits_TE.softmax(dim=-1), logits_TE)
        return NoisyRouting(*routing, clean_logits=clean_TE, noise_std=std_TE)


@BALANCERS.register("importance")
class Importance(Balancer):
    """CV(Importance)² (Outrageously Large Neural Networks, section 4, equations 6 and 7): 0 for even weights.

    Importance is the sum over the tokens of each expert's weight; CV is the standard deviation over the experts,
    divided by the mean. Several ranks each even out their own tokens.
    """

    def loss(self, routing: Routing, counts_E: Tensor) -> Tensor:
        num_experts, weights = routing.num_experts, routing.weights.float().reshape(-1)
        sums = weights.new_zeros(num_experts + 1).index_add(0, routing.expert_ids.reshape(-1), weights)
        return _squared_cv(sums[:num_experts])


@BALANCERS.register("load")
class Load(Balancer):
    """CV(Load)² (Outrageously Large Neural Networks, appendix A, equations 8 to 11): 0 for even numbers of tokens.

    Load is a smooth estimate of each expert's number of tokens: the probability to be among the K greatest of H, were
    its own noise drawn anew and the others' kept. Without noise (evaluation) there is no such estimate, and no loss.
    """

    def loss(self, routing: Routing, counts_E: Tensor) -> Tensor | None:
        if not isinstance(routing, NoisyRouting) or routing.noise_std is None or routing.top_k == routing.num_experts:
            return None  # with K = E every expert gets every token
        assert routing.logits is not None and routing.clean_logits is not None
        values, ids = routing.logits.topk(routing.top_k + 1, dim=-1)
        # The K-th greatest of the others: the next one after the K, for those among the K.
        taken_TE = torch.zeros_like(routing.logits, dtype=torch.bool).scatter(1, ids[:, :-1], True)
        border_TE = torch.where(taken_TE, values[:, -1:], values[:, -2:-1])
        # Where softplus has underflowed nothing is uncertain; dividing by 0 would make a NaN of an exact tie.
        sigmas_TE = (routing.clean_logits - border_TE) / routing.noise_std.clamp(min=1e-6)
        return _squared_cv(mean_over_tokens(torch.special.ndtr(sigmas_TE), routing))

    @staticmethod
    def check(router: type[Router]) -> None:
        if not issubclass(router, NoisyTopK):
            raise ConfigError(f"the balancer 'load' needs the router 'noisy_topk'; {router.__name__} adds no noise")


def _squared_cv(values_E: Tensor) -> Tensor:
    """Variance over the square of the mean; 0 where all are zero."""
    return values_E.var(correction=0) / values_E.mean().square().clamp(min=1e-10)
