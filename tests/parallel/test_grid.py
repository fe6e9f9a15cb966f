"""Every plan against plain loops over tokens and experts, on 1 to 8 processes: outputs and all gradients."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import pytest
from tests.parallel import harness, ranks, reference
from tests.parallel.cases import ROUTINGS, Workload, plans, workloads

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


@functools.lru_cache(maxsize=4)
def wanted_of(workload: Workload) -> dict[str, Any]:
    inputs = [workload.inputs(rank) for rank in range(workload.ranks)]
    return reference.experts_of_ranks(workload.shape.tensors(), workload.shape.activation, inputs)


def errors(workload: Workload, some: Sequence[Plan], grid: ranks.Grid) -> list[dict[str, float]]:
    """For each plan, the relative error of each tensor over all ranks together."""
    wanted = wanted_of(workload)
    answers = harness.pool(workload.ranks).run(ranks.run, workload, grid, some, wanted)
    sizes = {
        name: math.sqrt(sum(each.norm().item() ** 2 for each in (what if isinstance(what, list) else [what])))
        for name, what in wanted.items()
    }
    return [
        {name: math.sqrt(sum(answer[name] for answer in by_rank)) / (sizes[name] or 1.0) for name in sizes}
        for by_rank in zip(*answers, strict=True)
    ]


def assert_right(workload: Workload, some: Sequence[Plan], grid: ranks.Grid, tolerance: float = TOLERANCE) -> None:
    wrong = [
        f"{plan}: {off}"
        for plan, off in zip(some, errors(workload, some, grid), strict=True)
        if not all(value < tolerance for value in off.values())
    ]
    assert not wrong, f"{len(wrong)} of {len(some)} plans are wrong for {workload} on {grid}:\n" + "\n".join(wrong[:5])


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize("size", RANKS)
def test_some_plans(size: int, experts: int, routing: str) -> None:
    """All workloads; of all plans every n-th, another one each time."""
    for index, workload in enumerate(workloads(size, experts, routing)):
        every = plans(workload)
        step = max(1, len(every) // 4)
        assert_right(workload, every[index % step :: step], GRIDS[size][index % len(GRIDS[size])])


@pytest.mark.slow
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize("size", RANKS)
def test_all_plans(size: int, experts: int, routing: str) -> None:
    for workload in workloads(size, experts, routing):
        for grid in GRIDS[size]:
            assert_right(workload, plans(workload), grid)
