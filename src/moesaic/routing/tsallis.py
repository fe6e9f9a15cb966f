"""The entropy of a token's own distribution decides how it is routed: softly, or by top-p and top-k."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from moesaic.errors import ConfigError
from moesaic.routing.balancing import BALANCERS, Balancer, mean_over_tokens, shares
from moesaic.routing.router import ROUTERS, Router
from moesaic.routing.routing import Routing


@ROUTERS.register("tsallis")
class TsallisRouter(Router):
    """Hybrid routing (DynMoLE, the section on its hybrid routing), for FFN experts in place of adapters.

    A token whose distribution over the experts has a Tsallis entropy above ``threshold`` is undecided: it takes all
    experts (soft routing). Any other takes experts in the order of probability until their sum reaches ``p`` (top-p),
    and at least ``least`` of them (top-k). The weights are the probabilities. ``top_k`` is the most that a token may
    take: the paper has no such limit, which is ``top_k = num_experts``.

    Args:
        threshold: as a share of the greatest entropy that E experts can have, so 0 to 1: in the authors' code too the
            entropy is divided by it. At 1 no token is routed softly, below 0 every one.
        entropy_index: q of the entropy (1 is Shannon's).
        p: in 0..1. The expert that takes the sum to ``p`` is taken (as in Harder Tasks Need More Experts); in the
            authors' code it is left out.
        least: experts that a token takes at least; no more than ``top_k`` in any case.
        normalize: divide the weights by their sum (the authors' code does not).
    """

    is_adaptive: ClassVar[bool] = True

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        top_k: int,
        *,
        threshold: float = 0.9,
        entropy_index: float = 1.1,
        p: float = 0.75,
        least: int = 2,
        normalize: bool = False,
    ) -> None:
        super().__init__(d_model, num_experts, top_k)
        if not 0 <= p <= 1:
            raise ConfigError(f"p is {p}: it must be at least 0 and at most 1")
        if least < 1:
            raise ConfigError(f"least is {least}: it must be at least 1")
        check_index(entropy_index)
        self.threshold, self.entropy_index = threshold, entropy_index
        self.p, self.least, self.normalize = p, least, normalize

    def forward(self, x_TD: Tensor, top_k: int | None = None) -> Routing:
        logits_TE = self.logits(x_TD)
        scores_TE = logits_TE.softmax(dim=-1)
        weights_TK, expert_ids_TK = scores_TE.topk(self.slots(top_k), dim=-1)
        with torch.no_grad():
            is_soft_T1 = tsallis_entropy(scores_TE, self.entropy_index).unsqueeze(-1) > self.threshold
            sum_before_TK = weights_TK.cumsum(dim=-1) - weights_TK
            rank_K = torch.arange(weights_TK.shape[-1], device=x_TD.device)
            null_TK = ~is_soft_T1 & (sum_before_TK >= self.p) & (rank_K >= self.least)
        routing = Routing(expert_ids_TK, weights_TK, scores_TE, logits_TE).without(null_TK)
        if self.normalize:
            routing.weights = routing.weights / routing.weights.sum(dim=-1, keepdim=True)
        return routing

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, threshold={self.threshold}, p={self.p}, least={self.least}"


@BALANCERS.register("tsallis_entropy")
class TsallisEntropy(Balancer):
    """Mean over the tokens of the Tsallis entropy of their scores, 0 to 1 (DynMoLE, its entropy loss): keeps the router
    decided. The authors' coefficient is 0.01, beside ``load_balancing`` with 0.001.

    Args:
        entropy_index: q, as of the router ``"tsallis"``. Scores that do not sum to 1 over the experts are normalized
            per token first.
    """

    def __init__(self, *, entropy_index: float = 1.1) -> None:
        check_index(entropy_index)
        self.entropy_index = entropy_index

    def loss(self, routing: Routing, counts_E: Tensor) -> Tensor:
        entropy_T1 = tsallis_entropy(shares(routing.scores), self.entropy_index).unsqueeze(-1)
        return mean_over_tokens(entropy_T1, routing).squeeze()


def tsallis_entropy(scores_TE: Tensor, index: float) -> Tensor:
    """``[T]``: ``(1 - Σ p^q) / (q - 1)`` for probabilities ``[T, E]``, divided by its value for E equal ones: 0 to 1.

    For ``index`` q = 1 it is Shannon's entropy, the limit; with one expert it is 0.
    """
    num_experts = scores_TE.shape[-1]
    if num_experts == 1:
        return scores_TE.sum(dim=-1) * 0
    p_TE = scores_TE.clamp(min=torch.finfo(scores_TE.dtype).tiny)  # where q < 1, the gradient at 0 is infinite
    if abs(index - 1) < 1e-6:
        return -(scores_TE * p_TE.log()).sum(dim=-1) / math.log(num_experts)
    greatest: float = 1 - num_experts ** (1 - index)
    return (1 - p_TE.pow(index).sum(dim=-1)) / greatest


def check_index(index: float) -> None:
    """Raise :class:`ConfigError` for an index of the entropy that is not above 0."""
    if index <= 0:
        raise ConfigError(f"entropy_index is {index}: it must be above 0")
