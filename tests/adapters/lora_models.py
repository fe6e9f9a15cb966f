"""Small models of every layout of experts, and low-rank adapters of them that change something."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GptOssConfig,
    MixtralConfig,
    OlmoeConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

import moesaic
from moesaic.adapters.lora import LoraAdapter, new_lora

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "initializer_range": 0.2,
}
QWEN: dict[str, Any] = {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}
CONFIGS: dict[str, Callable[[], Any]] = {
    "ours": lambda: moesaic.MoesaicConfig(**SIZES, **QWEN, head_dim=8, expert_bias=True),
    "olmoe": lambda: OlmoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2),
    "qwen3_moe": lambda: Qwen3MoeConfig(**SIZES, **QWEN, head_dim=8),
    "mixtral": lambda: MixtralConfig(**SIZES, num_local_experts=4),
    # experts stored transposed, with biases, gate and up interleaved
    "gpt_oss": lambda: GptOssConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2, head_dim=8),
    # a shared expert and dense projections beside the routed ones, of the same names
    "qwen2_moe": lambda: Qwen2MoeConfig(**SIZES, **QWEN, shared_expert_intermediate_size=24),
    # as wide as its experts: which of two factors comes first cannot be told by their shapes
    "square": lambda: MixtralConfig(**SIZES | {"intermediate_size": 32}, num_local_experts=4),
}
IDS = torch.arange(1, 15).view(2, 7)


def make(kind: str, implementation: str = "moesaic") -> PreTrainedModel:
    """The same weights at every call; in float32 and eval mode."""
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        CONFIGS[kind](), experts_implementation=implementation, attn_implementation="eager"
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def random_lora(
    model: PreTrainedModel,
    targets: str | Sequence[str] = "both",
    rank: int = 4,
    alpha: float = 8.0,
    experts: Mapping[str, Sequence[int]] | None = None,
    seed: int = 0,
) -> LoraAdapter:
    """As it would be after training: B is not zero."""
    adapter = new_lora(model, rank, alpha, targets, experts, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    parts = {
        name: replace(part, b=torch.randn(part.b.shape, generator=generator) * 0.1)
        for name, part in adapter.parts.items()
    }
    return replace(adapter, parts=parts)


@torch.no_grad()
def logits(model: torch.nn.Module, ids: Tensor = IDS) -> Tensor:
    out: Tensor = model(ids).logits
    return out
