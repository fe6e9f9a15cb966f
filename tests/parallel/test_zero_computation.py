"""Zero-computation experts over ranks: outputs, losses and gradients are those of one process, whatever travels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests import zero_computation
from tests.parallel import harness
from tests.parallel.layers import WIDTH, features, layer_of, whole_gradients
from torch import Tensor

import moesaic
from moesaic import MoE
from moesaic.parallel import traffic, use_strategy
from moesaic.routing import RoutingContext

MIXED = {"constant": 2, "copy": 1, "zero": 1}
SETTINGS: dict[str, dict[str, Any]] = {
    "null experts": {
        "router": "null_experts",
        "zero_computation_experts": {"zero": 5},
        "top_k": 4,
        "balancing": {"null_load_balancing": 0.5},
    },
    "gating residual": {
        "router": "gating_residual",
        "zero_computation_experts": MIXED,
        "top_k": 3,
        "balancing": {"heterogeneous_load_balancing": {"coefficient": 0.5, "tau": 0.6}},
    },
    "capped": {
        "zero_computation_experts": MIXED,
        "top_k": 3,
        "capacity_factor": -0.6,
        "capacity_tau": 0.5,
        "balancing": {"load_balancing": 0.5},
    },
    "sliced": {
        "num_experts": 2,
        "zero_computation_experts": {"copy": 3},
        "top_k": 3,
        "balancing": {"heterogeneous_load_balancing": 0.5},
    },
}
TOKENS = [6, 6, 6, 6]


def built(settings: Mapping[str, Any]) -> MoE:
    layer = layer_of(settings)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if "zero_computation" in name or name == "router.residual":
                parameter.normal_()
    return layer


def carried_of(rank: int, layer: MoE, tokens: int) -> Tensor | None:
    """What a layer before might have left."""
    if layer.config.router != "gating_residual":
        return None
    return torch.randn(tokens, layer.config.num_choices, generator=torch.Generator().manual_seed(200 + rank))


def run(
    settings: Mapping[str, Any], strategies: Sequence[str]
) -> list[tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]]:
    """On a rank, by each strategy: output, loss, gradient of its tokens, gradients of all parameters."""
    layer = moesaic.parallelize(built(settings))
    rank = dist.get_rank()
    answers = []
    for strategy in strategies:
        x_TD, upstream_TD = features(rank, TOKENS[rank])
        x_TD.requires_grad_()
        layer.zero_grad()
        with use_strategy(strategy):
            y_TD = layer(x_TD, context=RoutingContext(carried=carried_of(rank, layer, TOKENS[rank])))
            ((y_TD * upstream_TD).sum() + layer.aux_loss).backward()
        assert x_TD.grad is not None
        answers.append((y_TD.detach(), layer.aux_loss.detach(), x_TD.grad, whole_gradients(layer)))
    return answers


@pytest.mark.parametrize(
    ("ranks", "name"),
    [
        pytest.param(ranks, name, marks=[] if ranks == 3 and name != "capped" else pytest.mark.slow)
        for ranks in (2, 3, 4)
        for name in SETTINGS
    ],
)
def test_a_layer_against_the_formulas(ranks: int, name: str) -> None:
    """The losses go by the slots of all ranks, and are averaged over equally many tokens: those of one process."""
    layer = built(SETTINGS[name])
    parameters = {name: value.detach().double().requires_grad_() for name, value in layer.named_parameters()}
    parts = []
    for rank in range(ranks):
        x_TD, upstream_TD = (each.double() for each in features(rank, TOKENS[rank]))
        before = carried_of(rank, layer, TOKENS[rank])
        parts.append((x_TD.requires_grad_(), upstream_TD, None if before is None else list(before.double())))

    def answered(counts: list[int] | None) -> list[zero_computation.Answer]:
        return [zero_computation.moe(x, parameters, layer.config, before, counts) for x, _, before in parts]

    counts = [sum(each) for each in zip(*(answer.counts for answer in answered(None)), strict=True)]
    answers = answered(counts)
    assert min(answer.margin for answer in answers) > 1e-5
    for answer, (_, upstream_TD, _) in zip(answers, parts, strict=True):
        ((answer.output * upstream_TD).sum() + answer.aux_loss).backward()

    if layer.config.capacity_factor == 0:  # a rank grants capacity among its own tokens
        everyone = torch.cat([x for x, _, _ in parts])
        before = [row for _, _, own in parts for row in own or []]
        whole = zero_computation.moe(everyone, parameters, layer.config, before or None)
        mean = sum(answer.aux_loss for answer in answers) / ranks
        torch.testing.assert_close(mean, whole.aux_loss)

    for rank, told in enumerate(harness.pool(ranks).run(run, SETTINGS[name], ["tokens", "weights", "auto"])):
        for y_TD, loss, grad_TD, gradients in told:
            torch.testing.assert_close(y_TD.double(), answers[rank].output.detach(), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(loss.double(), answers[rank].aux_loss.detach(), rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(grad_TD.double(), parts[rank][0].grad, rtol=1e-4, atol=1e-5)
            for parameter, value in parameters.items():
                wanted = torch.zeros_like(value) if value.grad is None else value.grad / ranks
                got = gradients.get(parameter, torch.zeros(wanted.shape)).reshape(wanted.shape)
                torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-4, msg=parameter)


def test_what_costs_nothing_does_not_travel() -> None:
    """Tokens that chose only copies and zeros are on nobody's way."""
    for true, sent in harness.pool(2).run(travelled):
        assert sent == true


def travelled() -> tuple[int, int]:
    """Rows that this rank has to send, and those that it sent."""
    settings = {"router": "null_experts", "zero_computation_experts": {"zero": 4, "copy": 4}, "top_k": 2}
    layer = moesaic.parallelize(built(settings))
    x_TD = torch.randn(60, WIDTH, generator=torch.Generator().manual_seed(dist.get_rank()))
    with torch.no_grad(), use_strategy("tokens", overlap=1, exchange="direct"):
        layer(x_TD)
        before = traffic()["results"]
        layer(x_TD)
    assert layer.last_routing is not None
    ids = layer.last_routing.expert_ids
    other = [range(4, 8), range(4)][dist.get_rank()]
    mine = int(((ids >= other.start) & (ids < other.stop)).any(dim=1).sum())
    told = torch.zeros(2, dtype=torch.int64)
    told[dist.get_rank()] = mine
    dist.all_reduce(told)
    # Results go back to who asked: this rank sends as many rows as the other one has sent to it.
    return int(told[1 - dist.get_rank()]) * WIDTH * 4, traffic()["results"] - before
