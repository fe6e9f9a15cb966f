"""Routers and capacities that look at later tokens: what a model with one measures it cannot do when it writes text."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable
from typing import Any, TypeVar
from weakref import WeakSet

from torch import nn

from moesaic.errors import UnsupportedError
from moesaic.layer import MoE, moe_layers

Model = TypeVar("Model", bound=nn.Module)


class NotCausalWarning(UserWarning):
    """A language model is trained with a router that looks at later tokens, or writes with a limited capacity.

    Said once a model; ``warnings.simplefilter("ignore", moesaic.hf.causality.NotCausalWarning)`` silences it.
    """


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
    model (:class:`NotCausalWarning`): a token that is written alone has room for all of its experts.

    Raises:
        UnsupportedError: which names the router.
    """
    layers = moe_layers(model)
    if reason := later_tokens_seen(layers):
        raise UnsupportedError(f"text cannot be generated: {reason}")
    # The layer stands for the model, which somebody may have wrapped.
    if layers and layers[0] not in _WARNED_OF_CAPACITY and (reason := later_slots_seen(layers)):
        _WARNED_OF_CAPACITY.add(layers[0])
        warnings.warn(f"{reason}. Text is written with other experts than it is read with.", NotCausalWarning, 3)


def refuses_batches(kind: type[Model]) -> type[Model]:
    """A class decorator: transformers' continuous batching is refused as ``generate`` is, where there is any."""
    for name in ("generate_batch", "init_continuous_batching"):
        if (method := getattr(kind, name, None)) is not None:
            setattr(kind, name, _refusing(method))
    return kind


def _refusing(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def first_refuse(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        refuse_generation(self)
        return method(self, *args, **kwargs)

    return first_refuse


def warn_of_training(model: nn.Module, layers: Iterable[MoE]) -> None:
    """Say once a model that training sees what generation would not; a :class:`NotCausalWarning`."""
    if model not in _TOLD and (reason := later_tokens_seen(layers)):
        has_been_told(model)
        message = f"{reason}. Its losses are too good for a model that writes text, and generation is refused."
        warnings.warn(message, NotCausalWarning, stacklevel=3)


def has_been_told(model: nn.Module) -> None:
    """Whoever trains the model knows: :func:`warn_of_training` has no more to say of it."""
    _TOLD.add(model)


_TOLD: WeakSet[nn.Module] = WeakSet()
_WARNED_OF_CAPACITY: WeakSet[MoE] = WeakSet()
