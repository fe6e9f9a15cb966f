"""Routers that look at later tokens: what a model with one measures cannot be had when it writes text."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

from torch import nn

from moesaic.errors import UnsupportedError
from moesaic.layer import MoE, moe_layers


class NotCausalWarning(UserWarning):
    """A language model is trained with a router that looks at later tokens."""


def later_tokens_seen(layers: Iterable[MoE]) -> str:
    """Which router looks at later tokens, and what follows; "" where none does."""
    for layer in layers:
        # Any module that gives a Routing may stand in a router's place.
        if not all(getattr(router, "is_causal", True) for router in layer.routers):
            return (
                f"the router {layer.config.router!r} is not causal: a token's experts depend on all tokens of the "
                "batch, later ones too"
            )
    return ""


def refuse_generation(model: nn.Module) -> None:
    """Refuse to write text where a router would need the tokens to come.

    Raises:
        UnsupportedError: which names the router.
    """
    if reason := later_tokens_seen(moe_layers(model)):
        raise UnsupportedError(f"text cannot be generated: {reason}")


def warn_of_training(layers: Iterable[MoE]) -> None:
    """Say once a process that training sees what generation would not; a :class:`NotCausalWarning`."""
    global _warned
    if not _warned and (reason := later_tokens_seen(layers)):
        _warned = True
        message = f"{reason}. Its losses are too good for a model that writes text, and generation is refused."
        warnings.warn(message, NotCausalWarning, stacklevel=3)


_warned = False
