"""Top-k whose weights begin at exactly 1: the router of a dense feed-forward that was cut into experts."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moesaic.routing.gate import Gate
from moesaic.routing.router import ROUTERS, Router
from moesaic.routing.routing import Routing


@ROUTERS.register("unit_topk")
class UnitTopK(Router):
    """The K largest of ``W x + b``, each with weight 1 at first, so that all E experts together are their plain sum.

    A feed-forward is the sum of its hidden neurons. Cut into experts it is the sum of the experts, each with weight 1:
    weights that sum to 1, as those of ``softmax_topk``, would shrink it. What is learned from there on is up to
    ``straight_through``:

    * without it the weight is ``1 + scale[e] * (2 sigmoid(logit) - 1)``, with a learned ``scale`` for each expert that
      begins at 0. CMoE's published code (Carved Mixture-of-Experts: dense feed-forwards carved into experts) weighs by
      ``1 + softmax(score) * scale``; here experts do not compete, and the score is centred;
    * with it the weight stays 1, and the gradient is that of ``sigmoid(logit)``: the straight-through estimator
      (Estimating or Propagating Gradients Through Stochastic Neurons for Conditional Computation).

    Parameters: ``weight`` (W, ``[E, D]``), ``bias`` (b, ``[E]``, in the logits, 0 at first) and, without
    ``straight_through``, ``scale`` (``[E]``). The scores are ``sigmoid(logit)``.

    Args:
        straight_through: keep every weight at 1, and pass gradients to the logits all the same.
    """

    def __init__(self, d_model: int, num_experts: int, top_k: int, *, straight_through: bool = False) -> None:
        super().__init__(d_model, num_experts, top_k)
        self.straight_through = straight_through
        self.bias = nn.Parameter(torch.zeros(num_experts))
        self.scale = None if straight_through else nn.Parameter(torch.zeros(num_experts))

    def reset_parameters(self, std: float = 0.02) -> None:
        """Draw the gate's weight; set biases and scales to 0."""
        super().reset_parameters(std)
        for name in ("bias", "scale"):
            parameter = self._parameters.get(name)
            if parameter is not None:  # not there yet while the base class is built
                nn.init.zeros_(parameter)

    def logits(self, x_TD: Tensor) -> Tensor:
        """``[T, E]`` float32: ``W x + b``."""
        return super().logits(x_TD) + self.bias.float()

    def forward(self, x_TD: Tensor, top_k: int | None = None) -> Routing:
        logits_TE = self.logits(x_TD)
        scores_TE = logits_TE.sigmoid()
        expert_ids_TK = logits_TE.detach().topk(self.slots(top_k), dim=-1).indices
        chosen_TK = scores_TE.gather(1, expert_ids_TK)
        if self.scale is None:
            weights_TK = 1 + (chosen_TK - chosen_TK.detach())
        else:
            weights_TK = 1 + self.scale.float()[expert_ids_TK] * (2 * chosen_TK - 1)
        return Routing(expert_ids_TK, weights_TK, scores_TE, logits_TE)

    def linear_gate(self) -> Gate | None:
        return None if self.scale is None else Gate("sigmoid", self.weight, self.bias, unit_scale=self.scale)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, straight_through={self.straight_through}"
