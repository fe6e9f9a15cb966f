"""The benchmark of null slots: the layer that it times, and what it makes of the times."""

from __future__ import annotations

import runpy
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from moesaic.bench import null_slots
from moesaic.bench.limits import machine
from moesaic.bench.null_slots import SHARES, Case, Point, line_of, measure
from moesaic.bench.shapes import Shape

ROOT = Path(__file__).resolve().parent.parent.parent
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
        assert work.errors(["grouped"], share)["grouped"] < 1e-5


def test_a_part() -> None:
    part = measure(Case(TINY, "fp32", 40), ["loop", "auto"], seconds=0.1)
    assert [row[:2] for row in part.rows] == [(name, f"{share:.0%}") for name in ("loop", "auto") for share in SHARES]
    assert all(float(row[-1]) < 1e-5 for row in part.rows)
    assert [verdict.target for verdict in part.verdicts] == [0.15] * 4
    assert [point["ratio"] for point in part.points if point["share"] == 1] == [1, 1]


def test_verdicts_are_of_the_worst_share() -> None:
    off = {0.1: 1.3, 0.25: 0.8, 0.5: 1.1, 1: 1.0}
    points = [Point("native", share, share, (share, share), share * more, 0.0) for share, more in off.items()]
    part = null_slots._part(Case(TINY), points, others=0.0)
    many, few = part.verdicts
    assert many.measured == pytest.approx(0.2)
    assert few.measured == pytest.approx(0.3)
    assert "a tenth" in few.what
    assert not many.passed
    assert not many.disturbed
    disturbed = null_slots._part(Case(TINY), points, others=0.5)
    assert disturbed.verdicts[0].disturbed
    assert "do not trust" in disturbed.lines[-1]


def test_the_line() -> None:
    assert line_of([0.1, 0.5, 1.0], [0.3, 0.7, 1.2]) == pytest.approx((0.2, 1.0))


def test_null_slots_are_spread_over_all_tokens() -> None:
    null = null_slots.null_slots(0.25, 400, 4, torch.Generator().manual_seed(0))
    assert int((~null).sum()) == 400
    assert set((~null).sum(dim=1).tolist()) >= {0, 1, 2, 3}


def test_the_page() -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "benchmark_page.py"))
    points = [Point("native", share, share, (share, share), share * 1.1, 1e-3) for share in (0.5, 1.0)]
    points[1] = replace(points[1], ratio=1.0)
    part = {**asdict(null_slots._part(Case(TINY), points, others=0.0)), "machine": machine()}
    page = f"before\n{script['SLOTS_BEGIN']}old{script['SLOTS_END']}after\n"
    made = script["with_null_slots"](page, {"tiny": part})
    assert made == script["with_null_slots"](made, {"tiny": part})
    assert "old" not in made
    assert f"| {Case(TINY)} | native | +10% | 1000 ms | 1.0e-03 |" in made
    assert script["SLOTS_BEGIN"] in (ROOT / "docs" / "benchmarks.md").read_text()
