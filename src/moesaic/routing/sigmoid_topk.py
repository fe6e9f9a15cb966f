"""Independent sigmoid scores, a selection bias, and groups of experts: the DeepSeek-V3 kind."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from moesaic.errors import ConfigError
from moesaic.routing.gate import Gate
from moesaic.routing.router import ROUTERS, Router
from moesaic.routing.routing import Routing


@ROUTERS.register("sigmoid_topk")
class SigmoidTopK(Router):
    """Top-k routing of sigmoid scores (DeepSeek-V3 Technical Report, section 2.1.2, equations 12 to 16).

    The bias takes part in the selection only; the weights are the unbiased scores. Groups limit a token to the experts
    of its ``top_groups`` best groups, a group being worth the sum of its two best biased scores. Experts outside those
    groups are excluded for certain (biased score minus infinity; some published code sets 0 there, which lets
    an excluded expert win over one whose biased score is negative).

    Args:
        normalize: divide the K weights by their sum.
        scale: factor on the weights after normalization (``routed_scaling_factor``).
        num_groups: number of equal groups of experts; must divide the number of experts.
        top_groups: how many groups a token may choose from; 1..num_groups.

    Its buffer ``selection_bias`` (``[E]``, float32) is moved by the balancer ``bias_update``.
    """

    has_selection_bias = True
    selection_bias: Tensor

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        top_k: int,
        *,
        normalize: bool = True,
        scale: float = 1.0,
        num_groups: int = 1,
        top_groups: int = 1,
    ) -> None:
        super().__init__(d_model, num_experts, top_k)
        if num_groups < 1 or num_experts % num_groups:
            raise ConfigError(f"num_groups is {num_groups}: it must divide num_experts = {num_experts}")
        if not 1 <= top_groups <= num_groups:
            raise ConfigError(
                f"top_groups is {top_groups}: it must be at least 1 and at most num_groups = {num_groups}"
            )
        self.normalize, self.scale = normalize, scale
        self.num_groups, self.top_groups = num_groups, top_groups
        self.register_buffer("selection_bias", torch.zeros(num_experts, dtype=torch.float32))
        self.slots(top_k)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SigmoidTopK:
        """``to``, ``cuda``, ``bfloat16``, ...: the bias changes device, but stays float32: its steps are small."""
        bias = self.selection_bias
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        device = self.selection_bias.device
        # From the meta device (to_empty) there are no values to take along.
        self.selection_bias = torch.empty_like(bias, device=device) if bias.is_meta else bias.to(device)
        return self

    def reset_parameters(self, std: float = 0.02) -> None:
        """Draw the gate's weight, and forget the selection bias."""
        super().reset_parameters(std)
        bias = self._buffers.get("selection_bias")  # not there yet while the base class is built
        if bias is not None:
            nn.init.zeros_(bias)

    @classmethod
    def choice_groups(cls, options: Mapping[str, Any]) -> int:
        groups: int = options.get("num_groups", 1)
        return groups if options.get("top_groups", 1) < groups else 1

    @classmethod
    def options_with_fewer(cls, options: Mapping[str, Any], before: int, keep: int) -> dict[str, Any]:
        """Without groups, where all are open to a token: the experts that stay need not divide into them."""
        is_open = "num_groups" in options and cls.choice_groups(options) == 1
        return {**options, **({"num_groups": 1, "top_groups": 1} if is_open else {})}

    def slots(self, top_k: int | None) -> int:
        top_k = super().slots(top_k)
        reachable = self.num_experts // self.num_groups * self.top_groups
        if top_k > reachable:
            raise ConfigError(
                f"top_k is {top_k}, but top_groups = {self.top_groups} leave {reachable} experts to choose"
            )
        return top_k

    def forward(self, x_TD: Tensor, top_k: int | None = None) -> Routing:
        top_k = self.slots(top_k)
        logits_TE = self.logits(x_TD)
        scores_TE = logits_TE.sigmoid()
        with torch.no_grad():
            choice_TE = self._outside_groups_excluded(scores_TE + self.selection_bias)
            expert_ids_TK = choice_TE.topk(top_k, dim=-1).indices
        weights_TK = scores_TE.gather(1, expert_ids_TK)
        if self.normalize:
            weights_TK = weights_TK / (weights_TK.sum(dim=-1, keepdim=True) + 1e-20)
        return Routing(expert_ids_TK, weights_TK * self.scale, scores_TE, logits_TE)

    def linear_gate(self) -> Gate | None:
        if self.top_groups < self.num_groups:
            return None
        rule = Gate("sigmoid", self.weight, selection=self.selection_bias, epsilon=1e-20)
        return rule._replace(normalize=self.normalize, scale=self.scale)

    def _outside_groups_excluded(self, choice_TE: Tensor) -> Tensor:
        if self.top_groups == self.num_groups:
            return choice_TE
        grouped = choice_TE.view(-1, self.num_groups, self.num_experts // self.num_groups)
        worth = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(dim=-1)
        chosen = torch.zeros_like(worth, dtype=torch.bool)
        chosen.scatter_(1, worth.topk(self.top_groups, dim=-1).indices, True)
        return grouped.masked_fill(~chosen.unsqueeze(-1), float("-inf")).flatten(1)
