"""From ``[model]`` to a model: what is refused before any long work, and what is built."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.train import tiny

from moesaic.errors import ConfigError
from moesaic.hf import MoesaicForCausalLM
from moesaic.layer import moe_layers
from moesaic.routing import RoutingContext
from moesaic.train import run
from moesaic.train.model import build_config, build_model, check, count_parameters, tell_frequencies
from moesaic.train.recipe import Recipe
from moesaic.train.recipe_file import load_recipe

# Each is allowed by itself; together they are not.
MISTAKES = [
    (["top_k=5", "num_experts=4"], "model.top_k is 5: it must be at most model.num_experts = 4"),
    (["d_model=250", "num_heads=4", "num_kv_heads=2"], "model.d_model is 250: model.num_heads = 4 must divide it"),
    (["d_model=256", "num_heads=4", "num_kv_heads=3"], "model.num_heads is 4: model.num_kv_heads = 3 must divide it"),
    (["d_model=12", "num_heads=4"], "model.d_model / model.num_heads is 3: it must be even"),
    (["batch_size=6", "accumulation=4"], "train.batch_size is 6: train.accumulation = 4 must divide it"),
    (["sequence_length=4096"], "data.sequence_length is 4096: it must be at most model.max_length = 1024"),
    (["steps=5", "warmup_steps=6"], "train.warmup_steps is 6: it must be at most train.steps = 5"),
    (["threads=3"], "train.threads is 3: it must be at most 2, the CPU cores of this machine"),
    (["dense_layers=[0, 4]"], "model.dense_layers names layer 4: it must be below num_layers = 4"),
    (["router=softmax"], "unknown router 'softmax': did you mean 'softmax_topk'?"),
    (["activation=swigloo"], "unknown activation 'swigloo': did you mean 'swiglu'?"),
    (["model.balancing.zloss=1"], "unknown balancer 'zloss': did you mean 'z_loss'?"),
    (["model.balancing.bias_update=0.01"], "'bias_update' needs a router with a selection_bias"),
    (["model.router_options.normalise=true"], "no option 'normalise': did you mean 'normalize'?"),
    (["model.balancing.z_loss=-1"], "the coefficient of balancer 'z_loss' is -1"),
]


@pytest.mark.parametrize(("words", "expected"), MISTAKES, ids=lambda value: str(value)[:40])
def test_settings_that_do_not_go_together_are_refused(
    words: list[str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    with pytest.raises(ConfigError) as raised:
        check(load_recipe(None, words))
    assert expected in str(raised.value)


def test_every_setting_reaches_the_model(corpus: list[str]) -> None:
    words = ["router=sigmoid_topk", "model.router_options.num_groups=2", "model.balancing={bias_update=0.1}", "top_k=1"]
    words += ["capacity_factor=1.5", "activation=gelu", "expert_bias=true", "num_shared_experts=2", "shared_d_ff=10"]
    words += ["shared_gate=true", "dense_layers=[0]", "dense_d_ff=40", "tie_embeddings=false", "rope_theta=500.0"]
    recipe = tiny.recipe(corpus, *words, "init_std=0.1")
    data = tiny.data_of(recipe)
    model = build_model(recipe, data.vocab_size, data.tokenizer, tiny.CPU)
    (layer,) = moe_layers(model)
    c = layer.config
    assert (c.router, c.router_options, c.balancing, c.top_k) == (
        "sigmoid_topk",
        {"num_groups": 2},
        {"bias_update": 0.1},
        1,
    )
    assert (c.d_model, c.d_ff, c.num_experts, c.capacity_factor) == (32, 24, 4, 1.5)
    assert (c.activation, c.bias) == ("gelu", True)
    assert (c.num_shared_experts, c.shared_d_ff, c.shared_gate) == (2, 10, True)
    assert model.model.layers[0].mlp.up_proj.weight.shape == (40, 32)
    assert model.model.layers[0].self_attn.q_proj.weight.shape == (32, 32)
    assert model.model.layers[0].self_attn.k_proj.weight.shape == (16, 32)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert model.config.rope_parameters["rope_theta"] == 500.0
    assert model.config.max_position_embeddings == 64
    assert model.lm_head.weight.std().item() == pytest.approx(0.1, rel=0.05)
    assert model.lm_head.weight.shape == (300, 32)


def test_a_dense_layer_is_as_wide_as_the_experts_that_a_token_meets() -> None:
    assert build_config(load_recipe(None, ["top_k=3", "d_ff=100"]), 300).intermediate_size == 300


def test_the_end_of_text_token_is_set_and_its_embedding_is_trained(recipe: Recipe) -> None:
    data = tiny.data_of(recipe)
    model = build_model(recipe, data.vocab_size, data.tokenizer, tiny.CPU)
    end = data.tokenizer.eos_token_id
    assert model.config.eos_token_id == model.config.bos_token_id == end
    assert model.generation_config.eos_token_id == model.generation_config.pad_token_id == end
    model(input_ids=torch.tensor([[end, end]]), labels=torch.tensor([[end, end]])).loss.backward()
    assert model.model.embed_tokens.weight.grad[end].abs().sum() > 0


def test_a_model_that_is_too_large_for_the_memory_is_explained(corpus: list[str]) -> None:
    # More than the 2^47 bytes that a process may address, so that no machine tries.
    recipe = tiny.recipe(corpus, "d_ff=1000000000000", "num_layers=1")
    data = tiny.data_of(recipe)
    with pytest.raises(ConfigError, match="not enough memory for the model") as raised:
        build_model(recipe, data.vocab_size, data.tokenizer, tiny.CPU)
    told = re.search(r"its ([\d,]+) parameters need ([\d,.]+) GiB", str(raised.value))
    assert told is not None
    count, gib = (float(number.replace(",", "")) for number in told.groups())
    experts = 4 * 3 * 32 * 10**12
    assert count == pytest.approx(experts, rel=1e-9)
    assert gib == pytest.approx(4 * experts / 2**30, rel=1e-6)


@pytest.mark.parametrize("size", [10**18, 10**30])
def test_sizes_beyond_64_bits_are_explained(corpus: list[str], size: int) -> None:
    recipe = tiny.recipe(corpus, f"d_ff={size}")
    data = tiny.data_of(recipe)
    with pytest.raises(ConfigError, match="not enough memory for the model: its parameters are too many to count"):
        build_model(recipe, data.vocab_size, data.tokenizer, tiny.CPU)


def test_the_seed_decides_the_weights(corpus: list[str]) -> None:
    def weights(seed: int) -> torch.Tensor:
        recipe = tiny.recipe(corpus, f"train.seed={seed}")
        data = tiny.data_of(recipe)
        return build_model(recipe, data.vocab_size, data.tokenizer, tiny.CPU).lm_head.weight

    assert torch.equal(weights(3), weights(3))
    assert not torch.equal(weights(3), weights(4))


def test_parameters_that_a_token_meets(recipe: Recipe) -> None:
    data = tiny.data_of(recipe)
    model = build_model(recipe, data.vocab_size, data.tokenizer, tiny.CPU)
    total, active = count_parameters(model)
    expert = 3 * 32 * 24
    assert total == sum(p.numel() for p in model.parameters())
    assert total - active == 2 * (4 - 2) * expert  # two layers, two of four experts idle


HASH = ["router=hash", "balancing={}", "top_k=1", "model.router_options.vocab_size=300"]


def test_a_hash_by_frequency_is_told_the_training_text_and_saved(corpus: list[str], out: Path) -> None:
    mixture = {"words": 0.5, "sums": 0.5}  # which they are by the row, too
    recipe = tiny.recipe(corpus, *HASH, "model.router_options.by_frequency=true", "steps=1", "warmup_steps=0")
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"mixture": mixture})})
    run.train(recipe, out)
    data = tiny.data_of(recipe)
    frequencies = np.zeros(300)
    for name, share in mixture.items():
        ids, counts = np.unique(data.train[name], return_counts=True)
        frequencies[ids] += share / counts.sum() * counts
    loads, expert_of = [0.0] * 4, [0] * 300
    for token in sorted(range(300), key=lambda token: -frequencies[token]):
        expert_of[token] = loads.index(min(loads))
        loads[expert_of[token]] += frequencies[token]
    saved = MoesaicForCausalLM.from_pretrained(out / "model")
    for layer in moe_layers(saved):
        context = RoutingContext(token_ids=torch.arange(300))
        assert layer.router(torch.zeros(300, 32), None, context).expert_ids[:, 0].tolist() == expert_of


def test_a_hash_by_frequency_is_for_the_tokenizers_entries(corpus: list[str]) -> None:
    recipe = tiny.recipe(corpus, *HASH, "model.router_options={vocab_size=301, by_frequency=true}")
    data = tiny.data_of(recipe)
    model = build_model(recipe, data.vocab_size, data.tokenizer, tiny.CPU)
    with pytest.raises(ConfigError, match="vocab_size is 301: with by_frequency it must be 300, the entries of the"):
        tell_frequencies(model, data, {"words": 1.0})
