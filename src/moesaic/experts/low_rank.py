"""The seam for low-rank parts: what adds its own to the experts' projections, row by row."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn

from moesaic.dispatch import Dispatch


class LowRank(Protocol):
    """Low-rank parts of an experts module's two matrices (LoRA: Low-Rank Adaptation of Large Language Models, eq. 3).

    The rows are those of the dispatch that is handed over with them: a row's token and its expert follow from it.

    Attributes:
        active: whether there is anything to add in this forward.
    """

    @property
    def active(self) -> bool: ...

    def add_up(self, h_NG: Tensor, x_ND: Tensor, dispatch: Dispatch) -> Tensor:
        """``h_NG``, the experts' up projection before the activation, plus the parts of ``x_ND``: ``[N, G]``."""

    def add_down(self, y_ND: Tensor, h_NF: Tensor, dispatch: Dispatch) -> Tensor:
        """``y_ND``, the experts' down projection, plus the parts of ``h_NF``: ``[N, D]``."""


def low_rank_of(module: nn.Module) -> LowRank | None:
    """What an experts module's attribute ``low_rank`` adds in this forward; None where it is absent or at rest."""
    low_rank: LowRank | None = getattr(module, "low_rank", None)
    return low_rank if low_rank is not None and low_rank.active else None
