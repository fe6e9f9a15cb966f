"""Tiny models of several kinds, and what ranks of a pool do with them."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import moesaic

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}
F = 12  # hidden width of an expert


def build(kind: str, num_experts: int) -> PreTrainedModel:
    """The same weights in every process."""
    torch.manual_seed(0)
    if kind == "moesaic":
        balancing = {"load_balancing": 0.1, "z_loss": 0.01}
        return moesaic.MoesaicForCausalLM(
            moesaic.MoesaicConfig(
                **SIZES, moe_intermediate_size=F, num_experts=num_experts, head_dim=8, balancing=balancing
            )
        )
    if kind == "olmoe":
        return OlmoeForCausalLM(OlmoeConfig(**SIZES, intermediate_size=F, num_experts=num_experts))
    if kind == "mixtral":
        return MixtralForCausalLM(MixtralConfig(**SIZES, intermediate_size=F, num_local_experts=num_experts))
    if kind == "qwen3_moe":  # with tied embeddings
        return Qwen3MoeForCausalLM(
            Qwen3MoeConfig(
                **SIZES, moe_intermediate_size=F, num_experts=num_experts, head_dim=8, tie_word_embeddings=True
            )
        )
    assert kind == "gpt_oss"  # transposed, interleaved, with biases
    return GptOssForCausalLM(
        GptOssConfig(
            **SIZES,
            intermediate_size=F,
            num_local_experts=num_experts,
            head_dim=8,
            layer_types=["full_attention"] * 2,
            attn_implementation="eager",
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        )
    )


def tokens(sequences: int, seed: int = 1) -> Tensor:
    """``[sequences, 8]``."""
    return torch.randint(1, 64, (sequences, 8), generator=torch.Generator().manual_seed(seed))


def mine(batch: Tensor) -> Tensor:
    """This rank's equal share of a batch; all of it in one process."""
    if not dist.is_initialized():
        return batch
    return batch.chunk(dist.get_world_size())[dist.get_rank()]


def largest_errors(model: nn.Module, alone: nn.Module) -> dict[str, float]:
    """Of the gradients that ranks have, against those of one process, in parts of the largest."""
    wanted = dict(alone.named_parameters())
    errors = {}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        assert isinstance(parameter, DTensor) and isinstance(gradient, DTensor), name
        expected = wanted[name].grad
        assert expected is not None, name
        error = gradient.full_tensor().reshape(expected.shape) - expected
        errors[name] = float(error.abs().max() / expected.abs().max().clamp(min=1e-3))
    return errors


def compare(kind: str, num_experts: int, options: dict[str, Any]) -> dict[str, float]:
    """Logits and gradients of a model over ranks against the same model in one process: the largest errors."""
    model = build(kind, num_experts)
    alone, batch = copy.deepcopy(model), tokens(2 * dist.get_world_size())
    expected = alone(batch, labels=batch)
    expected.loss.backward()
    assert moesaic.parallelize(model, **options) is model
    output = model(mine(batch), labels=mine(batch))
    output.loss.backward()
    errors = largest_errors(model, alone)
    errors["logits"] = float((output.logits - mine(expected.logits)).abs().max())
    return errors
