"""Tiny mixtures of experts on disk, whose experts are used unequally."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tests.convert.models import SIZES, save
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import moesaic  # noqa: F401  (registers our own model)

FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 6},
    "qwen3_moe": {"num_experts": 6, "moe_intermediate_size": 24, "mlp_only_layers": [1], "num_hidden_layers": 3},
    "olmoe": {"num_experts": 6},
    "qwen2_moe": {"num_experts": 6, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 16},
    "gpt_oss": {"num_local_experts": 6},
    "moesaic": {"num_experts": 6, "moe_intermediate_size": 24, "num_shared_experts": 1},
}


def mixture(family: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random model of six experts a layer, two a token, in evaluation mode."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **{**SIZES, "num_experts_per_tok": 2, **FAMILIES.get(family, {}), **changes})
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.normal_(1.0, 0.2)
            elif "bias" in name or "scale" in name or "sinks" in name:
                parameter.normal_(0.0, 0.3)
            else:
                parameter.normal_(0.0, 0.3 if "experts" in name else 0.15)
    return model.eval()


def mixture_folder(folder: Path, family: str, seed: int = 0, **changes: Any) -> Path:
    """:func:`mixture` on disk, with the byte tokenizer."""
    return save(mixture(family, seed, **changes), folder)


def text_file(path: Path, words: int = 300) -> Path:
    """Some text, about six bytes a word."""
    path.write_text(" ".join(f"word {number * 7919 % 1000} of" for number in range(words)))
    return path
