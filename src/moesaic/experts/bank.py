"""The weights of a layer's routed experts, as one module."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from moesaic.dispatch import Dispatch
from moesaic.errors import UnsupportedError
from moesaic.experts.activations import ACTIVATIONS
from moesaic.experts.backend import compute_and_tell
from moesaic.experts.choice import Choice
from moesaic.experts.low_rank import low_rank_of
from moesaic.experts.slots import ExpertSlots
from moesaic.experts.storage import ExpertStorage
from moesaic.experts.weights import ExpertWeights


class ExpertBank(ExpertStorage):
    """E feed-forward experts ``D -> F -> D`` in fused 3-D parameters, computed by the chosen backend.

    Parameters: ``up`` ``[E, G, D]`` (gate and up projection for a gated activation: G = 2F, the gate first; else
    G = F), ``down`` ``[E, D, F]``, and with ``bias`` ``up_bias`` ``[E, G]`` and ``down_bias`` ``[E, D]``. It is the
    layout of transformers' ``gate_up_proj`` and ``down_proj``. :func:`moesaic.quantize` puts the buffers ``up_codes``,
    ``up_scale``, ``down_codes`` and ``down_scale`` in the place of the two matrices.

    After a forward ``last_choice`` says which backend computed it, and ``last_counts`` (``[E]`` int64, or of all slots
    in use) how many rows each expert had. ``slots`` is None, or what an :class:`moesaic.adapters.AdapterPool` has put
    there; ``parallel`` is None, or what carries out the forward over ranks after :func:`moesaic.parallelize`, and
    ``last_decision`` is then how it did the last one.

    Args:
        activation: a name of ``moesaic.experts.ACTIVATIONS``.
    """

    last_choice: Choice | None
    last_counts: Tensor | None
    slots: ExpertSlots | None
    parallel: Any = None
    last_decision: Any = None

    def __init__(
        self, d_model: int, d_ff: int, num_experts: int, activation: str = "swiglu", bias: bool = False
    ) -> None:
        super().__init__()
        self.d_model, self.d_ff, self.num_experts = d_model, d_ff, num_experts
        self.last_choice = self.last_counts = self.slots = None
        self.activation = ACTIVATIONS.get(activation)
        width = 2 * d_ff if self.activation.gated else d_ff
        self.up = nn.Parameter(torch.empty(num_experts, width, d_model))
        self.down = nn.Parameter(torch.empty(num_experts, d_model, d_ff))
        self.up_bias = nn.Parameter(torch.empty(num_experts, width)) if bias else None
        self.down_bias = nn.Parameter(torch.empty(num_experts, d_model)) if bias else None
        self.reset_parameters()

    def reset_parameters(self, std: float | None = None) -> None:
        """Normal weights, zero biases; ``std`` defaults to one over the square root of each matrix's input width.

        Quantized weights stay as they are: they come from trained ones.
        """
        if self.format is not None:
            return
        nn.init.normal_(self.up, std=std or 1 / math.sqrt(self.d_model))
        nn.init.normal_(self.down, std=std or 1 / math.sqrt(self.d_ff))
        for bias in (self.up_bias, self.down_bias):
            if bias is not None:
                nn.init.zeros_(bias)

    def weights(self) -> ExpertWeights:
        """The parameters as a backend takes them; no copy.

        Raises:
            UnsupportedError: where they are sharded over ranks.
        """
        if self.parallel is not None:
            raise UnsupportedError("the experts are sharded over ranks: no rank has all of them")
        if self.format is None:
            return ExpertWeights(
                self.up, self.down, self.activation, self.up_bias, self.down_bias, low_rank=low_rank_of(self)
            )
        up, down = self.quantized()
        return ExpertWeights(
            up.codes,
            down.codes,
            self.activation,
            self.up_bias,
            self.down_bias,
            format=self.format,
            up_scale=up.scale,
            down_scale=down.scale,
            low_rank=low_rank_of(self),
        )

    def gated(self) -> bool:
        return self.activation.gated

    def forward(self, x_TD: Tensor, dispatch: Dispatch) -> Tensor:
        """``[T, D]`` to ``[T, D]``: for every token the weighted sum of its experts' outputs."""
        # A dispatch over another number of experts was rerouted: over the slots.
        if self.slots is None or dispatch.num_experts == self.num_experts:
            weights = self.weights()
        else:
            weights = self.slots.weights_with(low_rank_of(self))
        y_TD, self.last_choice = compute_and_tell(x_TD, dispatch, weights)
        if not torch.compiler.is_compiling():
            self.last_counts = dispatch.counts
        return y_TD

    def extra_repr(self) -> str:
        return (
            f"d_model={self.d_model}, d_ff={self.d_ff}, num_experts={self.num_experts}, "
            f"activation={self.activation.name}, bias={self.up_bias is not None}"
            + (f", weights={self.format.name}" if self.format else "")
        )
