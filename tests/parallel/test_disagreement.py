"""Ranks that do not do the same end with an error that names them, whatever decides: no abort, and nobody hangs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest
import torch
import torch.distributed as dist
from tests.parallel import harness, layers

import moesaic
from moesaic.autotune.setting import use_tuning
from moesaic.errors import ParallelError
from moesaic.parallel import Plan, replay, traffic, use_strategy
from moesaic.parallel.sharding import forward_sharded


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def replaying() -> AbstractContextManager[None]:
    return replay([Plan("weights", tuple(range(8)))])


def halves() -> AbstractContextManager[None]:
    return torch.autocast("cpu", torch.bfloat16)


SETTINGS: dict[str, tuple[Callable[[], AbstractContextManager[None]], str]] = {
    "tuning": (lambda: use_tuning("on"), "1 wish for another strategy"),
    "deterministic": (deterministic, "1 wish for another strategy"),
    "replay": (replaying, "1 wish for another strategy"),
    "autocast": (halves, "1 are at another layer, or one of other sizes or precision, than rank 0"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings(name: str) -> None:
    for error in harness.pool(2).run(set_on_one, name):
        assert SETTINGS[name][1] in error


def set_on_one(name: str) -> str:
    x_TD, _ = layers.features(dist.get_rank(), 5)
    with use_tuning("on" if name == "deterministic" else "off"):
        layer = moesaic.parallelize(layers.layer_of({}))
        layer(x_TD)  # also the check that nothing is wrong before
        with (
            SETTINGS[name][0]() if dist.get_rank() == 1 else use_strategy("auto"),
            pytest.raises(ParallelError) as told,
        ):
            layer(x_TD)
    return str(told.value)


@pytest.mark.parametrize("strategy", ["tokens", "weights"])
def test_frozen_on_one_rank(strategy: str) -> None:
    for error in harness.pool(2).run(frozen_on_one, strategy):
        assert "1 differ in whether they compute gradients, and of what" in error


def frozen_on_one(strategy: str) -> str:
    layer = moesaic.parallelize(layers.layer_of({}))
    layer.experts.requires_grad_(dist.get_rank() == 0)
    x_TD = layers.features(dist.get_rank(), 5)[0].requires_grad_()
    with use_strategy(strategy), pytest.raises(ParallelError) as told:
        layer(x_TD)
    return str(told.value)


def test_layers_in_another_order() -> None:
    for error in harness.pool(3).run(other_order, timeout=30):
        assert "2 are at another layer" in error and "rank 0" in error


def other_order() -> str:
    """Of two layers with very different numbers of experts; without FSDP, whose messages are its own."""
    both = [moesaic.parallelize(layers.layer_of({"num_experts": experts})) for experts in (4, 300)]
    if dist.get_rank() == 2:
        both.reverse()
    x_TD, _ = layers.features(dist.get_rank(), 5)
    with pytest.raises(ParallelError) as told:
        forward_sharded(both[0].experts, x_TD, torch.zeros(5, 1, dtype=torch.int64), torch.ones(5, 1))
    return str(told.value)


def test_capacity_on_one_rank() -> None:
    for error in harness.pool(2).run(asked_on_one):
        assert "1 differ in whether a capacity may drop slots from rank 0" in error


def asked_on_one() -> str:
    experts = moesaic.parallelize(layers.layer_of({"num_experts": 1500})).experts
    x_TD, _ = layers.features(dist.get_rank(), 5)
    asked_E = torch.zeros(1500, dtype=torch.int64) if dist.get_rank() == 1 else None
    with pytest.raises(ParallelError) as told:
        forward_sharded(experts, x_TD, torch.zeros(5, 1, dtype=torch.int64), torch.ones(5, 1), asked_E)
    return str(told.value)


def test_what_was_asked_for_arrives() -> None:
    """The first time apart, for which no message had room; then all in one."""
    for first, second, asked in harness.pool(2).run(asked_on_all):
        assert asked == [[sum(rank + expert for rank in range(2)) for expert in range(3000)]] * 2
        assert first == second  # bytes


def asked_on_all() -> tuple[int, int, list[list[int]]]:
    experts = moesaic.parallelize(layers.layer_of({"num_experts": 3000})).experts
    x_TD, _ = layers.features(dist.get_rank(), 5)
    sent, asked = [traffic()["counts"]], []
    for _ in range(2):
        asked_E = torch.arange(3000) + dist.get_rank()
        forward_sharded(experts, x_TD, torch.zeros(5, 1, dtype=torch.int64), torch.ones(5, 1), asked_E)
        asked.append(experts.parallel.asked_E.tolist())
        sent.append(traffic()["counts"])
    return sent[1] - sent[0], sent[2] - sent[1], asked
