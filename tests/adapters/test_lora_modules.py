"""Attached low-rank parts compute, and are trained, as if they were in the weights; merged ones can be taken out."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from tests.adapters.lora_models import CONFIGS, IDS, logits, make, random_lora
from torch import Tensor, nn
from torch.func import functional_call

import moesaic
from moesaic.adapters.lora import LoraAdapter, find_targets, new_lora
from moesaic.adapters.lora_merge import merge_lora
from moesaic.adapters.lora_modules import attach_lora
from moesaic.errors import CheckpointError, ConfigError, UnsupportedError

KINDS = pytest.mark.parametrize("kind", list(CONFIGS))
SOME = {"model.layers.0.mlp.experts": [0, 2], "model.layers.1.mlp.experts": [3]}
CHOSEN = pytest.mark.parametrize("experts", [None, SOME], ids=["all", "chosen"])
Experts = dict[str, Sequence[int]] | None
Factors = dict[str, tuple[Tensor, Tensor]]


def dense_weights(
    model: nn.Module, adapter: LoraAdapter, factors: dict[str, tuple[Tensor, Tensor]]
) -> dict[str, Tensor]:
    """The model's weights plus scaling · B A, written out, as functions of the factors."""
    targets = find_targets(model)
    weights = dict(model.named_parameters())
    for name, part in adapter.parts.items():
        a, b = factors[name]
        delta = part.scaling * (b @ a)
        if targets[name].transposed:
            delta = delta.transpose(1, 2)
        if part.experts is not None:
            whole = torch.zeros_like(weights[name])
            delta = whole.index_put((torch.tensor(part.experts),), delta)
        weights[name] = weights[name] + delta
    return weights


def leaves(adapter: LoraAdapter) -> Factors:
    return {
        name: (part.a.clone().requires_grad_(), part.b.clone().requires_grad_()) for name, part in adapter.parts.items()
    }


@KINDS
@CHOSEN
def test_logits_and_gradients_are_those_of_the_merged_weights(kind: str, experts: Experts) -> None:
    model = make(kind)
    adapter = random_lora(model, experts=experts, rank=3)
    factors = leaves(adapter)
    wanted = functional_call(model, dense_weights(model, adapter, factors), (IDS,)).logits
    wanted.logsumexp(-1).square().sum().backward()
    model.zero_grad()
    model.requires_grad_(False)
    attached = attach_lora(model, adapter)
    got = model(IDS).logits
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)
    got.logsumexp(-1).square().sum().backward()
    trained = dict(model.named_parameters())
    names = [name for name, parameter in trained.items() if parameter.requires_grad]
    assert len(names) == len(list(attached.parameters())) == 2 * len(adapter.parts)
    for name, (a, b) in factors.items():
        path, _, parameter = name.rpartition(".")
        stem = f"{path}.low_rank" if parameter == "weight" else f"{path}.low_rank.parts.{parameter}"
        for factor, leaf in (("a", a), ("b", b)):
            assert leaf.grad is not None and trained[f"{stem}.{factor}"].grad is not None
            scale = leaf.grad.abs().max().clamp(min=1e-6)
            torch.testing.assert_close(trained[f"{stem}.{factor}"].grad / scale, leaf.grad / scale, rtol=0, atol=1e-4)
    assert all(parameter.grad is None for name, parameter in trained.items() if name not in names)


@KINDS
def test_without_gradients_it_is_the_same(kind: str) -> None:
    model, adapter = make(kind), random_lora(make(kind), experts=SOME)
    with_gradients = functional_call(model, dense_weights(model, adapter, leaves(adapter)), (IDS,)).logits
    attach_lora(model, adapter)
    torch.testing.assert_close(logits(model), with_gradients.detach(), rtol=0, atol=1e-5)


@KINDS
def test_removed_the_model_is_what_it_was(kind: str) -> None:
    model = make(kind)
    keys, before = list(model.state_dict()), logits(model)
    attached = attach_lora(model, random_lora(model))
    assert not torch.equal(logits(model), before)
    attached.remove()
    assert torch.equal(logits(model), before) and list(model.state_dict()) == keys
    assert not any(module._forward_hooks for module in model.modules())
    attach_lora(model, random_lora(model)).remove()


@KINDS
@CHOSEN
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_changes_the_named_matrices_and_removing_restores_every_bit(
    kind: str, experts: Experts, dtype: torch.dtype
) -> None:
    model = make(kind)
    adapter = random_lora(model, experts=experts, alpha=30)
    wanted = functional_call(model, dense_weights(model, adapter, leaves(adapter)), (IDS,)).logits.detach()
    nn.Module.to(model, dtype=dtype)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    merged = merge_lora(model, adapter)
    if dtype == torch.float32:
        torch.testing.assert_close(logits(model), wanted, rtol=0, atol=1e-5)
    for name, value in model.state_dict().items():
        part = adapter.parts.get(name)
        if part is None:
            assert torch.equal(value, before[name]), name
        elif part.experts is not None:
            same = [torch.equal(one, other) for one, other in zip(value, before[name], strict=True)]
            assert same == [expert not in part.experts for expert in range(len(value))]
        else:
            assert not torch.equal(value, before[name]), name
    merged.remove()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    merged.remove()  # nothing is left to restore


def test_a_fresh_adapter_changes_nothing_and_is_drawn_by_its_seed() -> None:
    model = make("olmoe")
    before = logits(model)
    adapter = new_lora(model, rank=4, alpha=8, targets="both", seed=3)
    attached = attach_lora(model, adapter)
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-6)
    for part in adapter.parts.values():
        bound = part.a.shape[-1] ** -0.5
        assert 0.9 * bound < part.a.abs().max() <= bound and not part.b.any() and part.scaling == 2
    again, other = (new_lora(model, rank=4, alpha=8, targets="both", seed=seed) for seed in (3, 4))
    for name, part in attached.adapter().parts.items():
        assert torch.equal(part.a, again.parts[name].a) and not torch.equal(part.a, other.parts[name].a)


def test_what_is_read_back_is_what_was_trained() -> None:
    model = make("qwen3_moe")
    attached = attach_lora(model, random_lora(model))
    with torch.no_grad():
        for parameter in attached.parameters():
            parameter.mul_(1.5)
    trained, wanted = attached.adapter(), logits(model)
    with torch.no_grad():
        next(attached.parameters()).zero_()
    attached.remove()
    attach_lora(model, trained)
    assert torch.equal(logits(model), wanted)


def test_a_model_with_parts_can_be_copied_and_pickled() -> None:
    model = make("ours")
    attached = attach_lora(model, random_lora(model))
    wanted = logits(model)
    copies = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    attached.remove()
    for each in copies:
        assert torch.equal(logits(each), wanted)


def test_under_autocast_it_trains_in_bfloat16() -> None:
    model = make("olmoe")
    adapter = random_lora(model)
    wanted = functional_call(model, dense_weights(model, adapter, leaves(adapter)), (IDS,)).logits
    model.requires_grad_(False)
    attached = attach_lora(model, adapter)
    with torch.autocast("cpu", torch.bfloat16):
        got = model(IDS).logits
        got.float().sum().backward()
    assert ((got - wanted).norm() / wanted.norm()) < 0.05
    assert all(each.dtype == torch.float32 and each.grad is not None for each in attached.parameters())


@pytest.mark.parametrize("kind", ["ours", "mixtral"])
def test_quantized_experts_take_parts_beside_their_codes(kind: str) -> None:
    model = moesaic.quantize(make(kind), "int8")
    adapter = random_lora(model)
    attached = attach_lora(model, adapter)
    got = logits(model)
    attached.remove()
    floats = copy.deepcopy(model).dequantize()
    merge_lora(floats, adapter)
    torch.testing.assert_close(got, logits(floats), rtol=0, atol=1e-4)
    with pytest.raises(UnsupportedError, match="is quantized: an adapter cannot be merged"):
        merge_lora(model, adapter)


def test_a_weight_that_two_modules_share_is_not_merged_into() -> None:
    model = make("olmoe")
    model.lm_head.weight = model.model.embed_tokens.weight
    adapter = random_lora(model, targets=["lm_head", "q_proj"])
    before = logits(model)
    with pytest.raises(UnsupportedError, match=r"lm_head.weight is also model.embed_tokens.weight"):
        merge_lora(model, adapter)
    assert torch.equal(logits(model), before)


def test_targets_are_named_as_one_likes() -> None:
    model = make("qwen2_moe")

    def names(targets: str | list[str]) -> set[str]:
        return {".".join(name.split(".")[3:]) for name in new_lora(model, 2, 2, targets).parts}

    attention = {f"self_attn.{each}_proj.weight" for each in "qkvo"}
    experts = {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"}
    assert names("attention") == attention and names("experts") == experts and names("both") == attention | experts
    assert names("experts.down_proj") == {"mlp.experts.down_proj"}
    assert names(["q_proj", "shared_expert.down_proj"]) == {
        "self_attn.q_proj.weight",
        "mlp.shared_expert.down_proj.weight",
    }
    with pytest.raises(ConfigError, match=r"is called 'k_prj': allowed: experts.down_proj, .*self_attn.k_proj"):
        new_lora(model, 2, 2, ["k_prj"])


def test_what_does_not_fit_is_refused() -> None:
    model = make("olmoe")
    with pytest.raises(ConfigError, match="rank must be at least 1"):
        new_lora(model, 0, 2)
    with pytest.raises(ConfigError, match=r"has experts 0 ... 3; the part's are \[4\]"):
        new_lora(model, 2, 2, "experts", {"model.layers.0.mlp.experts": [4]})
    with pytest.raises(ConfigError, match="would be empty"):
        new_lora(model, 2, 2, "experts", {})
    with pytest.raises(ConfigError, match="no experts that LoRA"):
        new_lora(nn.Sequential(nn.Linear(2, 2)), 2, 2, "experts")
    adapter = random_lora(model)
    attach_lora(model, adapter)
    with pytest.raises(ConfigError, match="has a low-rank adapter attached already"):
        attach_lora(model, adapter)
    with pytest.raises(UnsupportedError, match="experts_implementation='moesaic'"):
        attach_lora(make("olmoe", "eager"), adapter)
    narrow = {name: replace(part, a=part.a[..., 1:]) for name, part in adapter.parts.items()}
    with pytest.raises(CheckpointError, match="takes A and B of shapes"):
        attach_lora(make("olmoe"), LoraAdapter(narrow))
