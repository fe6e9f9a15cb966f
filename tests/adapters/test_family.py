"""Adapters of models with other kinds of layers: tuned experts, low-rank parts, and mixed batches of both."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.adapters.lora_models import QWEN, SIZES, random_lora
from tests.adapters.test_pool import logits, per_token, prompts, write
from tests.hf.family import FAMILY
from transformers import PreTrainedModel

from moesaic import MoE, MoesaicConfig, MoesaicForCausalLM
from moesaic.adapters import esft, merge, score_experts
from moesaic.adapters.lora_format import save_lora
from moesaic.adapters.pool import AdapterPool
from moesaic.adapters.tuned import TunedExperts
from moesaic.hf.quantized import expert_modules

LAYERS = [f"model.layers.{layer}.mlp.experts" for layer in range(2)]
ALL = pytest.mark.parametrize("variant", FAMILY)


def make(variant: str) -> PreTrainedModel:
    torch.manual_seed(0)
    settings: dict[str, Any] = {**SIZES, **QWEN, "head_dim": 8, **FAMILY[variant]}
    return MoesaicForCausalLM(MoesaicConfig(**settings)).eval()


@ALL
def test_a_mixed_batch_equals_each_merged_model_alone(variant: str, tmp_path: Path) -> None:
    model, ids = make(variant), prompts()
    folders = [write(model, tmp_path / "experts", 1, lambda *_: [0]), tmp_path / "low rank"]
    save_lora(folders[1], random_lora(model, seed=2), model)
    alone = [logits(model, ids)]
    for folder in folders:
        merged = copy.deepcopy(model)
        merge(merged, folder)
        alone.append(logits(merged, ids))
    pool = AdapterPool(model)
    indices = [0, *(pool.load(folder.name.replace(" ", "-"), folder) for folder in folders)]
    mix = [0, 1, 2, 2, 1, 0]
    with pool.using(per_token([indices[each] for each in mix])):
        got = logits(model, ids)
    wanted = torch.stack([alone[adapter][row] for row, adapter in enumerate(mix)])
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    pool.close()
    assert torch.equal(logits(model, ids), alone[0])


@ALL
def test_tuned_experts_get_the_gradients_of_the_whole(variant: str) -> None:
    ids = prompts()
    whole, parted = make(variant), make(variant)
    whole(ids, labels=ids).loss.backward()
    parted.requires_grad_(False)
    tuned = {name: TunedExperts(module, [0]) for name, module in expert_modules(parted).items()}
    for name, module in expert_modules(parted).items():
        module.add_module("tuned", tuned[name])
    parted(ids, labels=ids).loss.backward()
    for name, module in expert_modules(whole).items():
        for key, parameter in module.named_parameters(recurse=False):
            found = tuned[name].get_parameter(key).grad
            if parameter.grad is None:
                assert found is None or not found.any()
                continue
            assert found is not None
            torch.testing.assert_close(found, parameter.grad[[0]], rtol=1e-4, atol=1e-6, msg=f"{name}.{key}")


@ALL
def test_experts_are_scored(variant: str) -> None:
    model = make(variant)
    batches = [prompts(seed=seed) for seed in range(3)]
    scores = score_experts(model, batches)
    assert list(scores) == list(expert_modules(model))
    # All experts of a layer, of whatever size, are compared: with the weights that its routers gave them.
    wanted: dict[str, torch.Tensor] = {}
    for batch in batches:
        model.base_model(input_ids=batch)
        for name, layer in model.named_modules():
            for routing in layer.last_routings if isinstance(layer, MoE) else ():
                given = torch.zeros(routing.num_experts + 1, dtype=torch.float64)
                given.index_add_(0, routing.expert_ids.flatten(), routing.weights.detach().double().flatten())
                wanted[name] = wanted.get(name, torch.zeros(())) + given[: layer.config.num_experts]
    for name, sums in wanted.items():
        found = [score for path, own in scores.items() if path.startswith(f"{name}.experts") for score in own]
        assert found == pytest.approx((sums / sums.sum()).tolist(), abs=1e-6)


@pytest.mark.parametrize(("threshold", "expected"), [(0.5, {"banks.1": [1]}), (0.85, {"banks.0": [0], "banks.1": [1]})])
def test_the_most_used_experts_of_a_layer_are_tuned_whatever_their_size(
    threshold: float, expected: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    told = {"banks.0": [0.3, 0.05], "banks.1": [0.05, 0.6]}
    model = make("unequal")
    scores = {f"{name}.{bank}": own for name in LAYERS for bank, own in told.items()}
    assert list(scores) == list(expert_modules(model))
    monkeypatch.setattr(esft, "score_experts", lambda *_: scores)
    task: Any = SimpleNamespace(precision="fp32", batches=None)
    layers = esft.relevant_layers(model, esft.EsftSettings(threshold=threshold), task)
    assert {name: layer.experts for name, layer in layers.items()} == {
        f"{name}.{bank}": ids for name in LAYERS for bank, ids in expected.items()
    }
    for name, layer in layers.items():
        assert (layer.scores, layer.num_experts) == ([scores[name][expert] for expert in layer.experts], 2)
