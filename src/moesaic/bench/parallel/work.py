"""What a rank has to do in a step: sizes, and which experts its tokens go to.

W ranks · T tokens of a rank · E experts · K slots · D model width · F expert hidden width.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from moesaic.routing import Routing

ROUTINGS = {
    "uniform": "every expert is as probable as any other",
    "skewed": "the n-th most wanted expert is as probable as 1/n",
    "half": "half of all slots go to one expert",
}


@dataclass(frozen=True)
class Work:
    """One layer's step: ``tokens`` on every rank, ``training`` with a backward pass."""

    tokens: int
    num_experts: int
    top_k: int
    d_model: int
    d_ff: int
    routing: str = "uniform"
    training: bool = False

    def __str__(self) -> str:
        step = "training" if self.training else "forward"
        return f"{self.tokens} tokens a rank, E{self.num_experts}, {self.routing}, {step}"

    @property
    def sizes(self) -> str:
        """What does not change from point to point of a grid."""
        return f"K{self.top_k} D{self.d_model} F{self.d_ff}, fp32 SwiGLU"


def expert_ids(work: Work, rank: int) -> Tensor:
    """``[T, K]`` int64: K different experts for each of a rank's tokens; the same for the same work and rank."""
    dice = np.random.default_rng([work.tokens, work.num_experts, rank])
    # Which experts are hot is the same on all ranks, and nothing that their numbers, hence their owners, tell.
    order_E = np.random.default_rng(work.num_experts).permutation(work.num_experts)
    odds_E = np.ones(work.num_experts)
    if work.routing == "skewed":
        odds_E[order_E] = 1 / np.arange(1, work.num_experts + 1)
    # The K largest of log p + Gumbel noise are K draws without replacement.
    scores_TE = np.log(odds_E) + dice.gumbel(size=(work.tokens, work.num_experts))
    if work.routing == "half":
        # Of K slots: K/2 for every token, half of the tokens where K is 1.
        wants_T = dice.random(work.tokens) < work.top_k / 2
        scores_TE[:, order_E[0]] = np.where(wants_T, np.inf, -np.inf)
    ids_TK = np.argsort(-scores_TE, axis=1)[:, : work.top_k]
    return torch.from_numpy(np.ascontiguousarray(ids_TK))


class FixedRouter(nn.Module):
    """Sends the tokens of a rank where :func:`expert_ids` says, with weights that take a gradient.

    It has no parameters, so that nothing of a router's own is timed.
    """

    def __init__(self, work: Work, rank: int) -> None:
        super().__init__()
        self.ids_TK = expert_ids(work, rank)
        self.weights_TK = torch.rand(self.ids_TK.shape, generator=torch.Generator().manual_seed(rank)) + 0.5
        self.weights_TK.requires_grad_(work.training)
        self.scores_TE = torch.zeros(work.tokens, work.num_experts)

    def forward(self, x_TD: Tensor, top_k: int | None = None) -> Routing:
        """The fixed routing, whatever the tokens are."""
        return Routing(self.ids_TK, self.weights_TK, self.scores_TE)
