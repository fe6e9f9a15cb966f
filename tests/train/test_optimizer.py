"""The learning rate of each step, and which parameters decay."""

from __future__ import annotations

import math

import pytest
import torch
from tests.train import tiny

from moesaic.train.model import build_model
from moesaic.train.optimizer import build_optimizer, learning_rate
from moesaic.train.recipe import TrainSettings


def settings(**changes: object) -> TrainSettings:
    return TrainSettings(
        **{"steps": 110, "warmup_steps": 10, "learning_rate": 1.0, "final_learning_rate": 0.2, **changes}
    )


def test_the_learning_rate_rises_linearly_and_falls_as_half_a_cosine() -> None:
    s = settings()
    assert [learning_rate(step, s) for step in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])
    # Half a cosine over the 100 steps after the 10 of warm-up: 1 at its start, 0.2 + 0.8 / 2 in the middle.
    assert learning_rate(10, s) == pytest.approx(1.0)
    assert learning_rate(60, s) == pytest.approx(0.6)
    assert learning_rate(35, s) == pytest.approx(0.2 + 0.8 * (1 + math.sqrt(0.5)) / 2)
    assert learning_rate(110, s) == pytest.approx(0.2)
    decay = [learning_rate(step, s) for step in range(10, 111)]
    assert decay == sorted(decay, reverse=True)


def test_without_warm_up_the_first_step_has_the_full_rate() -> None:
    assert learning_rate(0, settings(warmup_steps=0)) == 1.0


def test_a_run_that_is_all_warm_up_never_divides_by_zero() -> None:
    assert learning_rate(4, settings(steps=5, warmup_steps=5)) == 1.0


def test_matrices_decay_and_norms_biases_and_embeddings_do_not(corpus: list[str]) -> None:
    recipe = tiny.recipe(corpus, "expert_bias=true", "num_shared_experts=1", "tie_embeddings=false", "dense_layers=[0]")
    data = tiny.data_of(recipe)
    model = build_model(recipe, data.vocab_size, data.tokenizer, tiny.CPU)
    optimizer = build_optimizer(model, settings(weight_decay=0.3, betas=(0.7, 0.8), epsilon=1e-6))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decays = {names[id(p)]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert set(decays) == set(names.values())
    for name, decay in decays.items():
        kept = "norm" in name or name.endswith("bias") or "embed_tokens" in name
        assert decay == (0.0 if kept else 0.3), name
    assert sum(1 for decay in decays.values() if decay) >= 10
    assert sum(1 for name in decays if name.endswith("bias")) >= 2  # those are two-dimensional: one row per expert
    assert all(group["betas"] == (0.7, 0.8) and group["eps"] == 1e-6 for group in optimizer.param_groups)
    assert isinstance(optimizer, torch.optim.AdamW)


def test_tied_embeddings_do_not_decay(corpus: list[str]) -> None:
    recipe = tiny.recipe(corpus)
    data = tiny.data_of(recipe)
    model = build_model(recipe, data.vocab_size, data.tokenizer, tiny.CPU)
    decayed = build_optimizer(model, settings()).param_groups[0]["params"]
    assert all(parameter is not model.lm_head.weight for parameter in decayed)
