"""Settings of our causal language model: Qwen3-MoE's, and those of our MoE layer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import Qwen3MoeConfig

from moesaic.config import MoEConfig
from moesaic.errors import ConfigError, did_you_mean
from moesaic.routing import ROUTERS

# Sizes that MoEConfig does not check.
_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "decoder_sparse_step",
)


PRE_GATINGS = ["layer", "none", "stack"]

# Qwen3-MoE's settings that have no effect here: router_options and balancing take their place.
_REPLACED = ("norm_topk_prob", "router_aux_loss_coef")


@strict
class MoesaicConfig(Qwen3MoeConfig):
    """Qwen3-MoE's configuration (attention, RoPE, vocabulary, which layers are sparse) with our layer's settings.

    ``hidden_size``, ``moe_intermediate_size``, ``num_experts`` and ``num_experts_per_tok`` keep transformers' names;
    the others are those of :class:`moesaic.MoEConfig`, ``activation`` and ``bias`` being ``expert_activation`` and
    ``expert_bias`` here. ``norm_topk_prob``, ``hidden_act`` of the experts and ``router_aux_loss_coef`` of Qwen3-MoE
    are replaced by ``router_options``, ``expert_activation`` and ``balancing``.

    ``pre_gating`` says what the routers read: ``"none"`` the input of the experts, ``"layer"`` that of the decoder
    layer, before its attention (SmallThinker: A Family of Efficient Large Language Models Natively Trained for Local
    Deployment; it reads the residual stream before the norm, as the authors' model does), ``"stack"`` that of the first
    decoder layer with experts, by one router whose routes all layers take (Read-ME: Refactorizing LLMs as
    Router-Decoupled Mixture of Experts with System Co-Design, section 2; see the router ``"given"``).

    ``qk_norm=False`` leaves out the norms of queries and keys, as in Llama, Mistral and Qwen2; with ``attention_bias``
    the projections of queries, keys and values have a bias, and that of the output as ``attention_output_bias`` says
    (None: like the others; Qwen2's has none). So dense models of these families keep their attention when they are
    converted.

    Raises:
        ConfigError: for a value out of range, or settings that do not go together.
    """

    model_type = "moesaic"
    # Qwen3-MoE's plans name parameters that this model does not have.
    base_model_tp_plan = {}  # noqa: RUF012
    base_model_ep_plan = {}  # noqa: RUF012

    router: str = "softmax_topk"
    router_options: dict[str, Any] | None = None
    balancing: dict[str, Any] | None = None
    capacity_factor: float = 0.0
    expert_activation: str = "swiglu"
    expert_bias: bool = False
    num_shared_experts: int = 0
    shared_intermediate_size: int | None = None
    shared_gate: bool = False
    zero_computation_experts: dict[str, int] | None = None
    capacity_tau: float = 1.0
    iterations: int = 1
    expert_d_ffs: list[int] | None = None
    communication_width: int | None = None
    pre_gating: str = "none"
    qk_norm: bool = True
    attention_output_bias: bool | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.router_options = self.router_options or {}
        self.balancing = self.balancing or {}
        self.zero_computation_experts = self.zero_computation_experts or {}
        if self.pre_gating not in PRE_GATINGS:
            raise ConfigError(f"unknown pre_gating {self.pre_gating!r}: {did_you_mean(self.pre_gating, PRE_GATINGS)}")
        for name in _SIZES:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}: it must be at least 1")
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        if getattr(self, "head_dim", None) is None and self.hidden_size % heads:
            raise ConfigError(
                f"hidden_size (d_model) is {self.hidden_size}: num_attention_heads = {heads} must divide it"
            )
        if heads % kv_heads:
            raise ConfigError(f"num_attention_heads is {heads}: num_key_value_heads = {kv_heads} must divide it")
        self.moe_config()
        if not ROUTERS.get(self.router).decides:
            raise ConfigError(
                f"the router {self.router!r} decides nothing, and no layer would: name one that does, and "
                "pre_gating 'stack' for layers that take its routes"
            )
        if self.pre_gating == "stack":
            self._given(self.moe_config())

    def to_dict(self) -> dict[str, Any]:
        """What is saved: all settings but those that have no effect."""
        return {name: value for name, value in super().to_dict().items() if name not in _REPLACED}

    def is_sparse(self, layer: int) -> bool:
        """Whether the layer of that index has experts; otherwise its feed-forward is dense."""
        return layer not in (self.mlp_only_layers or []) and (layer + 1) % self.decoder_sparse_step == 0

    @property
    def first_sparse_layer(self) -> int | None:
        """The index of the first layer that has experts, if one has."""
        return next((layer for layer in range(self.num_hidden_layers) if self.is_sparse(layer)), None)

    def routes_ahead(self, layer: int) -> bool:
        """Whether the router of the layer of that index decides before the layer's attention."""
        return self.pre_gating == "layer" or (self.pre_gating == "stack" and layer == self.first_sparse_layer)

    def moe_config(self, layer: int | None = None) -> MoEConfig:
        """The settings of the MoE layer of that index, by default of the first one; checked on the way."""
        config = MoEConfig(
            d_model=self.hidden_size,
            d_ff=self.moe_intermediate_size,
            num_experts=self.num_experts,
            top_k=self.num_experts_per_tok,
            router=self.router,
            router_options=self.router_options or {},
            balancing=self.balancing or {},
            capacity_factor=self.capacity_factor,
            activation=self.expert_activation,
            bias=self.expert_bias,
            num_shared_experts=self.num_shared_experts,
            shared_d_ff=self.shared_intermediate_size,
            shared_gate=self.shared_gate,
            zero_computation_experts=self.zero_computation_experts or {},
            capacity_tau=self.capacity_tau,
            iterations=self.iterations,
            expert_d_ffs=self.expert_d_ffs,
            communication_width=self.communication_width,
        )
        is_given = self.pre_gating == "stack" and layer not in (None, self.first_sparse_layer)
        return self._given(config) if is_given else config

    @staticmethod
    def _given(config: MoEConfig) -> MoEConfig:
        # What balances the routes is for the layer that decides them.
        return replace(config, router="given", router_options={}, balancing={})
