"""The router: a module with one method, from token features to a :class:`Routing`."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from moesaic.errors import ConfigError, did_you_mean
from moesaic.registry import Registry
from moesaic.routing.routing import Routing

ROUTERS: Registry[type[Router]] = Registry("router")


class Router(nn.Module, ABC):
    """Base of all routers.

    A router is constructed with ``d_model``, ``num_experts`` and ``top_k``; every further keyword of its ``__init__``
    is one of its options (``MoEConfig(router_options={...})``).
    """

    def __init__(self, d_model: int, num_experts: int, top_k: int) -> None:
        super().__init__()
        self.d_model, self.num_experts, self.top_k = d_model, num_experts, top_k
        self.weight = nn.Parameter(torch.empty(num_experts, d_model))
        self.reset_parameters()

    def reset_parameters(self, std: float = 0.02) -> None:
        """Draw the gate's weight ``[E, D]`` from a normal distribution."""
        nn.init.normal_(self.weight, std=std)

    @abstractmethod
    def forward(self, x_TD: Tensor, top_k: int | None = None) -> Routing:
        """Decide for ``x_TD`` (``[T, D]``); ``top_k`` overrides the configured number of slots for this call."""

    def logits(self, x_TD: Tensor) -> Tensor:
        """``[T, E]`` float32 gate logits.

        The gate is computed in float32 whatever the model's precision: near-ties between experts decide who
        computes a token, and E columns cost next to nothing.
        """
        with torch.autocast(x_TD.device.type, enabled=False):
            return nn.functional.linear(x_TD.float(), self.weight.float())

    def slots(self, top_k: int | None) -> int:
        """The number of slots for this call, checked against the number of experts."""
        return self.top_k if top_k is None else check_top_k(top_k, self.num_experts)

    def extra_repr(self) -> str:
        return f"d_model={self.d_model}, num_experts={self.num_experts}, top_k={self.top_k}"


def check_top_k(top_k: int, num_experts: int) -> int:
    """``top_k`` if it is in 1..E, else :class:`ConfigError`."""
    if not 1 <= top_k <= num_experts:
        raise ConfigError(f"top_k is {top_k}: it must be at least 1 and at most num_experts = {num_experts}")
    return top_k


def check_options(name: str, options: dict[str, Any]) -> None:
    """Refuse options that the router ``name`` does not have, with the nearest one that it has."""
    allowed = [
        key
        for key, parameter in inspect.signature(ROUTERS.get(name)).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    ]
    for key in options:
        if key not in allowed:
            raise ConfigError(f"router {name!r} has no option {key!r}: {did_you_mean(key, allowed)}")


def create_router(name: str, d_model: int, num_experts: int, top_k: int, **options: Any) -> Router:
    """Build the router registered under ``name``.

    Raises:
        ConfigError: for an unknown router or option, ``top_k`` outside 1..E, or options that do not go together.
    """
    check_options(name, options)
    return ROUTERS.get(name)(d_model, num_experts, check_top_k(top_k, num_experts), **options)
