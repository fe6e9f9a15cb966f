"""The settings of one MoE layer, checked when they are made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from moesaic.errors import ConfigError
from moesaic.experts import ACTIVATIONS
from moesaic.experts.kinds import check_kinds
from moesaic.routing import ROUTERS, check_balancing, create_router
from moesaic.routing.options import is_of


@dataclass
class MoEConfig:
    """Settings of :class:`moesaic.MoE`.

    Args:
        d_model: width D of the tokens.
        d_ff: hidden width F of one expert.
        num_experts: number E of routed experts.
        top_k: slots K per token; may be overridden in each call.
        router: a name of ``moesaic.routing.available()``; ``router_options`` are that router's own keywords.
        balancing: balancer name to coefficient (``load_balancing``, ``z_loss``, ``bias_update``), or to a table of its
            coefficient, schedule and options; empty for none.
        capacity_factor: 0 is dropless; above 0 every expert gets ``ceil(factor·T·K/E)`` rows, padded or dropped; below
            0 an expert gets the rows that it needs, at most ``ceil(|factor|·T·K/E)``. May be overridden in each call.
        activation: a name of ``moesaic.experts.ACTIVATIONS``: swiglu, geglu, geglu_tanh, relu, gelu, gelu_tanh.
        bias: biases in both projections of every expert.
        num_shared_experts: experts that every token takes; ``shared_d_ff`` is the hidden width of each (``d_ff`` by
            default), ``shared_gate`` multiplies their sum by a sigmoid of the token.
        zero_computation_experts: kind to number (``{"zero": 1, "copy": 1, "constant": 2}``): what the router may choose
            beside the E experts; ``top_k`` may then be up to the number of both.
        capacity_tau: rows that a feed-forward expert may take for one of a zero-computation expert's (MoE++).
        iterations: how often a token is routed, computed and added before it leaves, each time by another router
            (Chain-of-Experts, section 3).
        expert_d_ffs: hidden width of each expert, where they differ; takes the place of ``d_ff``. Experts of equal
            width are computed together where they stand next to each other.
        communication_width: width in which rows travel to the experts and back, between a projection down and one up
            that the layer's experts share (BigMac: A Communication-Efficient Mixture-of-Experts Model Structure for
            Fast Training and Inference, equation 2); the router reads the tokens at their full width, as there. None:
            rows are as wide as the tokens.

    Raises:
        ConfigError: for an unknown name, a value out of range, or settings that do not go together.
    """

    d_model: int
    d_ff: int
    num_experts: int
    top_k: int = 2
    router: str = "softmax_topk"
    router_options: Mapping[str, Any] = field(default_factory=dict)
    balancing: Mapping[str, Any] = field(default_factory=dict)
    capacity_factor: float = 0.0
    activation: str = "swiglu"
    bias: bool = False
    num_shared_experts: int = 0
    shared_d_ff: int | None = None
    shared_gate: bool = False
    zero_computation_experts: Mapping[str, int] = field(default_factory=dict)
    capacity_tau: float = 1.0
    iterations: int = 1
    expert_d_ffs: Sequence[int] | None = None
    communication_width: int | None = None

    @property
    def num_choices(self) -> int:
        """What a router chooses among: the E experts, then the zero-computation experts."""
        return self.num_experts + sum(self.zero_computation_experts.values())

    def __post_init__(self) -> None:
        least = {"d_model": 1, "d_ff": 1, "num_experts": 1, "num_shared_experts": 0, "iterations": 1}
        least |= {name: 1 for name in ("shared_d_ff", "communication_width") if getattr(self, name) is not None}
        for name, smallest in least.items():
            value = getattr(self, name)
            if not is_of(int, value):
                raise ConfigError(f"{name} is {value!r}: it must be a whole number")
            if value < smallest:
                raise ConfigError(f"{name} is {value}: it must be at least {smallest}")
        if not is_of(float, self.capacity_factor):
            raise ConfigError(f"capacity_factor is {self.capacity_factor!r}: it must be finite")
        if not (is_of(float, self.capacity_tau) and self.capacity_tau > 0):
            raise ConfigError(f"capacity_tau is {self.capacity_tau!r}: it must be finite and above 0")
        if self.shared_gate and not self.num_shared_experts:
            raise ConfigError("shared_gate needs shared experts: num_shared_experts is 0")
        check_kinds(self.zero_computation_experts)
        self._check_widths()
        if self.iterations > 1 and not ROUTERS.get(self.router).decides:
            raise ConfigError(
                f"iterations is {self.iterations}: each routes anew, but routes that are decided ahead of the layer "
                "(router 'given', pre_gating 'stack') are for one"
            )
        with torch.device("meta"):  # the router knows best what its options may be; without memory, this costs nothing
            create_router(self.router, self.d_model, self.num_choices, self.top_k, **self.router_options)
        check_balancing(self.balancing, ROUTERS.get(self.router), self.num_choices)
        ACTIVATIONS.get(self.activation)

    def _check_widths(self) -> None:
        widths = self.expert_d_ffs
        if widths is None:
            return
        good = isinstance(widths, Sequence) and all(is_of(int, width) and width >= 1 for width in widths)
        if not good or len(widths) != self.num_experts:
            raise ConfigError(
                f"expert_d_ffs is {widths!r}: it must be num_experts = {self.num_experts} whole numbers from 1 on"
            )
