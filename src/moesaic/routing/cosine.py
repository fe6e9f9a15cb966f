"""Angles in a small space: the cosine between a token's projection and each expert's embedding."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from moesaic.errors import ConfigError
from moesaic.routing.balancing import BALANCERS, LoadBalancing
from moesaic.routing.router import ROUTERS, Router, float32_linear
from moesaic.routing.routing import Routing

# Gate to temperature: where the learned one begins, and the fixed one of the balancing loss (section 4.1).
_TEMPERATURES = {"softmax": 0.3, "sigmoid": 0.07}


@dataclass
class CosineRouting(Routing):
    """With the distribution that the balancer ``cosine_load_balancing`` reads.

    Args:
        fixed_scores: ``[T, E]`` float32, the softmax of the cosines at the gate's fixed temperature.
    """

    fixed_scores: Tensor | None = None

    def detach(self) -> Routing:
        return Routing.detach(replace(self, fixed_scores=None))


@ROUTERS.register("cosine")
class Cosine(Router):
    """Cosine routing, learned temperature (On the Representation Collapse of Sparse Mixture of Experts, section 3.1).

    s_e is the cosine between W·x, a projection to a small space, and an embedding of expert e there (equation 6): no
    expert wins by the length of its embedding, and x is not pulled towards one. The K greatest are taken, and weighted
    by softmax(s/τ) over all experts or by sigmoid(s/τ) (equation 7). The logits are s/τ.

    The paper takes one expert a token. τ is learned here as its logarithm, so that it stays positive; it begins where
    the paper fixes the temperature of its balancing loss, which is the balancer ``cosine_load_balancing``.

    Args:
        width: of the small space; 0 is half the number of experts, as in the paper, but 2 at least, since in one
            dimension a cosine is a sign.
        gate: ``"softmax"`` (τ begins at 0.3) or ``"sigmoid"`` (0.07).
        normalize: divide the K weights by their sum (the paper does not).
    """

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        top_k: int,
        *,
        width: int = 0,
        gate: str = "softmax",
        normalize: bool = False,
    ) -> None:
        super().__init__(d_model, num_experts, top_k)
        if width < 0:
            raise ConfigError(f"width is {width}: it must be at least 1, or 0 for half the number of experts")
        if gate not in _TEMPERATURES:
            raise ConfigError(f"gate is {gate!r}: it must be one of {', '.join(_TEMPERATURES)}")
        self.width, self.gate, self.normalize = width or _width(num_experts), gate, normalize
        self.weight = nn.Parameter(torch.empty(num_experts, self.width))  # the embeddings, in place of a linear gate
        self.projection = nn.Parameter(torch.empty(self.width, d_model))
        self.log_temperature = nn.Parameter(torch.empty(1))
        self.reset_parameters()

    def reset_parameters(self, std: float = 0.02) -> None:
        """Draw the embeddings ``[E, width]`` and the projection ``[width, D]``, and set the temperature back."""
        super().reset_parameters(std)
        if "projection" in self._parameters:  # not there yet while the base class is built
            nn.init.normal_(self.projection, std=std)
            nn.init.constant_(self.log_temperature, math.log(_TEMPERATURES[self.gate]))

    @classmethod
    def options_with_fewer(cls, options: Mapping[str, Any], before: int, keep: int) -> dict[str, Any]:
        return {**options, "width": options.get("width") or _width(before)}

    def cosines(self, x_TD: Tensor) -> Tensor:
        """``[T, E]`` float32, from -1 to 1."""
        token_TX = _unit(float32_linear(x_TD, self.projection))
        return float32_linear(token_TX, _unit(self.weight.float()))

    def logits(self, x_TD: Tensor) -> Tensor:
        """``[T, E]`` float32: the cosines over the temperature."""
        return self._over_temperature(self.cosines(x_TD))

    def forward(self, x_TD: Tensor, top_k: int | None = None) -> Routing:
        cosines_TE = self.cosines(x_TD)
        logits_TE = self._over_temperature(cosines_TE)
        scores_TE = logits_TE.softmax(dim=-1) if self.gate == "softmax" else logits_TE.sigmoid()
        # By the logits: of scores that have reached 1 the greatest would be any of them.
        expert_ids_TK = logits_TE.topk(self.slots(top_k), dim=-1).indices
        weights_TK = scores_TE.gather(1, expert_ids_TK)
        if self.normalize:
            weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True).clamp(min=1e-9)
        fixed_TE = (cosines_TE / _TEMPERATURES[self.gate]).softmax(dim=-1) if self.training else None
        return CosineRouting(expert_ids_TK, weights_TK, scores_TE, logits_TE, fixed_scores=fixed_TE)

    def _over_temperature(self, cosines_TE: Tensor) -> Tensor:
        logits_TE = cosines_TE / self.log_temperature.float().exp()
        return logits_TE if self.logit_shift is None else logits_TE + self.logit_shift


@BALANCERS.register("cosine_load_balancing")
class CosineLoadBalancing(LoadBalancing):
    """``load_balancing`` with P at a fixed temperature (On the Representation Collapse of Sparse MoE, equation 8).

    Else the router could lower the loss by learning a higher temperature. Outside of training it is the plain
    ``load_balancing``.
    """

    def loss(self, routing: Routing, counts_E: Tensor) -> Tensor:
        fixed_TE = routing.fixed_scores if isinstance(routing, CosineRouting) else None
        return super().loss(routing if fixed_TE is None else replace(routing, scores=fixed_TE), counts_E)

    @staticmethod
    def check(router: type[Router]) -> None:
        if not issubclass(router, Cosine):
            raise ConfigError(
                f"the balancer 'cosine_load_balancing' needs the router 'cosine'; {router.__name__} has no cosines"
            )


def _width(num_experts: int) -> int:
    return max(2, num_experts // 2)


def _unit(rows: Tensor) -> Tensor:
    # The floor keeps the gradient of an all but empty row finite.
    return nn.functional.normalize(rows, dim=-1, eps=1e-4)
