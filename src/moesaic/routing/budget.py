"""A budget for one expert: how often the big one of several sizes may be taken."""

from __future__ import annotations

from torch import Tensor

from moesaic.errors import ConfigError
from moesaic.routing.balancing import BALANCERS, Balancer, mean_over_tokens
from moesaic.routing.routing import Routing


@BALANCERS.register("budget")
class Budget(Balancer):
    """(P̄ − b)², P̄ the mean over the tokens of the share of the scores that one expert has (Duo-LLM: A Framework for
    Studying Adaptive Computation in Large Language Models, section 2, stage 3, L_budget).

    There P̄ is also the mean over the layers, so that one layer may take the big feed-forward more often than another;
    a balancer knows its own layer only, and here each layer keeps the budget. There the output is the sum of what both
    sizes say, weighted by the scores, and a rising temperature makes it hard; here only the chosen one is computed.

    Args:
        expert: its column among those that the router chooses among, from 0.
        share: b, of the tokens.
    """

    def __init__(self, *, expert: int = 0, share: float = 0.5) -> None:
        if expert < 0:
            raise ConfigError(f"option 'expert' of balancer 'budget' is {expert}: it must be at least 0")
        if not 0 <= share <= 1:
            raise ConfigError(f"option 'share' of balancer 'budget' is {share}: it must be from 0 to 1")
        self.expert, self.share = expert, share

    def check_choices(self, num_choices: int) -> None:
        if self.expert >= num_choices:
            raise ConfigError(
                f"option 'expert' of balancer 'budget' is {self.expert}: the router chooses among {num_choices}"
            )

    def loss(self, routing: Routing, counts_E: Tensor) -> Tensor:
        self.check_choices(routing.num_experts)
        total_T1 = routing.scores.sum(dim=-1, keepdim=True).clamp(min=1e-9)  # all 0: a token without any expert
        share_T1 = routing.scores[:, self.expert : self.expert + 1] / total_T1
        return (mean_over_tokens(share_T1, routing) - self.share).square().squeeze()
