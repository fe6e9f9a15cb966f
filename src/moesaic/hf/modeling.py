"""Our causal language model: transformers' Qwen3-MoE decoder with our MoE layer in place of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.models.qwen3_moe.modeling_qwen3_moe import (
    Qwen3MoeAttention,
    Qwen3MoeDecoderLayer,
    Qwen3MoeForCausalLM,
    Qwen3MoeMLP,
    Qwen3MoeModel,
    Qwen3MoePreTrainedModel,
    Qwen3MoeRMSNorm,
    Qwen3MoeRotaryEmbedding,
)
from transformers.utils.generic import can_return_tuple

from moesaic.errors import UnsupportedError
from moesaic.experts import ExpertBank
from moesaic.experts.kinds import ExpertKind
from moesaic.experts.width import WidthProjection
from moesaic.hf.causality import refuse_generation, refuses_batches, warn_of_training
from moesaic.hf.configuration import MoesaicConfig
from moesaic.layer import MoE, moe_layers
from moesaic.routing import LayerBalancing, RoutePath, Router

# The constructors below skip their parents' (``super(Parent, self).__init__``): those would first build Qwen3-MoE's own
# experts, most of the model's memory, only for us to throw them away.


class MoesaicAttention(Qwen3MoeAttention):
    """Qwen3-MoE's attention, and with ``qk_norm=False`` that of Llama, Mistral and Qwen2."""

    def __init__(self, config: MoesaicConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        if not config.qk_norm:
            self.q_norm = self.k_norm = nn.Identity()  # type: ignore[assignment]
        bias = config.attention_output_bias
        if bias is not None and bias != config.attention_bias:
            self.o_proj = nn.Linear(self.o_proj.in_features, self.o_proj.out_features, bias=bias)


class MoesaicDecoderLayer(Qwen3MoeDecoderLayer):
    """Attention and norms of Qwen3-MoE; the feed-forward is :class:`moesaic.MoE`, or dense where the config says so."""

    def __init__(self, config: MoesaicConfig, layer_idx: int) -> None:
        super(Qwen3MoeDecoderLayer, self).__init__()
        self.layer_idx, self.pre_gating = layer_idx, config.pre_gating
        self.routes_ahead = config.routes_ahead(layer_idx)
        self.hidden_size = config.hidden_size
        self.self_attn = MoesaicAttention(config, layer_idx)
        self.mlp: nn.Module  # type: ignore[assignment]
        if config.is_sparse(layer_idx):
            self.mlp = MoE(config.moe_config(layer_idx))
        else:
            self.mlp = Qwen3MoeMLP(config, config.intermediate_size)
        self.input_layernorm = Qwen3MoeRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = Qwen3MoeRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        *,
        token_mask: Tensor | None = None,
        route_path: RoutePath | None = None,
        **attention: Any,
    ) -> Tensor:
        """Qwen3-MoE's, and to the MoE layer go ``token_mask`` (``[B, S]`` boolean, False for padding) and, from
        ``route_path``, what its router may know. With pre-gating the routes are known before the attention begins."""
        path = route_path or RoutePath()
        context = path.context(self.layer_idx, hidden_states.device)
        if self.routes_ahead and isinstance(self.mlp, MoE):
            context.given = self.mlp.decide(hidden_states, token_mask=token_mask, context=context)
            path.given = context.given if self.pre_gating == "stack" else None
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **attention)
        hidden_states = hidden_states + attended
        normed = self.post_attention_layernorm(hidden_states)
        if not isinstance(self.mlp, MoE):
            return hidden_states + self.mlp(normed)  # type: ignore[no-any-return]
        hidden_states = hidden_states + self.mlp(normed, token_mask=token_mask, context=context)
        path.leave(self.layer_idx, context)
        return hidden_states


class MoesaicPreTrainedModel(Qwen3MoePreTrainedModel):
    """Initialization, and what may be recorded of a forward."""

    config_class = MoesaicConfig
    _no_split_modules = ["MoesaicDecoderLayer"]  # noqa: RUF012  (transformers' way)
    # Router logits are read from the layers' last_routing instead, see MoesaicForCausalLM.forward.
    _can_record_outputs = {"hidden_states": MoesaicDecoderLayer, "attentions": MoesaicAttention}  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, ExpertBank | Router | ExpertKind):
            module.reset_parameters(std)
        elif isinstance(module, LayerBalancing | WidthProjection):
            module.reset_parameters()
        else:
            super()._init_weights(module)  # type: ignore[no-untyped-call]


class MoesaicModel(MoesaicPreTrainedModel, Qwen3MoeModel):
    """The decoder without its head; forward, KV cache and attention masks are Qwen3-MoE's."""

    def __init__(self, config: MoesaicConfig) -> None:
        super(Qwen3MoeModel, self).__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(MoesaicDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = Qwen3MoeRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = Qwen3MoeRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        routers = [router for layer in moe_layers(self) for router in layer.routers]
        for router in routers[1:]:
            router.follow(routers[0])
        self.post_init()  # type: ignore[no-untyped-call]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> MoeModelOutputWithPast:
        """Qwen3-MoE's forward; padding gets no routed expert, takes no capacity and does not count in balancing.

        Args:
            attention_mask: ``[B, past + S]``, 0 for padding. One that is expanded to four dimensions already no longer
                says which tokens are padding: they are routed like all others.
        """
        inputs = input_ids if inputs_embeds is None else inputs_embeds
        if isinstance(attention_mask, Tensor) and attention_mask.ndim == 2 and inputs is not None:
            kwargs["token_mask"] = attention_mask[:, -inputs.shape[1] :].bool()
        kwargs["route_path"] = RoutePath(input_ids)
        return super().forward(  # type: ignore[no-any-return]
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )


@refuses_batches
class MoesaicForCausalLM(MoesaicPreTrainedModel, Qwen3MoeForCausalLM):
    """A decoder-only language model with moesaic's MoE layers; generation, saving and checkpointing are inherited."""

    def __init__(self, config: MoesaicConfig) -> None:
        super(Qwen3MoeForCausalLM, self).__init__(config)
        self.model = MoesaicModel(config)
        self.vocab_size = config.vocab_size
        self.num_experts = config.num_experts
        self.num_experts_per_tok = config.num_experts_per_tok
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()  # type: ignore[no-untyped-call]

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast:
        """Qwen3-MoE's forward; ``aux_loss`` is the sum of the balancing losses, and in ``loss`` where labels are. Under
        ``torch.inference_mode``, without labels, it is None.

        Args:
            input_ids: ``[B, S]`` int64. labels: ``[B, S]``, -100 where there is no loss; shifted inside.
            output_router_logits: also return each MoE layer's gate logits, ``[B·S, E]`` float32.
        """
        outputs: MoeCausalLMOutputWithPast = super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            output_router_logits=False,
            logits_to_keep=logits_to_keep,
            return_dict=True,
            **kwargs,
        )
        wanted = self.config.output_router_logits if output_router_logits is None else output_router_logits
        # Finding the layers takes longer than a step of generation should.
        traced = torch.compiler.is_compiling()  # which cannot ask for the mode
        needed = wanted or labels is not None or traced or not torch.is_inference_mode_enabled()
        layers = moe_layers(self) if needed else []
        if layers:
            # With the layers spread over devices, theirs may be another than the head's, where the loss is.
            anchor: Any = outputs.logits if outputs.loss is None else outputs.loss
            if self.training and not traced:
                warn_of_training(self, layers)
            outputs.aux_loss = torch.stack([layer.aux_loss.to(anchor.device) for layer in layers]).sum()
        if outputs.loss is not None and outputs.aux_loss is not None:
            outputs.loss = outputs.loss + outputs.aux_loss
        if wanted:
            outputs.router_logits = tuple(  # type: ignore[assignment]
                layer.last_routing.logits for layer in layers if layer.last_routing
            )
        return outputs

    def train(self, mode: bool = True) -> Self:
        """As of any module; warns of a router that looks at later tokens, which a compiled forward could not."""
        if mode:
            warn_of_training(self, moe_layers(self))
        return super().train(mode)  # type: ignore[no-any-return]

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Transformers' own; refused for a router that looks at later tokens (:class:`UnsupportedError`)."""
        refuse_generation(self)
        return super().generate(*args, **kwargs)  # type: ignore[misc]

    def _set_gradient_checkpointing(
        self,
        enable: bool = True,
        gradient_checkpointing_func: Callable[..., Any] = checkpoint,
        every_n_layers: int = 1,
    ) -> None:
        """Transformers' own; the re-entrant variant is refused: it would lose the gradients of the balancing losses."""
        if getattr(gradient_checkpointing_func, "keywords", {}).get("use_reentrant", False):
            raise UnsupportedError("gradient checkpointing with use_reentrant=True would lose the gradient of aux_loss")
        super()._set_gradient_checkpointing(enable, gradient_checkpointing_func, every_n_layers)
