"""Routers and capacities that look at later tokens: what a model with one measures it cannot do when it writes text."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

from torch import nn

from moesaic.errors import UnsupportedError
from moesaic.layer import MoE, moe_layers


class NotCausalWarning(UserWarning):
    """A language model is trained with a router that looks at later tokens, or writes with a limited capacity."""


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


def later_slots_seen(layers: Iterable[MoE]) -> str:
    """Which capacity hangs on later tokens, and what follows; "" where none is limited."""
    for layer in layers:
        if factor := layer.config.capacity_factor:
            return (
                f"capacity_factor {factor} is not causal: which of a token's experts have room depends on all tokens "
                "of the batch, later ones too"
            )
    return ""


def refuse_generation(model: nn.Module) -> None:
    """Refuse to write text where a router would need the tokens to come; a limited capacity is only warned of, once a
    process (:class:`NotCausalWarning`): a token that is written alone has room for all of its experts.

    Raises:
        UnsupportedError: which names the router.
    """
    global _warned_of_capacity
    layers = moe_layers(model)
    if reason := later_tokens_seen(layers):
        raise UnsupportedError(f"text cannot be generated: {reason}")
    if not _warned_of_capacity and (reason := later_slots_seen(layers)):
        _warned_of_capacity = True
        warnings.warn(f"{reason}. Text is written with other experts than it is read with.", NotCausalWarning, 3)


def warn_of_training(layers: Iterable[MoE]) -> None:
    """Say once a process that training sees what generation would not; a :class:`NotCausalWarning`."""
    global _warned
    if not _warned and (reason := later_tokens_seen(layers)):
        _warned = True
        message = f"{reason}. Its losses are too good for a model that writes text, and generation is refused."
        warnings.warn(message, NotCausalWarning, stacklevel=3)


_warned = False
_warned_of_capacity = False
