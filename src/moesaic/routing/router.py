"""The router: a module with one method, from token features to a :class:`Routing`."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from moesaic.errors import ConfigError
from moesaic.registry import Registry
from moesaic.routing.gate import Gate
from moesaic.routing.options import check_options, is_of
from moesaic.routing.routing import Routing

ROUTERS: Registry[type[Router]] = Registry("router")


class Router(nn.Module, ABC):
    """Base of all routers.

    A router is constructed with ``d_model``, ``num_experts`` and ``top_k``; every further keyword of its ``__init__``
    is one of its options (``MoEConfig(router_options={...})``), annotated as int, float, bool or str.

    ``has_selection_bias`` says that it has a float32 buffer ``selection_bias`` (``[E]``) which takes part in the
    selection only: what the balancer ``bias_update`` moves. With ``reads_context`` the layer calls ``forward(x_TD,
    top_k, context)`` with its :class:`RoutingContext`. ``is_adaptive`` says that ``top_k`` is the most experts that a
    token may take, and that it may take fewer. Where ``is_causal`` is False a token's experts depend on tokens after
    it, so that text cannot be generated. ``has_logits`` says that ``Routing.logits`` is set; where ``decides`` is False
    it takes routes that were decided ahead of the layer.

    ``num_ffn`` is set by who builds it into a layer: the columns from this one on are zero-computation experts; None
    where there are none. ``logit_shift`` is None, or a float32 ``[E]`` that is added to the logits (rerouting at test
    time).
    """

    has_selection_bias: ClassVar[bool] = False
    reads_context: ClassVar[bool] = False
    is_adaptive: ClassVar[bool] = False
    is_causal: ClassVar[bool] = True
    has_logits: ClassVar[bool] = True
    decides: ClassVar[bool] = True
    num_ffn: int | None = None
    logit_shift: Tensor | None = None

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
        logits_TE = float32_linear(x_TD, self.weight)
        return logits_TE if self.logit_shift is None else logits_TE + self.logit_shift

    def linear_gate(self) -> Gate | None:
        """What :meth:`forward` computes, where that is no more than a :class:`Gate`; None: it must be called.

        A frozen layer may then compute a few tokens' routes without calling the router (``moesaic.few_tokens``). Only
        the class that defines this is taken at its word, not those derived from it.
        """
        return None

    def follow(self, first: Router) -> None:
        """Share with the router of the model's first MoE layer what all layers have in common: nothing, by default."""

    @classmethod
    def choice_groups(cls, options: Mapping[str, Any]) -> int:
        """With these ``router_options``: how many equal groups of experts there are, of which a token may choose from
        some only; 1 where it may choose from all."""
        return 1

    @classmethod
    def options_with_fewer(cls, options: Mapping[str, Any], before: int, keep: int) -> dict[str, Any]:
        """The ``router_options`` with which a router that keeps ``keep`` of ``before`` experts routes as it did where
        the others were not to be had."""
        return dict(options)

    @classmethod
    def factor_with_fewer(cls, parameter: str, before: int, keep: int) -> float:
        """By what its parameter of this name is to be multiplied for that."""
        return 1.0

    def slots(self, top_k: int | None) -> int:
        """The number of slots for this call, checked against the number of experts."""
        return self.top_k if top_k is None else check_top_k(top_k, self.num_experts)

    def extra_repr(self) -> str:
        return f"d_model={self.d_model}, num_experts={self.num_experts}, top_k={self.top_k}"


class CommonPart(nn.Module):
    """Base of what one router owns and those of other layers call: of :meth:`Router.follow`.

    It is called as a module, never by its parameters alone: :func:`moesaic.parallelize` then gathers them for each
    layer that calls it.
    """


def full_precision(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Autocast switched off."""
    # The meta device knows no autocast; asking PyTorch whether it does would not compile on 2.11.
    return contextlib.nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def float32_linear(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    """``[T, E]`` float32, whatever the precision of both and of autocast."""
    with full_precision(x_TD.device):
        return nn.functional.linear(x_TD.float(), weight_ED.float())


def check_top_k(top_k: int, num_experts: int) -> int:
    """``top_k`` if it is in 1..E, else :class:`ConfigError`."""
    if not is_of(int, top_k):
        raise ConfigError(f"top_k is {top_k!r}: it must be a whole number")
    if not 1 <= top_k <= num_experts:
        raise ConfigError(f"top_k is {top_k}: it must be at least 1 and at most num_experts = {num_experts}")
    return top_k


def create_router(name: str, d_model: int, num_experts: int, top_k: int, **options: Any) -> Router:
    """Build the router registered under ``name``.

    Raises:
        ConfigError: for an unknown router or option, ``top_k`` outside 1..E, or options that do not go together.
    """
    kind = ROUTERS.get(name)
    check_options(f"router {name!r}", kind, options)
    return kind(d_model, num_experts, check_top_k(top_k, num_experts), **options)
