"""The settings of one MoE layer, checked when they are made."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from moesaic.errors import ConfigError
from moesaic.experts import ACTIVATIONS
from moesaic.routing import ROUTERS, check_balancing
from moesaic.routing.router import check_options, check_top_k


@dataclass
class MoEConfig:
    """Settings of :class:`moesaic.MoE`.

    Args:
        d_model: width D of the tokens.
        d_ff: hidden width F of one expert.
        num_experts: number E of routed experts.
        top_k: slots K per token; may be overridden in each call.
        router: a name of ``moesaic.routing.available()``; ``router_options`` are that router's own keywords.
        balancing: balancer name to coefficient (``load_balancing``, ``z_loss``, ``bias_update``); empty for none.
        capacity_factor: 0 is dropless; above 0 every expert gets ``ceil(factor·T·K/E)`` rows, padded or dropped; below
            0 an expert gets the rows that it needs, at most ``ceil(|factor|·T·K/E)``. May be overridden in each call.
        activation: a name of ``moesaic.experts.ACTIVATIONS``: swiglu, geglu, geglu_tanh, relu, gelu, gelu_tanh.
        bias: biases in both projections of every expert.
        num_shared_experts: experts that every token takes; ``shared_d_ff`` is the hidden width of each (``d_ff`` by
            default), ``shared_gate`` multiplies their sum by a sigmoid of the token.

    Raises:
        ConfigError: for an unknown name, a value out of range, or settings that do not go together.
    """

    d_model: int
    d_ff: int
    num_experts: int
    top_k: int = 2
    router: str = "softmax_topk"
    router_options: Mapping[str, Any] = field(default_factory=dict)
    balancing: Mapping[str, float] = field(default_factory=dict)
    capacity_factor: float = 0.0
    activation: str = "swiglu"
    bias: bool = False
    num_shared_experts: int = 0
    shared_d_ff: int | None = None
    shared_gate: bool = False

    def __post_init__(self) -> None:
        for name in ("d_model", "d_ff", "num_experts"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if self.num_shared_experts < 0:
            raise ConfigError(f"num_shared_experts is {self.num_shared_experts}: it must be at least 0")
        if self.shared_d_ff is not None and self.shared_d_ff < 1:
            raise ConfigError(f"shared_d_ff is {self.shared_d_ff}: it must be at least 1")
        if not math.isfinite(self.capacity_factor):
            raise ConfigError(f"capacity_factor is {self.capacity_factor}: it must be finite")
        check_top_k(self.top_k, self.num_experts)
        check_options(self.router, dict(self.router_options))
        check_balancing(self.balancing, ROUTERS.get(self.router))
        ACTIVATIONS.get(self.activation)
