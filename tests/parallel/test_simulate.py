"""Clusters on paper: the model there is the one that decides here, on routings that are drawn as they are told."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from moesaic.errors import ConfigError
from moesaic.parallel.choice.clusters import DEVICES, WIRES, Device, Wire, device, links, wire
from moesaic.parallel.choice.compute import Overhead
from moesaic.parallel.choice.cost import estimate
from moesaic.parallel.choice.simulate import Cluster, Step, simulate
from moesaic.parallel.plan import Plan

CLUSTER = Cluster(16, 8, WIRES["nvlink3"], WIRES["hdr"], DEVICES["a100"])
STEP = Step(32, 1024, 2048, 2, 1024)


def test_shares_add_up_to_the_slots_of_a_token() -> None:
    random = np.random.default_rng(0)
    for step in (STEP, replace(STEP, zipf=1.0), replace(STEP, hot=0.5), replace(STEP, zipf=3.0, hot=0.9, top_k=4)):
        share_E = step.shares(random)
        assert share_E.sum() == pytest.approx(step.top_k) and share_E.max() <= 1 + 1e-12
    assert replace(STEP, hot=0.5).shares(random)[0] == 0.5
    uneven_E = np.sort(replace(STEP, zipf=1.0, top_k=1).shares(random))[::-1]
    assert uneven_E[0] / uneven_E[9] == pytest.approx(10)


@pytest.mark.parametrize(("experts", "ranks"), [(32, 16), (6, 4), (4, 16)])
def test_a_drawn_routing_is_one_that_could_be(experts: int, ranks: int) -> None:
    step = replace(STEP, num_experts=experts, zipf=1.0)
    drawn = step.workload(ranks)
    assert drawn.counts_WE.shape == (ranks, experts)
    assert drawn.counts_WE.max() <= step.tokens
    assert drawn.counts_WE.sum(1) == pytest.approx(step.tokens * step.top_k, rel=0.02)
    slots_WB = np.stack(
        [drawn.counts_WE[:, drawn.layout.experts_of_block(b)].sum(1) for b in range(drawn.layout.blocks)]
    )
    assert (drawn.rows_WB <= slots_WB.T).all() and (step.top_k * drawn.rows_WB >= slots_WB.T).all()


def test_rows_of_a_drawn_routing_are_those_of_drawn_tokens() -> None:
    step = replace(STEP, num_experts=4, top_k=2, tokens=20_000, zipf=0.0)
    drawn = step.workload(2)
    # Two of four experts, in blocks of two: the chance of no expert of a block is 1/6 if distinct, 1/4 if independent.
    assert (drawn.rows_WB / step.tokens) == pytest.approx(3 / 4, abs=0.1)


def test_static_is_the_plan_that_adapts_nothing() -> None:
    point = simulate(CLUSTER, STEP)
    step = STEP.workload(16)
    wires = links(CLUSTER.inside, CLUSTER.between)
    told = estimate(Plan("tokens"), step, wires, STEP.compute(CLUSTER), CLUSTER.topology())
    assert point.static.seconds == told.seconds
    assert point.best["tokens"].seconds <= point.static.seconds
    assert set(point.best) == {"tokens", "weights", "hybrid"} and point.auto in point.best.values()
    assert point.speedup(point.static) < 1  # the counts exchange is paid for


def test_hosts_take_their_time() -> None:
    free = replace(CLUSTER, overhead=Overhead(), planning=0.0)
    with_all, without = simulate(CLUSTER, STEP), simulate(free, STEP)
    assert with_all.planning == pytest.approx(CLUSTER.planning * 16 * 32)
    assert with_all.counts - with_all.planning == pytest.approx(without.counts) and without.planning == 0.0
    # Two passes of one chunk, for the static way as for the others.
    passes = 2 * (CLUSTER.overhead.step + CLUSTER.overhead.chunk)
    assert with_all.static.seconds - without.static.seconds == pytest.approx(passes)
    assert with_all.static.parts["overhead"] == pytest.approx(passes) and not without.static.parts["overhead"]


def test_one_hot_expert_is_fetched() -> None:
    point = simulate(CLUSTER, replace(STEP, hot=0.8))
    assert point.auto.plan.strategy == "hybrid" and 0 in point.auto.plan.fetched
    assert point.speedup(point.auto) > 1.5


def test_large_weights_stay_where_they_are_and_small_ones_travel() -> None:
    wide = simulate(CLUSTER, replace(STEP, d_ff=65536, tokens=64))
    narrow = simulate(CLUSTER, replace(STEP, num_experts=16, d_ff=16, tokens=16384))
    assert wide.auto.plan.strategy == "tokens" and narrow.auto.plan.strategy == "weights"


def test_a_thousand_ranks() -> None:
    point = simulate(replace(CLUSTER, ranks=1024), replace(STEP, num_experts=2048, zipf=1.0))
    assert point.static.seconds > point.auto.seconds


@pytest.mark.parametrize(
    "changes",
    [{"top_k": 64}, {"tokens": 0}, {"zipf": -1.0}, {"hot": 1.5}, {"d_ff": 0}],
)
def test_steps_that_cannot_be(changes: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        replace(STEP, **changes)


@pytest.mark.parametrize(
    "changes", [{"ranks": 0}, {"per_host": 0}, {"efficiency": 0.0}, {"efficiency": 1.5}, {"planning": -1.0}]
)
def test_clusters_that_cannot_be(changes: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        replace(CLUSTER, **changes)


def test_presets_and_figures() -> None:
    assert wire("hdr") is WIRES["hdr"] and device("h100") is DEVICES["h100"]
    assert wire("12.5GB/s,3us") == Wire(12.5, 3.0, "given")
    assert device("1 TFLOP/s, 50 GB/s") == Device(1.0, 50.0, "given")
    found = links(wire("100GB/s,1us"), wire("hdr"))
    assert found.inside.beta == pytest.approx(1e-11) and found.between.alpha == pytest.approx(2.7e-6)
    for text in ("hdx", "0GB/s,3us", "25GB/s", "1.2.3GB/s,1us"):
        with pytest.raises(ConfigError, match="latency is missing" if text == "25GB/s" else "unknown link"):
            wire(text)
    with pytest.raises(ConfigError, match="unknown device"):
        device("b200")
    assert STEP.dtype == torch.bfloat16
