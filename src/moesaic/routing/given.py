"""No router of the layer's own: it takes the routes that were decided ahead of it."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from moesaic.errors import ConfigError
from moesaic.routing.context import RoutingContext
from moesaic.routing.router import ROUTERS, Router
from moesaic.routing.routing import Routing


@ROUTERS.register("given")
class Given(Router):
    """The routing of the context, as it is (Read-ME, section 3.2: one pre-gating router for all layers).

    It has no parameters. :class:`moesaic.MoesaicForCausalLM` with ``pre_gating = "stack"`` uses it in every layer; a
    layer of one's own gets its routes by ``layer(x, context=RoutingContext(given=routing))``.
    """

    reads_context: ClassVar[bool] = True

    def __init__(self, d_model: int, num_experts: int, top_k: int) -> None:
        super().__init__(d_model, num_experts, top_k)
        del self.weight

    def reset_parameters(self, std: float = 0.02) -> None:
        """Nothing to draw."""

    def forward(self, x_TD: Tensor, top_k: int | None = None, context: RoutingContext | None = None) -> Routing:
        routing = context.given if context is not None else None
        if routing is None:
            raise ConfigError("the router 'given' decides nothing: call the layer with RoutingContext(given=...)")
        if routing.expert_ids.shape[0] != x_TD.shape[0] or routing.num_experts != self.num_experts:
            raise ConfigError(
                f"the given routing is for {routing.expert_ids.shape[0]} tokens and {routing.num_experts} experts, but "
                f"the layer has {x_TD.shape[0]} tokens and {self.num_experts} experts"
            )
        return routing
