"""Our checkpoint as a plain Qwen3-MoE one, which transformers, vLLM and others read without moesaic."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from moesaic.errors import UnsupportedError
from moesaic.hf.configuration import MoesaicConfig
from moesaic.hf.load import load_model
from moesaic.hf.modeling import MoesaicForCausalLM
from moesaic.hf.save import check_new, save_folder
from moesaic.routing.schedule import schedule_of

# Our parameter names, and Qwen3-MoE's for the same tensors.
_RENAMED = {
    "mlp.router.weight": "mlp.gate.weight",
    "mlp.experts.up": "mlp.experts.gate_up_proj",
    "mlp.experts.down": "mlp.experts.down_proj",
}


def export_qwen3_moe(model: MoesaicForCausalLM) -> Qwen3MoeForCausalLM:
    """The same function as a :class:`transformers.Qwen3MoeForCausalLM`; its tensors are the model's own, not copies.

    Training there goes on with the balancing loss of the same size; ``z_loss`` and ``bias_update`` have no counterpart
    and are left out, for they change nothing that the model computes.

    Raises:
        UnsupportedError: where the experts are quantized, or a setting has no counterpart there; the message names
            every such setting.
    """
    config: Any = model.config
    if getattr(model, "is_quantized", False):
        raise UnsupportedError("Qwen3-MoE has no quantized experts: call model.dequantize() first")
    if reasons := obstacles(config):
        raise UnsupportedError(f"this model cannot be written as Qwen3-MoE: {'; '.join(reasons)}")
    # Not only what Qwen3MoeConfig declares: it reads some settings, such as head_dim, where they are there.
    plain = {key: value for key, value in config.to_dict().items() if key not in MoesaicConfig.__annotations__}
    plain |= {
        "model_type": Qwen3MoeConfig.model_type,
        "architectures": ["Qwen3MoeForCausalLM"],
        "norm_topk_prob": (config.router_options or {}).get("normalize", True),
        "hidden_act": "silu",
        "router_aux_loss_coef": _aux_loss_coefficient(config),
    }
    with torch.device("meta"):
        exported = Qwen3MoeForCausalLM(Qwen3MoeConfig.from_dict(plain))
    state = {_renamed(name): tensor for name, tensor in model.state_dict().items() if ".balancing." not in name}
    exported.load_state_dict(state, assign=True)
    exported.tie_weights()
    exported.model.rotary_emb = model.model.rotary_emb  # its frequencies are computed, not stored
    exported.generation_config = model.generation_config
    exported.eval()
    return exported


def _aux_loss_coefficient(config: MoesaicConfig) -> float:
    """Ours is 1 per layer for an even load, and summed; Qwen3-MoE's is K, over the tokens of all layers together."""
    sparse_layers = sum(config.is_sparse(layer) for layer in range(config.num_hidden_layers))
    entries = {name: (config.balancing or {}).get(name, 0.0) for name in ("load_balancing", "global_load_balancing")}
    schedules = [schedule_of(name, entry) for name, entry in entries.items()]
    # Of one that varies, where it ends.
    coefficient = sum(each.coefficient if each.final is None else each.final for each in schedules)
    return coefficient * sparse_layers / config.num_experts_per_tok


def obstacles(config: MoesaicConfig) -> list[str]:
    """The settings that Qwen3-MoE cannot express, each with its value and what would be allowed."""
    checks = [
        ("router", config.router, "softmax_topk"),
        ("expert_activation", config.expert_activation, "swiglu"),
        ("expert_bias", config.expert_bias, False),
        ("num_shared_experts", config.num_shared_experts, 0),
        ("capacity_factor", config.capacity_factor, 0.0),
        ("zero_computation_experts", config.zero_computation_experts or {}, {}),
        ("iterations", config.iterations, 1),
        ("expert_d_ffs", config.expert_d_ffs, None),
        ("communication_width", config.communication_width, None),
        ("pre_gating", config.pre_gating, "none"),
        ("qk_norm", config.qk_norm, True),
    ]
    reasons = [
        f"{name} is {value!r}, only {allowed!r} is possible" for name, value, allowed in checks if value != allowed
    ]
    if config.attention_output_bias not in (None, config.attention_bias):
        reasons.append(
            f"attention_output_bias is {config.attention_output_bias}, only attention_bias = {config.attention_bias} "
            "is possible"
        )
    any_dense = not all(config.is_sparse(layer) for layer in range(config.num_hidden_layers))
    if config.hidden_act != "silu" and any_dense:
        reasons.append(f"hidden_act of the dense layers is {config.hidden_act!r}, only 'silu' is possible")
    return reasons


def _renamed(name: str) -> str:
    for ours, theirs in _RENAMED.items():
        if name.endswith(ours):
            return name.removesuffix(ours) + theirs
    return name


def export_folder(path: str | Path, out: str | Path) -> Path:
    """Load our model or run at ``path``, and write it with its tokenizer as a Qwen3-MoE folder at ``out``.

    The folder appears when it is complete, or not at all. Quantized experts are written as floats, with the values that
    their codes stand for.

    Raises:
        CheckpointError: where ``path`` cannot be read, or ``out`` exists already.
        UnsupportedError: where the model is not ours, or a setting has no counterpart.
        UsageError: where the folder cannot be written.
    """
    check_new(out)
    model, tokenizer = load_model(path, device="cpu")
    if not isinstance(model, MoesaicForCausalLM):
        raise UnsupportedError(
            f"{str(path)!r} holds a {type(model).__name__}; only a MoesaicForCausalLM can be exported"
        )
    if getattr(model, "is_quantized", False):
        model.dequantize()  # type: ignore[no-untyped-call]
    return save_folder(export_qwen3_moe(model), tokenizer, out)
