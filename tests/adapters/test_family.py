"""Adapters of models with other kinds of layers: tuned experts, low-rank parts, and mixed batches of both."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.adapters.lora_models import QWEN, SIZES, random_lora
from tests.adapters.test_pool import logits, per_token, prompts, write
from tests.hf.family import FAMILY
from transformers import PreTrainedModel

from moesaic import MoesaicConfig, MoesaicForCausalLM
from moesaic.adapters import merge, score_experts
from moesaic.adapters.lora_format import save_lora
from moesaic.adapters.pool import AdapterPool
from moesaic.adapters.tuned import TunedExperts
from moesaic.hf.quantized import expert_modules

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
    scores = score_experts(make(variant), [prompts(seed=seed) for seed in range(3)])
    assert scores.keys() == expert_modules(make(variant)).keys()
    assert all(sum(each) == pytest.approx(1.0) for each in scores.values())
