"""Routers over ranks whose choice is no function of the token alone: noise, ids, and experts that choose."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tests.hf.parallel_models import SIZES, largest_errors, mine, tokens
from tests.parallel import harness
from torch.distributed.tensor import DTensor

import moesaic
from moesaic.parallel import use_strategy

STRATEGIES = ["tokens", "weights", "hybrid"]


def build(**settings: Any) -> moesaic.MoesaicForCausalLM:
    torch.manual_seed(0)
    sizes = {**SIZES, "moe_intermediate_size": 12, "num_experts": 4, "head_dim": 8, "initializer_range": 0.2}
    model = moesaic.MoesaicForCausalLM(moesaic.MoesaicConfig(**{**sizes, **settings}))
    for name, parameter in model.named_parameters():  # noisy top-k begins with zeros
        if "router" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    model.zero_grad()
    torch.manual_seed(3)
    ids = mine(tokens(4))
    model(ids, labels=ids).loss.backward()
    found = {}
    for name, parameter in model.named_parameters():
        assert isinstance(parameter.grad, DTensor), name
        found[name] = parameter.grad.full_tensor()
    return found


def recomputed(strategy: str) -> tuple[float, float]:
    """The largest difference that recomputation makes, and that other noise makes."""
    model = build(router="noisy_topk", balancing={"importance": 0.1, "load": 0.1}).train()
    moesaic.parallelize(model)
    with use_strategy(strategy):
        wanted = gradients(model)
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        got = gradients(model)
    model.eval()
    with torch.no_grad():  # evaluation is without noise
        assert torch.equal(model(mine(tokens(4))).logits, model(mine(tokens(4))).logits)
    largest = max(float((got[name] - wanted[name]).abs().max()) for name in wanted)
    return largest, max(float(wanted[name].abs().max()) for name in wanted if "noise_weight" in name)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_noise_is_the_same_in_the_recomputation(strategy: str) -> None:
    for difference, size in harness.pool(2).run(recomputed, strategy):
        assert difference < 1e-6
        assert size > 1e-4


def evaluated(settings: dict[str, Any]) -> float:
    model = build(**settings).eval()
    with torch.no_grad():
        wanted = model(mine(tokens(4))).logits
        moesaic.parallelize(model)
        return float((model(mine(tokens(4))).logits - wanted).abs().max())


@pytest.mark.parametrize(
    "settings",
    [
        {"router": "noisy_topk"},
        {"router": "hash"},
        {"router": "hash", "router_options": {"vocab_size": 64}, "num_experts_per_tok": 3},
        {"router": "expert_choice", "num_experts_per_tok": 4},
    ],
    ids=str,
)
def test_each_rank_gets_what_its_tokens_get_in_one_process(settings: dict[str, Any]) -> None:
    """Experts choose among the tokens of a rank for themselves."""
    assert max(harness.pool(2).run(evaluated, settings)) < 1e-5


def hashed() -> dict[str, float]:
    model, batch = build(router="hash").train(), tokens(4)
    alone = copy.deepcopy(model)
    alone(batch, labels=batch).loss.backward()
    moesaic.parallelize(model)
    model(mine(batch), labels=mine(batch)).loss.backward()
    return largest_errors(model, alone)


def test_a_router_without_parameters() -> None:
    for errors in harness.pool(2).run(hashed):
        assert max(errors.values()) < 1e-5, errors
