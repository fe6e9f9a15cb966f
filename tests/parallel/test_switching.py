"""A change of strategy changes neither what is learned nor what is sent."""

from __future__ import annotations

from collections import Counter, defaultdict

import pytest
from tests.parallel import harness, layers
from tests.parallel.cases import Shape, Workload

from moesaic.parallel import Plan

BATCH = 48


# Whole experts on 4 ranks, and halves.
@pytest.mark.parametrize(
    ("num_experts", "steps"), [(8, 14), *(pytest.param(e, 50, marks=pytest.mark.slow) for e in (8, 2))]
)
def test_switching_at_every_step_trains_alike(num_experts: int, steps: int) -> None:
    pool = harness.pool(4)
    (switched, met), *others = pool.run(layers.train, num_experts, steps, BATCH, None)
    assert met == {"tokens", "weights", "hybrid"}
    assert others == [(switched, met)] * 3
    (stayed, met), *_ = pool.run(layers.train, num_experts, steps, BATCH, "tokens")
    assert met == {"tokens"}
    assert switched == pytest.approx(stayed, rel=1e-5)
    ((alone, _),) = harness.pool(1).run(layers.train, num_experts, steps, BATCH, "alone")
    assert switched == pytest.approx(alone, rel=1e-5)
    assert steps < 50 or switched[-1] < 0.9 * switched[0]


@pytest.mark.parametrize(("num_experts", "ranks"), [(8, 2), pytest.param(8, 4, marks=pytest.mark.slow), (2, 4)])
def test_a_switch_sends_nothing(num_experts: int, ranks: int) -> None:
    """What a step sends is the same after every other plan and after itself, as our counters and PyTorch see it."""
    everything = tuple(range(num_experts))
    some = [
        Plan("tokens"),
        Plan("tokens", overlap=2, exchange="hierarchical" if ranks == 4 else "direct"),
        Plan("weights", everything),
        Plan("weights", everything, gather="relay"),
        Plan("hybrid", (0, num_experts - 1), overlap=2),
        Plan("hybrid", everything, least=3, gather="relay", replicas=1),
    ]
    grid = ((0, 1), (2, 3)) if ranks == 4 else ((0, 1),)
    totals: Counter[str] = Counter()
    for steps in harness.pool(ranks).run(layers.switch, Workload(Shape(num_experts), ranks), grid, some):
        sent = defaultdict(list)
        for _, plan, (by_kind, collectives), _ in steps:
            sent[plan].append((by_kind, collectives))
            totals.update(by_kind)
            totals.update(name for name, _ in collectives)
        assert all(len(each) > len(some) and each == [each[0]] * len(each) for each in sent.values())
        assert len({tuple(places) for *_, places in steps}) == 1  # the weights stay where they are
    assert totals.keys() >= {"counts", "tokens", "results", "weights", "gradients", "c10d::alltoall_base_"}
    assert all(totals.values())
