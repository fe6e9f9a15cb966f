"""Top-k routing without the experts that matter little beside a token's best one."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from moesaic.errors import ConfigError
from moesaic.routing.router import ROUTERS, Router
from moesaic.routing.routing import Routing


@ROUTERS.register("expert_skipping")
class ExpertSkipping(Router):
    """Softmax top-k, less the slots whose probability is below ``ratio`` times the token's greatest (Not All Experts
    are Equal: Efficient Expert Pruning and Skipping for Mixture-of-Experts Large Language Models, the section on
    dynamic expert skipping).

    It needs no training: it is for models that were trained with top-k routing, by :func:`moesaic.reroute`. The paper
    has two slots, and as ratio the median of the two probabilities' over some text, a number for each layer; here there
    are any number of slots, each compared with the first, and one ratio. ``top_k`` is the most that a token may take.

    Args:
        ratio: 0..1; at 0 nothing is skipped, at 1 only the best expert is left (and those equal to it).
        normalize: divide the weights of what is left by their sum.
    """

    is_adaptive: ClassVar[bool] = True

    def __init__(
        self, d_model: int, num_experts: int, top_k: int, *, ratio: float = 0.5, normalize: bool = True
    ) -> None:
        super().__init__(d_model, num_experts, top_k)
        if not 0 <= ratio <= 1:
            raise ConfigError(f"ratio is {ratio}: it must be at least 0 and at most 1")
        self.ratio, self.normalize = ratio, normalize

    def forward(self, x_TD: Tensor, top_k: int | None = None) -> Routing:
        logits_TE = self.logits(x_TD)
        scores_TE = logits_TE.softmax(dim=-1)
        weights_TK, expert_ids_TK = scores_TE.topk(self.slots(top_k), dim=-1)
        routing = Routing(expert_ids_TK, weights_TK, scores_TE, logits_TE)
        routing = routing.without(weights_TK.detach() < self.ratio * weights_TK.detach()[:, :1])
        if self.normalize:
            routing.weights = routing.weights / routing.weights.sum(dim=-1, keepdim=True)
        return routing

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, ratio={self.ratio}"
