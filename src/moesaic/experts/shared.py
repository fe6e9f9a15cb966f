"""Experts that every token goes through."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moesaic.experts.activations import ACTIVATIONS


class SharedExperts(nn.Module):
    """S shared experts of hidden width F (DeepSeekMoE, section 3.2, equation 9), computed as one dense feed-forward.

    The sum of S experts that every token takes with weight 1 is one feed-forward of width S·F, so no dispatch is
    needed: ``up`` is ``[S·G, D]`` and ``down`` ``[D, S·F]``, for a gated activation all gates before all ups.

    Args:
        gated_output: multiply the sum by a sigmoid of the token's own features (Qwen2-MoE's shared-expert gate).
    """

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        num_shared: int,
        activation: str,
        bias: bool,
        gated_output: bool = False,
    ) -> None:
        super().__init__()
        self.activation = ACTIVATIONS.get(activation)
        hidden = num_shared * d_ff
        self.up = nn.Linear(d_model, 2 * hidden if self.activation.gated else hidden, bias=bias)
        self.down = nn.Linear(hidden, d_model, bias=bias)
        self.gate = nn.Linear(d_model, 1, bias=False) if gated_output else None

    def forward(self, x_TD: Tensor) -> Tensor:
        """``[T, D]`` to ``[T, D]``."""
        y_TD: Tensor = self.down(self.activation.apply(self.up(x_TD)))
        return y_TD if self.gate is None else y_TD * torch.sigmoid(self.gate(x_TD))
