"""What a router may know beyond the features: token ids, what the layer before left, routes decided ahead."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from moesaic.routing.routing import Routing


@dataclass
class RoutingContext:
    """Handed to a layer for one forward, and by the layer to routers with ``reads_context``.

    Args:
        token_ids: ``[T]`` int64, the tokens themselves.
        carried: ``[T, X]``, what the router of the MoE layer before left in ``Routing.carry``; None in the first layer.
        given: routes that were decided ahead, for the router ``"given"``.
        features: ``[..., D]``, what the router reads in place of the layer's input (pre-gating).
        token_mask: ``[T]`` boolean, False for padding; set by the layer.
        left: set by the layer: ``Routing.carry`` of its router, with its graph.
    """

    token_ids: Tensor | None = None
    carried: Tensor | None = None
    given: Routing | None = None
    features: Tensor | None = None
    token_mask: Tensor | None = None
    left: Tensor | None = None


class RoutePath:
    """The contexts of one forward of a whole model, layer by layer.

    What a layer leaves is kept under the layer's own number: with activation checkpointing a layer runs again in the
    backward pass, after all the others, and must find what it found before.

    Args:
        token_ids: of any shape, int64; None where the model was given embeddings.
    """

    def __init__(self, token_ids: Tensor | None = None) -> None:
        self.token_ids = None if token_ids is None else token_ids.reshape(-1)
        self.given: Routing | None = None
        self._left: dict[int, Tensor] = {}

    def context(self, layer: int, features: Tensor | None = None) -> RoutingContext:
        """For the decoder layer of that index."""
        before = [number for number in self._left if number < layer]
        return RoutingContext(self.token_ids, self._left[max(before)] if before else None, self.given, features)

    def leave(self, layer: int, context: RoutingContext) -> None:
        """After the layer's forward: keep what it left for the next one."""
        if context.left is not None:
            self._left[layer] = context.left
