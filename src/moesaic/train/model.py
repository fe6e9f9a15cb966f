"""A recipe's ``[model]`` to a model, and the checks that come before any long work."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from moesaic.data import TokenData
from moesaic.errors import ConfigError
from moesaic.hf import MoesaicConfig, MoesaicForCausalLM
from moesaic.layer import moe_layers
from moesaic.routing.schedule import with_steps
from moesaic.train.recipe import Recipe, TrainSettings

_COUNTED = 1 << 24
"""Tokens that are counted at a time."""


def check(recipe: Recipe) -> None:
    """Refuse settings that are each allowed but do not go together.

    Raises:
        ConfigError: which names the keys, their values and what must hold.
    """
    model, data = recipe.model, recipe.data
    divides = [
        ("model.d_model", model.d_model, "model.num_heads", model.num_heads),
        ("model.num_heads", model.num_heads, "model.num_kv_heads", model.num_kv_heads),
    ]
    for whole, value, part, divisor in divides:
        if value % divisor:
            raise ConfigError(f"{whole} is {value}: {part} = {divisor} must divide it")
    choices = ("model.num_experts", model.num_experts)
    if model.zero_computation_experts:
        choices = ("the number of experts of all kinds", choices[1] + sum(model.zero_computation_experts.values()))
    at_most = [
        ("model.top_k", model.top_k, *choices),
        ("data.sequence_length", data.sequence_length, "model.max_length", model.max_length),
    ]
    for name, value, limit_name, limit in at_most:
        if value > limit:
            raise ConfigError(f"{name} is {value}: it must be at most {limit_name} = {limit}")
    if (model.d_model // model.num_heads) % 2:
        raise ConfigError(
            f"model.d_model / model.num_heads is {model.d_model // model.num_heads}: "
            "it must be even, because rotary embeddings turn pairs of features"
        )
    if beyond := [layer for layer in model.dense_layers if layer >= model.num_layers]:
        raise ConfigError(
            f"model.dense_layers names layer {beyond[0]}: it must be below num_layers = {model.num_layers}"
        )
    check_train(recipe.train)
    build_config(recipe, data.vocab_size)


def check_train(train: TrainSettings) -> None:
    """Refuse settings of ``[train]`` that do not go together, or with this machine; raises :class:`ConfigError`."""
    if train.batch_size % train.accumulation:
        raise ConfigError(
            f"train.batch_size is {train.batch_size}: train.accumulation = {train.accumulation} must divide it"
        )
    if train.warmup > train.steps:
        raise ConfigError(f"train.warmup_steps is {train.warmup}: it must be at most train.steps = {train.steps}")
    cores = os.cpu_count() or 1
    if train.threads > cores:
        raise ConfigError(
            f"train.threads is {train.threads}: it must be at most {cores}, the CPU cores of this machine"
        )


def build_config(recipe: Recipe, vocab_size: int, tokenizer: PreTrainedTokenizerBase | None = None) -> MoesaicConfig:
    """The model's configuration; ``tokenizer`` gives the ids that begin and end a text.

    Raises:
        ConfigError: for an unknown router, activation, balancer or option, and for settings that do not go together.
    """
    m = recipe.model
    # No pad_token_id: a padding row of the embedding gets no gradient, and ours is the end-of-text token.
    settings: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": m.d_model,
        "num_hidden_layers": m.num_layers,
        "num_attention_heads": m.num_heads,
        "num_key_value_heads": m.num_kv_heads,
        "head_dim": m.d_model // m.num_heads,
        "moe_intermediate_size": m.d_ff,
        "num_experts": m.num_experts,
        "num_experts_per_tok": m.top_k,
        "router": m.router,
        "router_options": dict(m.router_options),
        "balancing": with_steps(m.balancing, recipe.train.steps),
        "capacity_factor": m.capacity_factor,
        "expert_activation": m.activation,
        "expert_bias": m.expert_bias,
        "num_shared_experts": m.num_shared_experts,
        "shared_intermediate_size": m.shared_d_ff,
        "shared_gate": m.shared_gate,
        "zero_computation_experts": dict(m.zero_computation_experts),
        "capacity_tau": m.capacity_tau,
        "iterations": m.iterations,
        "expert_d_ffs": m.expert_d_ffs,
        "communication_width": m.communication_width,
        "pre_gating": m.pre_gating,
        "mlp_only_layers": list(m.dense_layers),
        "intermediate_size": m.dense_d_ff or m.top_k * m.d_ff,
        "tie_word_embeddings": m.tie_embeddings,
        "max_position_embeddings": m.max_length,
        "rope_parameters": {"rope_type": "default", "rope_theta": m.rope_theta},
        "initializer_range": m.init_std,
        "eos_token_id": tokenizer.eos_token_id if tokenizer else None,
        "bos_token_id": tokenizer.bos_token_id if tokenizer else None,
    }
    return MoesaicConfig(**settings)


def build_model(
    recipe: Recipe, vocab_size: int, tokenizer: PreTrainedTokenizerBase, device: torch.device
) -> MoesaicForCausalLM:
    """A freshly initialized model in float32, drawn on the CPU with ``train.seed`` from PyTorch's generator.

    Raises:
        ConfigError: where there is not enough memory for it.
    """
    torch.manual_seed(recipe.train.seed)
    config = build_config(recipe, vocab_size, tokenizer)
    try:
        model = MoesaicForCausalLM(config)
        nn.Module.to(model, device, torch.float32)
    except (RuntimeError, TypeError, MemoryError) as error:
        if not _is_too_large(error):
            raise
        raise ConfigError(
            f"there is not enough memory for the model: {_needed(config)}; choose smaller sizes in [model]"
        ) from error
    model.generation_config.pad_token_id = tokenizer.pad_token_id or tokenizer.eos_token_id
    return model


def tell_frequencies(model: nn.Module, data: TokenData, mixture: Mapping[str, float]) -> None:
    """Tell routers that go by it (``wants_frequencies``, as hash routing's ``by_frequency``) how often each token id
    occurs in the text that the model will be trained on; :meth:`moesaic.routing.hash.Hash.assign`.

    Args:
        mixture: the share of each domain that takes part, by name.

    Raises:
        ConfigError: where the router is for another number of token ids than the tokenizer has.
    """
    routers = [router for layer in moe_layers(model) for router in layer.routers]
    wanting = [router for router in routers if getattr(router, "wants_frequencies", False)]
    if not wanting:
        return
    total = np.zeros(data.vocab_size)
    for name, share in mixture.items():
        ids = data.train[name]
        for start in range(0, len(ids), _COUNTED):  # the whole of a large corpus would not fit
            counts = np.bincount(ids[start : start + _COUNTED], minlength=data.vocab_size)
            total += share / len(ids) * counts
    for router in wanting:
        if router.vocab_size != data.vocab_size:
            raise ConfigError(
                f"model.router_options.vocab_size is {router.vocab_size}: with by_frequency it must be "
                f"{data.vocab_size}, the entries of the tokenizer"
            )
        router.assign(torch.from_numpy(total))  # type: ignore[operator]


def _is_too_large(error: Exception) -> bool:
    # PyTorch's allocator for the CPU has no exception of its own, and neither have sizes beyond 64 bits.
    told = ("can't allocate memory", "Storage size calculation overflowed", "Overflow when unpacking")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(part in str(error) for part in told)


def _needed(config: MoesaicConfig) -> str:
    try:
        with torch.device("meta"):
            count = sum(parameter.numel() for parameter in MoesaicForCausalLM(config).parameters())
    except (RuntimeError, TypeError):
        return "its parameters are too many to count in 64 bits"
    return f"its {count:,} parameters need {4 * count / 2**30:,.1f} GiB, and training them about four times as much"


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(all parameters, those that one token meets at most: see :meth:`moesaic.MoE.idle_parameters`)."""
    total = sum(parameter.numel() for parameter in model.parameters())
    return total, total - sum(layer.idle_parameters() for layer in moe_layers(model))
