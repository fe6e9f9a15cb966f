"""The seam for low-rank parts: what computes the tokens whose experts have one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from moesaic.dispatch import Dispatch

if TYPE_CHECKING:
    from moesaic.experts.weights import ExpertWeights


class LowRank(Protocol):
    """Low-rank parts of an experts module's matrices (LoRA: Low-Rank Adaptation of Large Language Models, equation 3).

    They go into the projections before the activation and before the routing weights, where no fused kernel can be
    interrupted: so whoever brings them computes their tokens, and a backend computes the others.
    """

    @property
    def active(self) -> bool:
        """Whether any token of this forward has a part."""

    @property
    def tokens(self) -> Tensor | None:
        """``[T]`` boolean: which tokens have one; None: all."""

    def compute(self, x_TD: Tensor, dispatch: Dispatch, weights: ExpertWeights) -> Tensor:
        """``[T, D]``: what :func:`moesaic.experts.compute` gives, with the parts; of the tokens with slots only."""


def low_rank_of(module: nn.Module) -> LowRank | None:
    """What an experts module's attribute ``low_rank`` adds in this forward; None where it is absent or at rest."""
    low_rank: LowRank | None = getattr(module, "low_rank", None)
    return low_rank if low_rank is not None and low_rank.active else None


def split(dispatch: Dispatch, tokens_T: Tensor) -> tuple[Dispatch, Dispatch]:
    """The slots of the tokens that ``tokens_T`` (``[T]`` boolean) names, and those of the others; each with null slots
    in the other's places."""
    null = dispatch.num_experts
    expert_of_row = torch.cat([dispatch.expert_of_row(), dispatch.inverse.new_full((1,), null)])
    ids_TK = expert_of_row[dispatch.inverse]
    chosen_T1 = tokens_T.unsqueeze(1)
    return (
        Dispatch.from_slots(ids_TK.masked_fill(~chosen_T1, null), dispatch.weights, null),
        Dispatch.from_slots(ids_TK.masked_fill(chosen_T1, null), dispatch.weights, null),
    )
