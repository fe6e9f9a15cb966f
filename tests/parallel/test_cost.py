"""The cost model: what it adds up is what the schedule does, and its sums are those that one can do by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from tests.parallel.steps import COMPUTE, GIGABIT, topology, workload
from tests.parallel.test_schedule import phases_of_all

from moesaic.autotune.prior import Cost
from moesaic.errors import ConfigError
from moesaic.parallel import parcels
from moesaic.parallel.choice.candidates import hottest
from moesaic.parallel.choice.compute import Compute
from moesaic.parallel.choice.cost import PARTS, estimate, pipelined
from moesaic.parallel.choice.links import Link, Links
from moesaic.parallel.choice.volume import Places, Volumes
from moesaic.parallel.plan import Plan
from moesaic.parallel.schedule import Schedule

HOSTS = {2: (0, 0), 3: (0, 1, 1), 4: (0, 1, 0, 1), 6: (0, 0, 1, 1, 2, 2), 8: (0, 0, 0, 0, 1, 1, 1, 1)}
NONE = Cost(0.0, 0.0, 0.0)


def plans(experts: int, slices: int) -> list[Plan]:
    some, everyone = tuple(range(0, experts, 2)), tuple(range(experts))
    made = [Plan("tokens"), Plan("weights", everyone), Plan("weights", everyone, gather="relay")]
    made += [Plan("hybrid", some, least=least, gather=gather) for least in (1, 40) for gather in ("direct", "relay")]
    made += [Plan("hybrid", (0,), replicas=degree) for degree in range(1, slices + 1) if slices % degree == 0]
    return made + [Plan("tokens", replicas=degree) for degree in range(1, slices + 1) if slices % degree == 0]


@pytest.mark.parametrize("ranks", HOSTS)
@pytest.mark.parametrize("experts", [2, 3, 8, 16])
@pytest.mark.parametrize("most", [2048, 40, 12])
def test_volumes_are_the_sums_of_the_schedule(
    ranks: int, experts: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parcels, "MOST_PIECES", most)
    step = workload(ranks, experts, [50 * rank for rank in range(ranks)], skew=1.0)
    host_W, volumes = np.array(HOSTS[ranks]), Volumes(step, Places.of(HOSTS[ranks]))
    same_WW = host_W[:, None] == host_W
    for plan in plans(experts, step.layout.slices):
        schedule, volume = Schedule(plan, step), volumes.of(plan)
        away_WW = schedule.rows_WW * ~np.eye(ranks, dtype=bool)
        (flow,) = volume.tokens or (None,)
        if flow is None:
            assert not away_WW.any()
        else:
            for pairs_WW, sent_W, received_W in zip([same_WW, ~same_WW], flow.out_CW, flow.in_CW, strict=True):
                np.testing.assert_array_equal(sent_W, (away_WW * pairs_WW).sum(1))
                np.testing.assert_array_equal(received_W, (away_WW * pairs_WW).sum(0))
        np.testing.assert_array_equal(volume.sent_W, schedule.rows_WW.sum(1))
        np.testing.assert_array_equal(volume.own_slots_W, schedule.own_slots_WE.sum(1))
        np.testing.assert_array_equal(volume.own_active_W, (schedule.own_slots_WE > 0).sum(1))
        np.testing.assert_array_equal(volume.fetched_slots_W, schedule.fetched_slots_WE.sum(1))
        np.testing.assert_array_equal(volume.fetched_active_W, (schedule.fetched_slots_WE > 0).sum(1))
        phases = phases_of_all(schedule)
        assert len(volume.weights) == len(phases)
        for flow, phase in zip(volume.weights, phases, strict=True):
            out_CW, in_CW = np.zeros((2, ranks)), np.zeros((2, ranks))
            for parcel in phase:
                class_ = int(not same_WW[parcel.sender, parcel.receiver])
                out_CW[class_, parcel.sender] += parcel.last - parcel.first
                in_CW[class_, parcel.receiver] += parcel.last - parcel.first
            # Pieces are reckoned as equally long: the last one is shorter by less than there are receivers.
            slack = ranks * len(phase)
            np.testing.assert_allclose(flow.out_CW, out_CW, rtol=0, atol=slack)
            np.testing.assert_allclose(flow.in_CW, in_CW, rtol=0, atol=slack)


def test_a_hierarchical_exchange_goes_inside_then_between() -> None:
    step = workload(6, 6, 60, skew=1.0)
    rows_WW = Schedule(Plan("tokens"), step).rows_WW
    # Places 0 and 1 on hosts (0, 3), (1, 4), (2, 5): a host's ranks do not stand together.
    hosts = (0, 1, 2, 0, 1, 2)
    inside, between = Volumes(step, Places.of(hosts)).of(Plan("tokens", exchange="hierarchical")).tokens
    neighbour = [3, 4, 5, 0, 1, 2]
    for rank in range(6):
        place = rank // 3
        others = [each for each in range(6) if each // 3 != place]
        assert inside.out_CW[0, rank] == rows_WW[rank, others].sum()
        assert inside.in_CW[0, rank] == rows_WW[neighbour[rank], [3 * place, 3 * place + 1, 3 * place + 2]].sum()
        far = [each for each in range(6) if each // 3 == place and each != rank]
        assert between.out_CW[1, rank] == rows_WW[np.ix_([rank, neighbour[rank]], far)].sum()
    assert not inside.out_CW[1].any() and not between.out_CW[0].any()
    assert inside.messages_C == (1, 0) and between.messages_C == (0, 2)


def test_the_busiest_rank_and_the_busiest_host_set_the_time() -> None:
    step = workload(4, 4, [100, 0, 0, 0], top_k=1)
    free = Compute(NONE, NONE, copy=0.0)
    alpha, beta, shared = 1e-3, 1e-6, 3e-6
    where = topology((0, 0, 1, 1))
    rows_WW = Schedule(Plan("tokens"), step).rows_WW
    to_host = rows_WW[0, 2:].sum()
    alone = Links(Link(0.0, 0.0), Link(alpha, beta))
    told = estimate(Plan("tokens"), replace(step, grad=False), alone, free, where)
    bytes_there, bytes_back = to_host * step.row_bytes, to_host * step.result_bytes
    assert told.forward == pytest.approx(2 * 2 * alpha + beta * (bytes_there + bytes_back))
    assert told.backward == 0.0
    both = estimate(Plan("tokens"), step, Links(Link(0.0, 0.0), Link(alpha, beta, shared)), free, where)
    assert both.forward == pytest.approx(2 * 2 * alpha + shared * (bytes_there + bytes_back))
    assert both.backward == pytest.approx(both.forward)  # the gradients of results go out, those of rows come back


def test_computing_is_shared_by_the_cores_of_a_machine() -> None:
    step = workload(4, 4, 100, skew=0.0, grad=False)
    links = Links(Link(0.0, 0.0), Link(0.0, 0.0))
    compute = Compute(Cost(0.0, 0.0, 1e-3), NONE, copy=0.0, lanes=2)
    slots_W = Schedule(Plan("tokens"), step).own_slots_WE.sum(1)

    def seconds(machines: tuple[int, ...]) -> float:
        return estimate(Plan("tokens"), step, links, compute, topology((0, 1, 2, 3), machines)).seconds

    assert seconds((0, 0, 0, 0)) == pytest.approx(max(slots_W.max(), slots_W.sum() / 2) * 1e-3)
    assert seconds((0, 1, 2, 3)) == pytest.approx(slots_W.max() * 1e-3)


def test_a_slice_takes_its_share_of_an_expert() -> None:
    step = workload(4, 1, 100, top_k=1, grad=False)
    links = Links(Link(0.0, 0.0), Link(0.0, 0.0))
    compute = Compute(Cost(0.0, 0.0, 1e-3), NONE, copy=0.0)
    # Four slices: everybody computes a quarter of all 400 rows, or half of 200, or all of its own 100.
    for replicas in (1, 2, 4):
        told = estimate(Plan("tokens", replicas=replicas), step, links, compute, topology((0,) * 4))
        assert told.seconds == pytest.approx(0.1)
    with pytest.raises(ConfigError, match="replicas is 3"):
        estimate(Plan("tokens", replicas=3), step, links, compute, topology((0,) * 4))


@pytest.mark.parametrize(
    ("arguments", "seconds"),
    [
        ((1, 2.0, 3.0, 2.0, 0.0, 0.0, 0.0), 7.0),
        ((4, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0), 8.0),  # the wire carries eight pieces, one at a time
        ((4, 0.1, 1.0, 0.1, 0.0, 0.0, 0.0), 4.2),  # the first piece's way, four computed, the last one's way back
        ((1, 1.0, 1.0, 1.0, 5.0, 2.0, 0.0), 8.0),  # fetched weights come after the tokens, and are computed with last
        ((1, 1.0, 9.0, 1.0, 5.0, 2.0, 3.0), 15.0),  # and their gradients leave after that
        ((1, 1.0, 1.0, 1.0, 5.0, 0.0, 0.0, True), 8.0),  # nothing is computed without them
    ],
)
def test_a_pipeline_by_hand(arguments: tuple[int, float, float, float, float, float, float], seconds: float) -> None:
    assert pipelined(*arguments) == pytest.approx(seconds)


def test_parts_are_what_would_be_without_overlap() -> None:
    step = workload(4, 8, 400, skew=1.0)
    plan = Plan("hybrid", (0, 1), overlap=2)
    links = replace(GIGABIT, between=GIGABIT.inside)
    told = estimate(plan, step, links, COMPUTE, topology((0, 0, 1, 1)))
    assert tuple(told.parts) == PARTS and all(seconds > 0 for seconds in told.parts.values())
    assert told.seconds < sum(told.parts.values())
    one, two = (estimate(Plan("tokens", overlap=n), step, GIGABIT, COMPUTE, topology((0, 0, 1, 1))) for n in (1, 2))
    assert two.seconds < one.seconds


def test_weights_travel_twice_in_training_and_gradients_once() -> None:
    step = workload(2, 2, 100, top_k=1)
    free = Compute(NONE, NONE, copy=0.0)
    links = Links(Link(0.0, 0.0), Link(0.0, 1e-9))
    told = estimate(Plan("weights", (0, 1)), step, links, free, topology((0, 1)))
    one = step.slice_elements[0] * 4e-9
    assert told.forward == pytest.approx(one) and told.backward == pytest.approx(2 * one)


def test_the_hottest_experts_are_those_by_which_most_slots_stay() -> None:
    step = workload(4, 8, 500, skew=1.5)
    counts_WE = step.counts_WE.copy()
    counts_WE[:, 7] = [0, 0, 0, 10_000]  # hot, but only on the rank that owns it
    step = replace(step, counts_WE=counts_WE)
    away_E = [step.counts_WE[[r for r in range(4) if r != e // 2], e].sum() for e in range(8)]
    order = sorted(range(8), key=lambda e: -away_E[e])
    assert hottest(step, 3, 1) == tuple(sorted(order[:3]))
    assert 7 not in hottest(step, 7, 1)
    assert hottest(step, 8, 10**9) == ()
