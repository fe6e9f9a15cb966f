"""Whole layers and models over ranks by every kind of plan: against loops in float64, and against one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests import reference as layer_reference
from tests.parallel import harness, layers
from tests.parallel.cases import Shape, Workload, sample
from torch import Tensor

TOLERANCE = 1e-5
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "sliced": {"num_experts": 2},
    "biases": {"bias": True, "activation": "relu"},
    "capacity": {"capacity_factor": 0.6, "bias": True},
    "capped": {"capacity_factor": -0.5, "num_experts": 2, "top_k": 1},
    "shared": {"num_shared_experts": 2, "shared_gate": True, "num_experts": 2},
    "sigmoid": {"router": "sigmoid_topk", "router_options": {"num_groups": 2, "top_groups": 1}},
    "three of 12": {"num_experts": 12, "top_k": 3, "activation": "geglu"},
}


def wanted_of(settings: dict[str, Any], tokens: list[int]) -> tuple[list[Tensor], list[Tensor], dict[str, Tensor]]:
    """Outputs and gradients of each rank's tokens, and the mean of the parameters' gradients over the ranks."""
    layer = layers.layer_of(settings)
    names = layer_reference.Settings.__dataclass_fields__
    formula = layer_reference.Settings(**{name: getattr(layer.config, name) for name in names})
    parameters = {name: value.detach().double() for name, value in layer.state_dict().items()}
    learned = {name: parameters[name].requires_grad_() for name, _ in layer.named_parameters()}
    outputs, gradients = [], []
    for rank, number in enumerate(tokens):
        x_TD, upstream_TD = layers.features(rank, number)
        x_TD = x_TD.double().requires_grad_()
        answer = layer_reference.moe(x_TD, parameters, formula)
        assert answer.margin > 1e-5  # else float32 may route otherwise
        answer.output.backward(upstream_TD.double())
        outputs.append(answer.output.detach())
        gradients.append(x_TD.grad if x_TD.grad is not None else torch.zeros_like(x_TD))
    means = {name: p.grad / len(tokens) for name, p in learned.items() if p.grad is not None}
    return outputs, gradients, means


def off(got: Tensor, wanted: Tensor, floor: float = 1e-3) -> float:
    return ((got.double() - wanted).norm() / wanted.norm().clamp(min=floor)).item()


QUICK = {"sliced", "capped"}  # on four ranks


@pytest.mark.parametrize(
    ("ranks", "name"),
    [
        pytest.param(ranks, name, marks=[] if ranks < 4 or name in QUICK else pytest.mark.slow)
        for ranks in (2, 3, 4)
        for name in SETTINGS
    ],
)
def test_layer_against_the_formulas(ranks: int, name: str) -> None:
    settings, tokens = SETTINGS[name], [7, 0, 4, 9][:ranks]
    outputs, gradients, means = wanted_of(settings, tokens)
    like = Workload(Shape(settings.get("num_experts", 8)), ranks)
    some = [plan for plan in sample(like, 12) if plan.exchange == "direct"][:5]  # the ranks are on one host
    told = harness.pool(ranks).run(layers.run_layer, settings, tokens, some)
    for index, plan in enumerate(some):
        for rank, answers in enumerate(told):
            y_TD, grad_TD, parameters = answers[index]
            assert off(y_TD, outputs[rank]) < TOLERANCE, plan
            assert off(grad_TD, gradients[rank]) < TOLERANCE, plan
            for parameter, mean in means.items():
                got = parameters.get(parameter, torch.zeros(())).reshape(mean.shape)
                assert off(got, mean, floor=0.01) < TOLERANCE, f"{plan}: {parameter}"


@pytest.mark.parametrize(
    ("kind", "num_experts", "ranks"), [("gpt_oss", 4, 2), ("olmoe", 5, 3), ("mixtral", 2, 4), ("moesaic", 8, 4)]
)
def test_models_of_transformers(kind: str, num_experts: int, ranks: int) -> None:
    like = Workload(Shape(num_experts), ranks)
    some = [plan for plan in sample(like, 12) if plan.exchange == "direct"][:4]
    for worst in harness.pool(ranks).run(layers.run_model, kind, num_experts, some):
        assert max(worst) < TOLERANCE, dict(zip(some, worst, strict=True))
