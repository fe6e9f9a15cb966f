"""What every rank does with whole layers and models: run them by prescribed plans, train them, count what is sent.

T tokens · D model width.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from tests.hf import parallel_models
from tests.parallel.cases import Workload
from tests.parallel.ranks import Grid, experts_of, own_tensors
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import moesaic
from moesaic import MoE, MoEConfig
from moesaic.parallel import Plan, replay, traffic, use_strategy

WIDTH = 8


def layer_of(settings: Mapping[str, Any]) -> MoE:
    """The same in every process, with a router that spreads its scores and biases that are not zero."""
    torch.manual_seed(0)
    layer = MoE(MoEConfig(**{"d_model": WIDTH, "d_ff": 10, "num_experts": 8, "top_k": 2, **settings}))
    with torch.no_grad():
        layer.router.weight.mul_(25)
        for name, parameter in layer.named_parameters():
            if "bias" in name:
                parameter.normal_()
    return layer


def features(rank: int, tokens: int) -> tuple[Tensor, Tensor]:
    """A rank's tokens, and the gradient of their output."""
    generator = torch.Generator().manual_seed(100 + rank)
    x_TD, upstream_TD = torch.randn(2, tokens, WIDTH, generator=generator)
    return x_TD, upstream_TD


def whole_gradients(module: nn.Module) -> dict[str, Tensor]:
    """Of DTensors, as a module in one process has them; those of experts in their canonical shape."""
    gradients = {}
    for name, parameter in module.named_parameters():
        if parameter.grad is not None:
            assert isinstance(parameter.grad, DTensor), name
            gradients[name] = parameter.grad.full_tensor()
    return gradients


def run_layer(
    settings: Mapping[str, Any], tokens: Sequence[int], plans: Sequence[Plan]
) -> list[tuple[Tensor, Tensor, dict[str, Tensor]]]:
    """For each plan this rank's output, the gradient of its tokens, and those of all parameters."""
    layer = moesaic.parallelize(layer_of(settings))
    rank = dist.get_rank()
    answers = []
    for plan in plans:
        x_TD, upstream_TD = features(rank, tokens[rank])
        x_TD.requires_grad_()
        layer.zero_grad()
        with replay([plan]):
            y_TD = layer(x_TD)
            y_TD.backward(upstream_TD)
        assert layer.last_decision.plan == plan
        assert x_TD.grad is not None
        answers.append((y_TD.detach(), x_TD.grad, whole_gradients(layer)))
    return answers


def run_model(kind: str, num_experts: int, plans: Sequence[Plan]) -> list[float]:
    """For each plan the largest error of logits and gradients of a whole model against one process; its layers have
    the plan and those that follow it."""
    model = parallel_models.build(kind, num_experts)
    alone, batch = copy.deepcopy(model), parallel_models.tokens(2 * dist.get_world_size())
    expected = alone(batch, labels=batch)
    expected.loss.backward()
    moesaic.parallelize(model)
    mine, worst = parallel_models.mine(batch), []
    for index in range(len(plans)):
        model.zero_grad()
        with replay([*plans[index:], *plans[:index]]):
            output = model(mine, labels=mine)
            output.loss.backward()
        errors = parallel_models.largest_errors(model, alone)
        off = float((output.logits - parallel_models.mine(expected.logits)).detach().abs().max())
        worst.append(max(off, *errors.values()))
    return worst


# ----------------------------------------------------------------------------------------------------------- training


class Net(nn.Module):
    """Two MoE layers in a residual stream."""

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        settings = {"num_experts": num_experts, "balancing": {"load_balancing": 0.01, "z_loss": 0.001}}
        self.first, self.second = layer_of(settings), layer_of({**settings, "activation": "geglu", "bias": True})
        self.between, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        x_TD = x_TD + self.first(x_TD)
        x_TD = torch.tanh(self.between(x_TD))
        y_TD = self.head(x_TD + self.second(x_TD))
        return y_TD, self.first.aux_loss + self.second.aux_loss


def net(num_experts: int) -> Net:
    torch.manual_seed(3)
    return Net(num_experts)


def switching(steps: int) -> Iterator[AbstractContextManager[None]]:
    """Another strategy at every step; each of them comes often."""
    choices: list[dict[str, Any]] = [
        {"strategy": "tokens", "overlap": 1},
        {"strategy": "weights", "gather": "relay"},
        {"strategy": "hybrid", "gather": "direct", "overlap": 2},
        {"strategy": "tokens", "overlap": 4},
        {"strategy": "auto"},
        {"strategy": "weights", "gather": "direct"},
        {"strategy": "hybrid", "overlap": 1},
    ]
    for choice in itertools.islice(itertools.cycle(choices), steps):
        yield use_strategy(**choice)


def staying(strategy: str, steps: int) -> Iterator[AbstractContextManager[None]]:
    for _ in range(steps):
        yield use_strategy(strategy)


def train(num_experts: int, steps: int, batch: int, strategy: str | None) -> tuple[list[float], set[str]]:
    """Losses of a run over ranks, or of one process for ``"alone"``, and the strategies that its first layer met.

    Args:
        strategy: None to switch at every step.
    """
    model = net(num_experts)
    ranks, rank = 1, 0
    settings: Iterator[AbstractContextManager[None]] = itertools.repeat(nullcontext(), steps)
    if strategy != "alone":
        ranks, rank = dist.get_world_size(), dist.get_rank()
        moesaic.parallelize(model)
        settings = switching(steps) if strategy is None else staying(strategy, steps)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, foreach=False)
    teacher = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(4))
    losses, met = [], set()
    for step, setting in enumerate(settings):
        x_TD = torch.randn(batch, WIDTH, generator=torch.Generator().manual_seed(step)).chunk(ranks)[rank]
        with setting:
            optimizer.zero_grad()
            y_TD, aux_loss = model(x_TD)
            loss = (y_TD - torch.sin(x_TD @ teacher)).square().mean() + aux_loss
            loss.backward()
            optimizer.step()
        if strategy != "alone":
            met.add(model.first.last_decision.plan.strategy)
        total = loss.detach().clone()
        if ranks > 1:
            dist.all_reduce(total)
        losses.append(float(total) / ranks)
    return losses, met


# ------------------------------------------------------------------------------------------------------------ traffic


class Witness(TorchDispatchMode):
    """Writes down every collective with the elements that it is given, whoever calls it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, int]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace in ("c10d", "_c10d_functional"):
            given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            self.seen.append((function.name(), sum(leaf.nbytes for leaf in given)))
        return function(*args, **(kwargs or {}))


Sent = tuple[dict[str, int], list[tuple[str, int]]]
"""Bytes by kind, as moesaic counts them, and all collectives, as PyTorch sees them."""


def switch(workload: Workload, grid: Grid, plans: Sequence[Plan]) -> list[tuple[Plan, Plan, Sent, list[int]]]:
    """One step after the other, so that each plan follows each: (plan before, plan, what was sent, addresses of the
    weights)."""
    experts, chooser = experts_of(workload, grid)
    tensors = {name: each.requires_grad_() for name, each in own_tensors(experts, workload.shape.tensors()).items()}
    x_TD, ids_TK, weights_TK, upstream_TD = workload.inputs(experts.topology.rank)
    x_TD.requires_grad_()
    order = [plan for pair in itertools.product(plans, plans) for plan in pair]
    answers = []
    for before, plan in itertools.pairwise(order):
        chooser.plans = iter([plan])
        counted, witness = traffic(), Witness()
        with witness:
            experts(x_TD, ids_TK, weights_TK, tensors).backward(upstream_TD)
        told = {kind: sent - counted[kind] for kind, sent in traffic().items()}
        answers.append((before, plan, (told, witness.seen), [each.data_ptr() for each in tensors.values()]))
    return answers
