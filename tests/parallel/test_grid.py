"""Every plan against plain loops over tokens and experts, on 1 to 8 processes: outputs and all gradients."""

from __future__ import annotations

import functools
import itertools
import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from tests.parallel import harness, ranks, reference
from tests.parallel.cases import ROUTINGS, TOKENS, Shape, Workload, one_of_each, plans, sample, workloads
from tests.parallel.ranks import Mode

from moesaic.parallel.plan import Plan

TOLERANCE = 1e-5
RANKS = [1, 2, 3, 4, 8]
EXPERTS = [2, 8, 12, 16]
# Pretended hosts with their ranks; "hierarchical" needs a grid.
GRIDS: dict[int, list[ranks.Grid]] = {
    1: [((0,),)],
    2: [((0, 1),)],
    3: [((0, 1, 2),)],
    4: [((0, 1), (2, 3)), ((0, 2), (1, 3))],
    8: [((0, 1, 2, 3), (4, 5, 6, 7)), ((0, 1), (2, 3), (4, 5), (6, 7))],
}


@functools.lru_cache(maxsize=8)
def wanted_of(workload: Workload, times: int) -> dict[str, Any]:
    inputs = [workload.inputs(rank) for rank in range(workload.ranks)]
    shape = workload.shape
    answer = reference.experts_of_ranks(shape.plain_tensors(), shape.activation, inputs, times)
    return {name: shape.stored(what) if isinstance(what, torch.Tensor) else what for name, what in answer.items()}


def errors(workload: Workload, some: Sequence[Plan], grid: ranks.Grid, mode: Mode) -> list[dict[str, float]]:
    """For each plan, the relative error of each tensor over all ranks together."""
    wanted = wanted_of(workload, mode.times)
    answers = harness.pool(workload.ranks).run(ranks.run, workload, grid, some, wanted, mode)
    sizes = {
        name: math.sqrt(sum(each.norm().item() ** 2 for each in (what if isinstance(what, list) else [what])))
        for name, what in wanted.items()
    }
    return [
        {name: math.sqrt(sum(answer[name] for answer in by_rank)) / (sizes[name] or 1.0) for name in by_rank[0]}
        for by_rank in zip(*answers, strict=True)
    ]


def assert_right(
    workload: Workload,
    some: Sequence[Plan],
    grid: ranks.Grid | None = None,
    mode: Mode = Mode(),  # noqa: B008  (frozen)
    tolerance: float = TOLERANCE,
) -> None:
    grid = grid or GRIDS[workload.ranks][0]
    wrong = [
        f"{plan}: {off}"
        for plan, off in zip(some, errors(workload, some, grid, mode), strict=True)
        if not all(value < tolerance for value in off.values())
    ]
    assert not wrong, f"{len(wrong)} of {len(some)} plans are wrong for {workload} on {grid}:\n" + "\n".join(wrong[:5])


def check_all(every: Sequence[Workload], some: Callable[[Workload], list[Plan]]) -> None:
    for index, workload in enumerate(every):
        grids = GRIDS[workload.ranks]
        assert_right(workload, some(workload), grids[index % len(grids)])


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize(("size", "number"), [(1, 4), (2, 3), (3, 2), (4, 1), (8, 1)])
def test_some_plans(size: int, number: int, experts: int, routing: str) -> None:
    """Half of the workloads, others for each case, by a few of the plans."""
    every = workloads(size, experts, routing)
    some = random.Random(f"{size} {experts} {routing}").sample(every, len(every) // 2)
    check_all(some, lambda workload: sample(workload, number))


@pytest.mark.slow
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize("size", RANKS)
def test_every_strategy_overlap_and_exchange(size: int, experts: int, routing: str) -> None:
    """All workloads, each by all plans on 1 and 2 ranks, and by one of each kind on more."""
    check_all(workloads(size, experts, routing), plans if size <= 2 else one_of_each)


SHAPES = {
    "not gated": {"activation": "relu"},
    "biases": {"bias": True},
    "not gated, biases": {"activation": "gelu", "bias": True},
    "transposed": {"transposed": True, "bias": True},
    "slices without hidden features": {"d_ff": 2, "bias": True},
    "one hidden feature, one of the model": {"d_ff": 1, "d_model": 1},
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize(("size", "experts"), [(3, 2), (4, 2), (3, 8)])
def test_shapes(size: int, experts: int, name: str) -> None:
    workload = Workload(Shape(experts, **SHAPES[name]), size, tokens=TOKENS["unequal"][:size], nulls=True)
    assert_right(workload, sample(workload, 6))


@pytest.mark.parametrize(("size", "experts"), [(2, 8), (4, 2)])
@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_top_k(size: int, experts: int, top_k: int) -> None:
    workload = Workload(Shape(experts), size, top_k=top_k)
    assert_right(workload, sample(workload, 6))


@pytest.mark.parametrize(("size", "experts"), [(2, 8), (3, 2)])
def test_no_tokens_at_all(size: int, experts: int) -> None:
    workload = Workload(Shape(experts, bias=True), size, tokens=(0,) * size)
    assert_right(workload, sample(workload, 6))


@pytest.mark.parametrize(("size", "experts"), [(2, 8), (4, 2)])
def test_bfloat16(size: int, experts: int) -> None:
    workload = Workload(Shape(experts, bias=True, dtype=torch.bfloat16), size)
    assert_right(workload, sample(workload, 6), tolerance=2e-2)


@pytest.mark.parametrize(("size", "experts"), [(2, 8), (4, 2)])
def test_float64(size: int, experts: int) -> None:
    workload = Workload(Shape(experts, dtype=torch.float64), size)
    assert_right(workload, sample(workload, 6), tolerance=1e-7)  # routing weights are float32


@pytest.mark.parametrize(("size", "experts"), [(2, 8), (3, 2)])
@pytest.mark.parametrize(
    "mode",
    [
        Mode(no_grad=True),
        Mode(needs=()),
        Mode(needs=("x",)),
        Mode(needs=("weights",)),
        Mode(needs=("up", "down")),
        Mode(needs=("x", "down")),
        Mode(times=2),
        Mode(checkpoint=True),
        Mode(checkpoint=True, times=2),
    ],
    ids=str,
)
def test_uses(size: int, experts: int, mode: Mode) -> None:
    """A layer that is used twice, or run again by gradient checkpointing, has another plan each time."""
    workload = Workload(Shape(experts), size, tokens=TOKENS["unequal"][:size])
    assert_right(workload, sample(workload, 6), mode=mode)


@pytest.mark.parametrize("silent", [(0,), (1, 2), (0, 1, 2)])
def test_loss_of_some_ranks(silent: tuple[int, ...]) -> None:
    workload = Workload(Shape(8), 3, silent=silent)
    assert_right(workload, sample(workload, 6))


@pytest.mark.parametrize("size", RANKS)
def test_every_kind_of_plan_is_met(size: int) -> None:
    """By every workload each strategy with each overlap and exchange; by all of them also each gather and degree."""
    every = [workload for experts in EXPERTS for routing in ROUTINGS for workload in workloads(size, experts, routing)]
    exchanges = ("direct", "hierarchical") if size in (4, 8) else ("direct",)
    met: set[tuple[Any, ...]] = set()
    for workload in every:
        some = one_of_each(workload)
        kinds = [(plan.strategy, plan.overlap, plan.exchange) for plan in some]
        assert sorted(kinds) == sorted(itertools.product(("tokens", "weights", "hybrid"), (1, 2, 4), exchanges))
        met |= {(kind, plan.gather, plan.replicas) for kind, plan in zip(kinds, some, strict=True)}
    wanted = {
        ((plan.strategy, plan.overlap, plan.exchange), plan.gather, plan.replicas)
        for workload in every
        for plan in plans(workload)
    }
    assert met == wanted


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"needs": ()}, "differ in whether they compute gradients"),
        ({"wish": "weights"}, "wish for another strategy"),
        ({"name": "another"}, "are at another layer"),
    ],
)
def test_ranks_that_do_not_agree(changes: dict[str, Any], reason: str) -> None:
    for told in harness.pool(3).run(ranks.disagree, Workload(Shape(8), 3), changes):
        assert told.startswith(f"ParallelError: the ranks do not agree in experts: 1 {reason}")


def test_an_error_in_one_rank_is_told_and_forgotten() -> None:
    workload = Workload(Shape(8), 3)
    with pytest.raises(harness.RankFailure, match=r"rank 1 of 3:\n(.|\n)*MemoryError: no room"):
        harness.pool(3).run(ranks.fail, workload)
    assert_right(workload, sample(workload, 2))


def test_fetched_weights_are_not_kept() -> None:
    """They are fetched again in the backward pass (Hecate's rematerialization)."""
    shape = Shape(4)
    expert_bytes = [each[0].nbytes for each in shape.tensors().values()]
    for computed, forward, backward in harness.pool(2).run(ranks.fetched_bytes, Workload(shape, 2)):
        assert computed == expert_bytes
        assert forward == backward == [0] * len(expert_bytes)
