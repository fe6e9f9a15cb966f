"""Tuned experts compute what the whole layer would with their rows in it, and get its gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.adapters import bases
from torch import Tensor, nn
from transformers import GptOssConfig, GptOssForCausalLM, PreTrainedModel

from moesaic import MoesaicConfig, MoesaicForCausalLM, use_backend
from moesaic.adapters.tuned import TunedExperts
from moesaic.errors import UnsupportedError
from moesaic.hf.quantized import expert_modules

IDS = torch.randint(0, 290, (2, 10), generator=torch.Generator().manual_seed(0))
CHOICES = [[1], [0, 2], [0, 1, 2, 3]]


def gpt_oss() -> PreTrainedModel:
    """Experts with biases, stored transposed, gate and up interleaved, with a gate of their own."""
    torch.manual_seed(0)
    model = GptOssForCausalLM(GptOssConfig(**bases.SIZES, num_local_experts=4, num_experts_per_tok=2, head_dim=8))
    model.set_experts_implementation("moesaic")
    with torch.no_grad():
        for module in expert_modules(model).values():
            for parameter in module.parameters():
                parameter.normal_(std=0.3)
    return model.eval()


def make(kind: str) -> PreTrainedModel:
    return gpt_oss() if kind == "gpt_oss" else bases.make(kind)


def tune(model: PreTrainedModel, experts: list[int]) -> dict[str, TunedExperts]:
    """What the method does to a model, with the same experts in every layer."""
    model.requires_grad_(False)
    tuned = {name: TunedExperts(module, experts) for name, module in expert_modules(model).items()}
    for name, module in expert_modules(model).items():
        module.add_module("tuned", tuned[name])
    return tuned


def loss_of(model: PreTrainedModel) -> Tensor:
    return nn.functional.cross_entropy(model(input_ids=IDS[:, :-1]).logits.flatten(0, 1), IDS[:, 1:].flatten())


@pytest.mark.parametrize("kind", [*bases.MOE, "gpt_oss"])
@pytest.mark.parametrize("experts", CHOICES, ids=str)
@pytest.mark.parametrize("backend", ["loop", "grouped", "auto"])
def test_outputs_and_gradients_are_those_of_the_whole_layer(kind: str, experts: list[int], backend: str) -> None:
    with use_backend(backend):
        whole, parted = make(kind), make(kind)
        loss_of(whole).backward()
        tuned = tune(parted, experts)
        loss = loss_of(parted)
        loss.backward()
        assert loss.item() == pytest.approx(loss_of(whole).item(), rel=1e-5)
    trained = {name for name, parameter in parted.named_parameters() if parameter.requires_grad}
    assert trained and all(".experts.tuned." in name for name in trained)
    for name, module in expert_modules(whole).items():
        for key, parameter in module.named_parameters(recurse=False):
            wanted = parameter.grad
            assert wanted is not None
            found = tuned[name].get_parameter(key).grad
            assert found is not None
            assert (found - wanted[experts]).norm() <= 1e-4 * wanted.norm() + 1e-9, (name, key)


@pytest.mark.parametrize("kind", ["ours", "olmoe"])
def test_new_rows_count_and_put_back_is_exact(kind: str) -> None:
    model = make(kind)
    tuned = tune(model, [0, 3])
    before = {name: value.clone() for name, value in model.state_dict().items() if ".tuned." not in name}
    base_loss = loss_of(model).item()
    with torch.no_grad():
        for part in tuned.values():
            for parameter in part.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.3)
    parted = loss_of(model).item()
    assert parted != pytest.approx(base_loss, rel=1e-4)
    for name, module in expert_modules(model).items():
        tuned[name].put_back(module, torch.float32)
    assert loss_of(model).item() == pytest.approx(parted, rel=1e-5)
    for name, value in model.state_dict().items():
        if ".tuned." in name:
            continue
        path, _, key = name.rpartition(".")
        rows = tuned[path].get_parameter(key) if path in tuned else None
        for expert in range(len(value)) if rows is not None else ():
            wanted = rows[[0, 3].index(expert)] if expert in (0, 3) else before[name][expert]
            assert torch.equal(value[expert], wanted)
        if rows is None:
            assert torch.equal(value, before[name])


def test_no_token_for_the_tuned_experts_is_no_gradient() -> None:
    model = make("ours")
    tune(model, [0])
    for layer in model.modules():
        if hasattr(layer, "router"):
            layer.router.weight.data.fill_(0)  # every expert alike: the lowest ids win
    chosen: list[Any] = []
    model.model.layers[0].mlp.register_forward_hook(lambda layer, args, out: chosen.append(layer.last_routing.counts()))
    loss = loss_of(model)
    unused = next(expert for expert in range(4) if not chosen[0][expert])
    model = make("ours")
    for layer in model.modules():
        if hasattr(layer, "router"):
            layer.router.weight.data.fill_(0)
    tuned = tune(model, [unused])
    again = loss_of(model)
    again.backward()
    assert again.item() == pytest.approx(loss.item(), rel=1e-6)
    gradients = [p.grad for part in tuned.values() for p in part.parameters()]
    assert all(gradient is None or not gradient.any() for gradient in gradients)


@pytest.mark.parametrize("factor", [0.6, -0.6])
def test_a_capacity_limit_holds_in_both_parts(factor: float) -> None:
    torch.manual_seed(0)
    experts = {"moe_intermediate_size": 8, "num_experts": 4, "num_experts_per_tok": 2}
    config = MoesaicConfig(**bases.SIZES, head_dim=8, capacity_factor=factor, **experts)
    model = MoesaicForCausalLM(config).eval()
    wanted = loss_of(model).item()
    tune(model, [1, 2])
    assert loss_of(model).item() == pytest.approx(wanted, rel=1e-5)


def test_autocast_and_gradient_checkpointing_go_with_it() -> None:
    model = make("ours")
    tuned = tune(model, [1, 2])
    model.train()
    loss_of(model).backward()
    wanted = [p.grad.clone() for part in tuned.values() for p in part.parameters() if p.grad is not None]
    model.zero_grad()
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    loss_of(model).backward()
    found = [p.grad for part in tuned.values() for p in part.parameters() if p.grad is not None]
    assert len(found) == len(wanted) > 0
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))
    with torch.autocast("cpu", torch.bfloat16):
        assert loss_of(model).item() == pytest.approx(loss_of(model.eval()).item(), rel=2e-2)


def test_another_experts_implementation_is_refused() -> None:
    model = make("olmoe")
    model.set_experts_implementation("eager")
    with pytest.raises(UnsupportedError, match="the model has 'eager'"):
        tune(model, [0])
