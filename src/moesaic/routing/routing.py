"""What a router decides: for every token, which experts, and with which weight."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass
class Routing:
    """The decision of a router for T tokens over E experts, in K slots per token.

    Args:
        expert_ids: ``[T, K]`` int64. A slot that must cost nothing (a null expert, a dropped or padded token) carries
            the id that follows the last expert, ``E``.
        weights: ``[T, K]`` floating point, the factor of each expert's output in the sum; 0 in a null slot.
        scores: ``[T, E]`` float32, the router's whole distribution: what balancing losses and reports read.
        logits: ``[T, E]`` float32, the scores before their activation, where there are such (the z-loss needs them).
        dropped: int64 scalar, how many slots lost their expert to a capacity limit.
        carry: ``[T, X]``, what the router of the next MoE layer may read, with its graph.
        num_ffn: set by the layer: the columns from this one on are zero-computation experts; None where there are none.
        sequence_length: set by the layer: tokens of one sequence follow each other in runs of this length; None where
            that is not known.
        token_mask: ``[T]`` boolean, False for padding, set by the layer (True throughout where nothing is masked); None
            for a routing that no layer has seen.

    With zero-computation experts E here counts them too: what a router chooses among.
    """

    expert_ids: Tensor
    weights: Tensor
    scores: Tensor
    logits: Tensor | None = None
    dropped: Tensor | None = None
    carry: Tensor | None = None
    num_ffn: int | None = None
    sequence_length: int | None = None
    token_mask: Tensor | None = None

    @property
    def num_experts(self) -> int:
        return self.scores.shape[-1]

    @property
    def top_k(self) -> int:
        return self.expert_ids.shape[-1]

    def counts(self) -> Tensor:
        """``[E]`` int64: how many slots each expert got; null slots are not counted."""
        return count_slots(self.expert_ids, self.num_experts)

    def without(self, null_TK: Tensor) -> Routing:
        """The same routing with the slots of the boolean mask ``null_TK`` (``[T, K]``, or ``[T, 1]``) made null."""
        return replace(
            self,
            expert_ids=self.expert_ids.masked_fill(null_TK, self.num_experts),
            weights=self.weights.masked_fill(null_TK, 0.0),
        )

    def part(self, own: range) -> Routing:
        """The same routing over the experts ``own`` alone, numbered from 0: slots with any other become null."""
        if own == range(self.num_experts):
            return self
        others_TK = (self.expert_ids < own.start) | (self.expert_ids >= own.stop)
        return replace(
            self,
            expert_ids=(self.expert_ids - own.start).masked_fill(others_TK, len(own)),
            weights=self.weights.masked_fill(others_TK, 0.0),
            scores=self.scores[:, own.start : own.stop],
            logits=None if self.logits is None else self.logits[:, own.start : own.stop],
        )

    def to(self, device: torch.device) -> Routing:
        """The same routing on another device."""
        moved: Any = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **moved)

    def detach(self) -> Routing:
        """The same routing, cut off from the autograd graph, without what it carries."""
        return replace(
            self,
            weights=self.weights.detach(),
            scores=self.scores.detach(),
            logits=None if self.logits is None else self.logits.detach(),
            carry=None,
        )


def count_slots(expert_ids: Tensor, num_experts: int) -> Tensor:
    """``[E]`` int64: how often each expert's id stands in ``expert_ids`` (any shape); ids ``>= E`` are null slots.

    A scatter into E + 1 bins instead of ``bincount``: its output shape does not depend on the data (so that it
    compiles) and it needs no synchronization on a GPU.
    """
    flat = expert_ids.reshape(-1).clamp(max=num_experts)
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=flat.device)
    return counts.scatter_add_(0, flat, torch.ones_like(flat))[:num_experts]
