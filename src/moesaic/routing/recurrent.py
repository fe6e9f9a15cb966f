"""A routing state that every token carries from layer to layer in a gated recurrent unit."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from moesaic.errors import ConfigError
from moesaic.routing.context import RoutingContext
from moesaic.routing.router import ROUTERS, CommonPart, Router, float32_linear
from moesaic.routing.routing import Routing


@ROUTERS.register("recurrent")
class RecurrentTopK(Router):
    """Softmax top-k over a state that remembers the layers before (Layerwise Recurrent Router for Mixture-of-Experts).

    The section on the layerwise recurrent router: in layer l, a token's features x and the state h of the layer before
    give ``h' = GRU(P_l x, h)`` and the logits ``G_l h'``, with h = 0 ahead of the first layer. The projection ``P_l``
    (``[P, D]``, P = ``state_width``) and the gate ``G_l`` (``weight``, ``[E, P]``) are the layer's own; the GRU is one
    for all layers. The recurrence runs over layers, not over positions: all tokens are computed at once, none sees
    another, and generation needs no cache beside that of the attention. We followed the authors' published code.

    :meth:`follow` makes the GRU of another router this one's; :class:`moesaic.MoesaicModel` does so for all MoE layers
    after its first one, and :class:`moesaic.MoE` for the routers of its iterations. With layers of one's own, also hand
    on the state: ``RoutingContext(carried=before.left)``. We
    differ from the paper in that everything is computed in float32, and that the GRU starts from PyTorch's
    distribution.

    Args:
        state_width: P, the width of the state (the authors' code has 256 for models of 0.9B parameters).
        shared: one GRU for all layers; without it each layer has its own.
        normalize: divide the K weights by their sum.
    """

    reads_context: ClassVar[bool] = True

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        top_k: int,
        *,
        state_width: int = 128,
        shared: bool = True,
        normalize: bool = True,
    ) -> None:
        if state_width < 1:
            raise ConfigError(f"state_width is {state_width}: it must be at least 1")
        super().__init__(state_width, num_experts, top_k)  # the gate reads the state
        self.d_model, self.state_width = d_model, state_width
        self.shared, self.normalize = shared, normalize
        self.projection = nn.Parameter(torch.empty(state_width, d_model))
        self.cell: GatedCell | None = GatedCell(state_width)
        self.reset_parameters()

    def follow(self, first: Router) -> None:
        """Use the GRU of ``first`` from now on, in place of one's own, unless ``shared`` is False.

        The parameters stay those of ``first`` alone: here they are in no state dict and in no list of parameters.
        """
        if not self.shared or first is self:
            return
        if not isinstance(first, RecurrentTopK) or first.state_width != self.state_width:
            raise ConfigError(f"a recurrent router can share its GRU only with one of state_width = {self.state_width}")
        self.cell = None
        self.__dict__["_first"] = first  # not by setattr, which would make it a part of this module

    def reset_parameters(self, std: float = 0.02) -> None:
        """Draw gate and projection from a normal distribution, and the GRU, where it is this router's own."""
        super().reset_parameters(std)
        if "projection" in self._parameters:  # not there yet while the base class is built
            nn.init.normal_(self.projection, std=std)
            if self.cell is not None:
                self.cell.reset_parameters()

    def forward(self, x_TD: Tensor, top_k: int | None = None, context: RoutingContext | None = None) -> Routing:
        state_TP = self.state(x_TD, None if context is None else context.carried)
        logits_TE = self.logits(state_TP)
        scores_TE = logits_TE.softmax(dim=-1)
        weights_TK, expert_ids_TK = scores_TE.topk(self.slots(top_k), dim=-1)
        if self.normalize:
            weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
        return Routing(expert_ids_TK, weights_TK, scores_TE, logits_TE, carry=state_TP)

    def state(self, x_TD: Tensor, carried_TP: Tensor | None) -> Tensor:
        """``[T, P]`` float32: the state after this layer, from that of the layer before (None ahead of the first)."""
        cell = self._common()
        projected_TP = float32_linear(x_TD, self.projection)
        before_TP = torch.zeros_like(projected_TP) if carried_TP is None else carried_TP
        state_TP: Tensor = cell(projected_TP, before_TP)
        return state_TP

    def _common(self) -> GatedCell:
        first: RecurrentTopK | None = self.__dict__.get("_first")
        if self.cell is not None or first is None:
            assert self.cell is not None
            return self.cell
        return first._common()

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, state_width={self.state_width}"


class GatedCell(CommonPart):
    """A gated recurrent unit of equal input and state widths P, in float32 under any precision.

    Rows of its matrices (``[3P, P]``) and biases (``[3P]``): the reset gate's, the update gate's, the new value's.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.weight_ih, self.weight_hh = (nn.Parameter(torch.empty(3 * width, width)) for _ in range(2))
        self.bias_ih, self.bias_hh = (nn.Parameter(torch.empty(3 * width)) for _ in range(2))

    def reset_parameters(self) -> None:
        """As PyTorch's GRU: uniform within 1/√P."""
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -1 / math.sqrt(self.width), 1 / math.sqrt(self.width))

    def forward(self, x_TP: Tensor, before_TP: Tensor) -> Tensor:
        new = float32_linear(x_TP, self.weight_ih) + self.bias_ih.float()
        old = float32_linear(before_TP, self.weight_hh) + self.bias_hh.float()
        (new_reset, new_keep, new_value), (old_reset, old_keep, old_value) = new.chunk(3, -1), old.chunk(3, -1)
        keep_TP = torch.sigmoid(new_keep + old_keep)
        value_TP = torch.tanh(new_value + torch.sigmoid(new_reset + old_reset) * old_value)
        state_TP: Tensor = (1 - keep_TP) * value_TP + keep_TP * before_TP.float()
        return state_TP

    def extra_repr(self) -> str:
        return f"width={self.width}"
