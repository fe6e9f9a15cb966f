"""No router of the layer's own: it takes the routes that were decided ahead of it."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from moesaic.routing.context import RoutingContext
from moesaic.routing.router import ROUTERS, Router
from moesaic.routing.routing import Routing


@ROUTERS.register("given")
class Given(Router):
    """The routing of the context, as it is; without parameters, and without balancing: that is for who decided.

    Read-ME: Refactorizing LLMs as Router-Decoupled Mixture of Experts with System Co-Design, section 2, equation 2: one
    gating network G for all layers. With ``pre_gating = "stack"`` the first MoE layer of a
    :class:`moesaic.MoesaicForCausalLM` has a router of any kind, which decides before that layer's attention, and all
    the others have this one. There G is a transformer block with embeddings of its own, so that it sees the tokens
    before; here it reads what enters the first layer with experts, which has seen as much as the layers before let it.
    A layer of one's own gets its routes by ``layer(x, context=RoutingContext(given=routing))``.
    """

    reads_context: ClassVar[bool] = True
    decides: ClassVar[bool] = False

    def __init__(self, d_model: int, num_experts: int, top_k: int) -> None:
        super().__init__(d_model, num_experts, top_k)
        del self.weight

    def reset_parameters(self, std: float = 0.02) -> None:
        """Nothing to draw."""

    def forward(self, x_TD: Tensor, top_k: int | None = None, context: RoutingContext | None = None) -> Routing:
        return (context or RoutingContext()).routes_for(x_TD.shape[0], self.num_experts)
