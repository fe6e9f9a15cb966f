"""A model of ours that takes a fraction of a second, and what the tests of this folder ask of any."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moesaic import MoesaicConfig, MoesaicForCausalLM

SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
EXPERTS: dict[str, Any] = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}


def config_of(**changes: Any) -> MoesaicConfig:
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return MoesaicConfig(**{**SIZES, **EXPERTS, **ids, **changes})


def model_of(**changes: Any) -> MoesaicForCausalLM:
    torch.manual_seed(0)
    return MoesaicForCausalLM(config_of(**changes)).eval()


def tokens(rows: int = 2, length: int = 12) -> Tensor:
    return torch.randint(3, 50, (rows, length), generator=torch.Generator().manual_seed(0))


def gradients(model: nn.Module, seed: int = 1) -> dict[str, Tensor]:
    """Of every parameter that has one, and "loss"; ``seed`` is of what a router draws."""
    model.zero_grad()
    torch.manual_seed(seed)
    loss = model(tokens(), labels=tokens()).loss
    loss.backward()
    return {"loss": loss.detach()} | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def enable_recomputation(model: PreTrainedModel, options: dict[str, Any] | None = None) -> None:
    """Transformers 5.23 has renamed it; the older name still works there, with a warning."""
    name = "activation_checkpointing_enable"
    method = getattr(model, name if hasattr(model, name) else "gradient_checkpointing_enable")
    method(options) if options else method()


@torch.no_grad()
def check_the_cache_changes_nothing(model: PreTrainedModel, atol: float = 1e-5) -> None:
    """Token by token, from the fifth on, the logits are those of the whole."""
    ids = tokens()
    whole = model(ids).logits
    first = model(ids[:, :5], use_cache=True)
    pieces, cache = [first.logits], first.past_key_values
    for t in range(5, ids.shape[1]):
        pieces.append(model(ids[:, t : t + 1], past_key_values=cache, use_cache=True).logits)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-4, atol=atol)
