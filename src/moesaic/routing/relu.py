"""ReLU decides which experts, and how many; RMSNorm decides with which weight."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from moesaic.errors import ConfigError
from moesaic.routing.router import ROUTERS, Router
from moesaic.routing.routing import Routing

_EPS = 1e-5


@ROUTERS.register("relu")
class ReLURouter(Router):
    """Every expert with a positive logit (BlockFFN, the section on its architecture, equations of the router).

    ``A = ReLU(W x)`` and the weights are ``RMSNorm(A)``, with a learned ``gain`` for each expert. The choice itself is
    differentiable, as a weight comes up from zero; a token takes as many experts as it has positive logits, possibly
    none. ``top_k`` is the most that it may take: the paper has no such limit, which is ``top_k = num_experts``; with
    fewer it takes those with the highest logits, and the normalization is still that of all. The scores are the
    shares of A, as in the paper's loss for chunks. See the balancers ``activation_locality`` and ``chunk_sparsity``.

    Args:
        eps: added to the mean square in the normalization.
    """

    is_adaptive: ClassVar[bool] = True

    def __init__(self, d_model: int, num_experts: int, top_k: int, *, eps: float = _EPS) -> None:
        if eps <= 0:
            raise ConfigError(f"eps is {eps}: it must be above 0")
        super().__init__(d_model, num_experts, top_k)
        self.eps = eps
        self.gain = nn.Parameter(torch.ones(num_experts))

    def reset_parameters(self, std: float = 0.02) -> None:
        """Draw the gate's weight, and set the gains to 1."""
        super().reset_parameters(std)
        if "gain" in self._parameters:  # not there yet while the base class is built
            nn.init.ones_(self.gain)

    @classmethod
    def options_with_fewer(cls, options: Mapping[str, Any], before: int, keep: int) -> dict[str, Any]:
        """The mean square is taken over ``keep`` logits instead of ``before``, of which those that went are zeros."""
        return {**options, "eps": options.get("eps", _EPS) * before / keep}

    @classmethod
    def factor_with_fewer(cls, parameter: str, before: int, keep: int) -> float:
        return math.sqrt(before / keep) if parameter == "gain" else 1.0

    def forward(self, x_TD: Tensor, top_k: int | None = None) -> Routing:
        logits_TE = self.logits(x_TD)
        active_TE = logits_TE.relu()
        root_T1 = (active_TE.square().mean(dim=-1, keepdim=True) + self.eps).rsqrt()
        weights_TE = active_TE * root_T1 * self.gain.float()
        expert_ids_TK = logits_TE.detach().topk(self.slots(top_k), dim=-1).indices
        scores_TE = active_TE / (active_TE.sum(dim=-1, keepdim=True) + self.eps)
        routing = Routing(expert_ids_TK, weights_TE.gather(1, expert_ids_TK), scores_TE, logits_TE)
        return routing.without(active_TE.gather(1, expert_ids_TK) == 0)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, eps={self.eps}"
