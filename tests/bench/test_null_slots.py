"""The benchmark of null slots: the layer that it times, and what it makes of the times."""

from __future__ import annotations

import pytest
import torch

from moesaic.bench import null_slots
from moesaic.bench.null_slots import SHARES, Case, Point, line_of, measure
from moesaic.bench.shapes import Shape

TINY = Shape(4, 2, 16, 8)


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("backward", [False, True])
def test_the_layer_has_the_share_of_slots_that_it_is_said_to_have(wide: bool, backward: bool) -> None:
    work = null_slots._Work(Case(TINY, "fp32", 40, wide, backward), 0)
    for share in SHARES:
        outputs = work.run(share)
        assert len(outputs) == (5 if backward else 1)  # and gradients of input, gate, up, down
        routing = work.layer.last_routing
        assert routing is not None
        assert routing.top_k == (4 if wide else 2)
        assert int(routing.counts().sum()) == round(share * 40 * routing.top_k)
        assert (routing.weights[routing.expert_ids == 4] == 0).all()
        assert work.error("grouped", share) < 1e-5


def test_a_part() -> None:
    part = measure(Case(TINY, "fp32", 40), ["loop", "auto"], seconds=0.1)
    assert [row[:2] for row in part.rows] == [(name, f"{share:.0%}") for name in ("loop", "auto") for share in SHARES]
    assert all(float(row[-1]) < 1e-5 for row in part.rows)
    assert [verdict.target for verdict in part.verdicts] == [0.15, 0.15]
    assert [point["ratio"] for point in part.points if point["share"] == 1] == [1, 1]


def test_verdicts_are_of_the_worst_share() -> None:
    points = [Point("native", share, share, (share, share), share * more, 0.0) for share, more in ((0.1, 1.3), (1, 1))]
    part = null_slots._part(Case(TINY), points, others=0.0)
    (verdict,) = part.verdicts
    assert verdict.measured == pytest.approx(0.3)
    assert "at 10% of the slots" in verdict.what
    assert not verdict.passed
    assert not verdict.disturbed
    disturbed = null_slots._part(Case(TINY), points, others=0.5)
    assert disturbed.verdicts[0].disturbed
    assert "do not trust" in disturbed.lines[-1]


def test_the_line() -> None:
    assert line_of([0.1, 0.5, 1.0], [0.3, 0.7, 1.2]) == pytest.approx((0.2, 1.0))


def test_null_slots_are_spread_over_all_tokens() -> None:
    null = null_slots.null_slots(0.25, 400, 4, torch.Generator().manual_seed(0))
    assert int((~null).sum()) == 400
    assert set((~null).sum(dim=1).tolist()) >= {0, 1, 2, 3}
