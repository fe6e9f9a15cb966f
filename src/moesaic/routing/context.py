"""What a router may know beyond the features: token ids, what the layer before left, routes decided ahead."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moesaic.errors import ConfigError
from moesaic.routing.routing import Routing


@dataclass
class RoutingContext:
    """Handed to a layer for one forward, and by the layer to routers with ``reads_context``.

    Args:
        token_ids: ``[T]`` int64, the tokens themselves.
        carried: ``[T, X]``, what the router of the MoE layer before left in ``Routing.carry``; None in the first layer.
        given: routes that were decided ahead, as by :meth:`moesaic.MoE.decide`: the layer asks no router then.
        token_mask: ``[T]`` boolean, False for padding; set by the layer.
        left: set by the layer: ``Routing.carry`` of its router, with its graph.
    """

    token_ids: Tensor | None = None
    carried: Tensor | None = None
    given: Routing | None = None
    token_mask: Tensor | None = None
    left: Tensor | None = None

    def routes_for(self, num_tokens: int, num_experts: int) -> Routing:
        """The given routes, checked.

        Raises:
            ConfigError: where there are none, or they are for other tokens or experts.
        """
        routing = self.given
        if routing is None:
            raise ConfigError("the router 'given' decides nothing: call the layer with RoutingContext(given=...)")
        if routing.expert_ids.shape[0] != num_tokens or routing.num_experts != num_experts:
            raise ConfigError(
                f"the given routing is for {routing.expert_ids.shape[0]} tokens and {routing.num_experts} experts, but "
                f"the layer has {num_tokens} tokens and {num_experts} experts"
            )
        return routing


class RoutePath:
    """The contexts of one forward of a whole model, layer by layer.

    What a layer leaves is kept under the layer's own number: with activation checkpointing a layer runs again in the
    backward pass, after all the others, and must find what it found before.

    Args:
        token_ids: of any shape, int64; None where the model was given embeddings.

    Attributes:
        given: the routes of all layers, once they have been decided; None where each layer decides for itself.
    """

    def __init__(self, token_ids: Tensor | None = None) -> None:
        self.token_ids = None if token_ids is None else token_ids.reshape(-1)
        self.given: Routing | None = None
        self._left: dict[int, Tensor] = {}

    def context(self, layer: int, device: torch.device) -> RoutingContext:
        """For the decoder layer of that index, which may be on another device than the one before."""
        before = [number for number in self._left if number < layer]
        return RoutingContext(
            token_ids=None if self.token_ids is None else self.token_ids.to(device),
            carried=self._left[max(before)].to(device) if before else None,
            given=None if self.given is None else self.given.to(device),
        )

    def leave(self, layer: int, context: RoutingContext) -> None:
        """After the layer's forward: keep what it left for the next one."""
        if context.left is not None:
            self._left[layer] = context.left
