"""Small base models with a tokenizer of the tiny corpus, ours and transformers', and recipes that tune them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedModel,
)

from moesaic import MoesaicConfig, MoesaicForCausalLM
from moesaic.adapters.recipe import FinetuneRecipe
from moesaic.data import prepare
from moesaic.train.recipe_file import load_recipe

SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
    "initializer_range": 0.2,
}
SETTINGS = [
    *["adapter.threshold=0.5", "adapter.sample_tokens=256", "data.sequence_length=16", "data.validation_fraction=0.2"],
    *["train.steps=8", "train.batch_size=4", "train.warmup_steps=2", "train.learning_rate=0.01", "train.save_every=4"],
    *["train.eval_tokens=128", "train.precision=fp32"],
]
MOE = ("ours", "mixtral", "olmoe")


def make(kind: str, seed: int = 0) -> PreTrainedModel:
    """A model in float32 with experts implementation ``"moesaic"``, in eval mode."""
    torch.manual_seed(seed)
    if kind == "ours":
        experts = {"moe_intermediate_size": 8, "num_experts": 4, "num_experts_per_tok": 2, "expert_bias": True}
        config = MoesaicConfig(**SIZES, head_dim=8, balancing={"load_balancing": 0.01}, **experts)
        return MoesaicForCausalLM(config).eval()
    made: PreTrainedModel
    if kind == "mixtral":
        made = MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4))
    elif kind == "olmoe":
        made = OlmoeForCausalLM(OlmoeConfig(**SIZES, num_experts=8, num_experts_per_tok=4))
    else:
        return LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    made.set_experts_implementation("moesaic")
    return made.eval()


def save(kind: str, folder: Path, sources: Sequence[str], dtype: torch.dtype = torch.float32) -> Path:
    """A base as ``moesaic finetune`` takes it: model and tokenizer in a folder."""
    tokenizer = prepare(sources, vocab_size=290, validation_fraction=0.2).tokenizer
    torch.nn.Module.to(make(kind), dtype=dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def recipe(base: Path, sources: Sequence[str], *overrides: str) -> FinetuneRecipe:
    chosen = [f"data.sources={list(sources)}", *SETTINGS, *overrides]
    if any(word.startswith("adapter.method=") and word != "adapter.method=esft" for word in chosen):
        chosen = [word for word in chosen if not word.startswith(("adapter.threshold", "adapter.sample_tokens"))]
    return load_recipe(None, [f"base={base}", *chosen], FinetuneRecipe)
