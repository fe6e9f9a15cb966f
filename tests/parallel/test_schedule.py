"""Schedules of random routings against sending tokens one by one (``reference.py``)."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.parallel import reference

from moesaic.errors import ConfigError
from moesaic.parallel.layout import ExpertLayout
from moesaic.parallel.parcels import Parcels
from moesaic.parallel.plan import Plan
from moesaic.parallel.schedule import Schedule
from moesaic.parallel.workload import Workload

EXPERTS = [1, 2, 3, 4, 6, 8, 12, 16]
RANKS = [1, 2, 3, 4, 6, 8]


@dataclass(frozen=True)
class Case:
    """A routing, and what to do with it."""

    geometry: reference.Geometry
    slots_of_rank: list[list[list[int]]]
    plan: Plan
    biases: int = 0

    @property
    def sizes(self) -> tuple[int, ...]:
        """Elements of each slice: 3 per hidden feature, and some besides."""
        return tuple(3 * len(self.geometry.hidden(s)) + self.biases for s in range(self.geometry.slices))

    @property
    def schedule(self) -> Schedule:
        geometry = self.geometry
        layout = ExpertLayout(geometry.experts, geometry.width, geometry.ranks)
        counts, rows = reference.counted(self.slots_of_rank, geometry)
        rows_WB = np.zeros((geometry.ranks, layout.blocks), dtype=np.int64)
        rows_WB[:, : len(reference.blocks(geometry))] = rows
        return Schedule(
            self.plan,
            Workload(
                layout=layout,
                counts_WE=np.array(counts, dtype=np.int64),
                rows_WB=rows_WB,
                tokens_W=np.array([len(tokens) for tokens in self.slots_of_rank]),
                d_model=4,
                top_k=max((len(ids) for tokens in self.slots_of_rank for ids in tokens), default=1),
                dtype=torch.float32,
                slice_elements=self.sizes,
                grad=True,
            ),
        )


@st.composite
def cases(draw: st.DrawFn) -> Case:
    geometry = reference.Geometry(draw(st.sampled_from(EXPERTS)), draw(st.integers(1, 9)), draw(st.sampled_from(RANKS)))
    experts, top_k = geometry.experts, draw(st.integers(1, min(geometry.experts, 4)))
    tokens = draw(st.lists(st.integers(0, 12), min_size=geometry.ranks, max_size=geometry.ranks))
    # Drawn by ourselves, which is much faster. Now and then few experts for many tokens. E is a null slot's id.
    random = Random(draw(st.integers(0, 99)))
    hot = random.sample(range(experts + 1), draw(st.integers(top_k, experts + 1)))
    slots = [[random.sample(hot, top_k) for _ in range(number)] for number in tokens]
    strategy = draw(st.sampled_from(["tokens", "weights", "hybrid"]))
    some = random.sample(range(experts), random.randint(0, experts))
    fetched = {"tokens": [], "weights": list(range(experts)), "hybrid": sorted(some)}[strategy]
    divisors = [r for r in range(1, geometry.slices + 1) if geometry.slices % r == 0]
    plan = Plan(
        strategy,
        tuple(fetched),
        least=draw(st.integers(0, 6)) if strategy == "hybrid" else 1,
        gather=draw(st.sampled_from(["direct", "relay"])),
        replicas=draw(st.sampled_from([0, *divisors])),
    )
    return Case(geometry, slots, plan, biases=draw(st.integers(0, 2)))


def matrix(counter: dict[tuple[int, int], int], rows: int, columns: int) -> list[list[int]]:
    return [[counter.get((row, column), 0) for column in range(columns)] for row in range(rows)]


def check_quantities(case: Case) -> None:
    ranks, experts = case.geometry.ranks, case.geometry.experts
    schedule, wanted = case.schedule, reference.traffic(case.slots_of_rank, case.geometry, case.plan)
    assert schedule.rows_WW.tolist() == matrix(wanted.rows, ranks, ranks)
    assert schedule.own_slots_WE.tolist() == matrix(wanted.own_slots, ranks, experts)
    assert schedule.fetched_slots_WE.tolist() == matrix(wanted.fetched_slots, ranks, experts)


def check_weights(case: Case) -> None:
    """Phase by phase: who sends must have had it before, who gets it must not; in the end each has what it needs."""
    schedule, sizes = case.schedule, case.sizes
    needed = reference.traffic(case.slots_of_rank, case.geometry, case.plan).needed
    held = reference.owned(case.geometry, sizes)
    goal = {rank: set(elements) for rank, elements in held.items()}
    for rank, expert, slice_ in needed:
        goal[rank] |= {(expert, slice_, i) for i in range(sizes[slice_])}
    sent_by_owner: Counter[tuple[int, int, int]] = Counter()
    for phase in schedule.gather_phases:
        before = {rank: frozenset(elements) for rank, elements in held.items()}
        for parcel in phase:
            assert parcel.sender != parcel.receiver
            load = {(parcel.expert, parcel.slice_, i) for i in range(parcel.first, parcel.last)}
            assert load <= before[parcel.sender]
            assert not load & held[parcel.receiver]
            held[parcel.receiver] |= load
            if parcel.sender == case.geometry.owners(parcel.expert)[parcel.slice_]:
                sent_by_owner.update(load)
    assert held == goal
    receivers = Counter((expert, slice_) for _, expert, slice_ in needed)
    relayed = case.plan.gather == "relay" and max(receivers.values(), default=0) > 1
    assert len(schedule.gather_phases) == bool(needed) + relayed
    for (expert, slice_), number in receivers.items():
        times = 1 if case.plan.gather == "relay" else number
        assert all(sent_by_owner[expert, slice_, i] == times for i in range(sizes[slice_]))


def check_order(phase: Parcels, ranks: int) -> None:
    """Sender and receiver go through what is between them in one order; the way back has the same turned round."""
    turned = phase.turned()
    assert sorted(phase) == sorted(parcel for rank in range(ranks) for parcel in phase.sent_by(rank))
    for rank in range(ranks):
        assert [parcel.receiver for parcel in phase.sent_by(rank)] == sorted(p.receiver for p in phase.sent_by(rank))
        assert [parcel.sender for parcel in phase.received_by(rank)] == sorted(
            p.sender for p in phase.received_by(rank)
        )
        for other in range(ranks):
            for way in (phase, turned):
                sent = [parcel for parcel in way.sent_by(other) if parcel.receiver == rank]
                assert sent == [parcel for parcel in way.received_by(rank) if parcel.sender == other]
            back = [parcel for parcel in turned.sent_by(rank) if parcel.receiver == other]
            assert back == [p._replace(sender=rank, receiver=other) for p in phase if p[:2] == (other, rank)]


@settings(max_examples=300)
@given(case=cases())
def test_rows_and_slots(case: Case) -> None:
    check_quantities(case)


@settings(max_examples=300)
@given(case=cases())
def test_every_receiver_gets_every_element_once(case: Case) -> None:
    check_weights(case)


@pytest.mark.slow
@settings(max_examples=5000)
@given(case=cases())
def test_any_schedule_at_length(case: Case) -> None:
    check_quantities(case)
    check_weights(case)


@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("width", [1, 5, 12])
def test_layout(experts: int, ranks: int, width: int) -> None:
    """Every element of every expert has one owner, whatever the numbers."""
    layout, geometry = ExpertLayout(experts, width, ranks), reference.Geometry(experts, width, ranks)
    owners = {(e, f): [] for e in range(experts) for f in range(width)}
    for rank in range(ranks):
        block, slice_ = layout.place(rank)
        assert layout.rank_at(block, slice_) == rank
        for e in layout.experts_of(rank):
            assert layout.block_of_expert[e] == block
            assert geometry.owners(e)[slice_] == rank
            for f in layout.hidden_of(rank):
                owners[e, f].append(rank)
    assert all(len(each) == 1 for each in owners.values())
    assert layout.blocks * layout.slices == ranks
    assert (layout.slices > 1) == (experts < ranks)


@pytest.mark.parametrize("name", ["num_experts", "d_ff", "ranks"])
def test_layout_refuses_nothing(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} is 0: it must be at least 1"):
        ExpertLayout(**{"num_experts": 2, "d_ff": 2, "ranks": 2, name: 0})


def test_replicas_divide_the_slices() -> None:
    case = Case(reference.Geometry(2, 8, 8), [[[0, 1]]] * 8, Plan("tokens", replicas=3))
    with pytest.raises(ConfigError, match="replicas is 3: it must divide 4, the slices of an expert"):
        _ = case.schedule


def test_hot_expert_by_hand() -> None:
    """Two ranks, four experts; rank 0's tokens want expert 2 three times, of which it fetches the weights."""
    slots = [[[2, 0], [2, 3], [2, 4]], [[1, 0], [4, 4]]]  # 4: null
    schedule = Case(reference.Geometry(4, 5, 2), slots, Plan("hybrid", (2,), least=2)).schedule
    assert schedule.fetches_WE.tolist() == [[False, False, True, False], [False] * 4]
    assert schedule.rows_WW.tolist() == [[1, 1], [1, 0]]
    assert schedule.own_slots_WE.tolist() == [[2, 1, 0, 0], [0, 0, 0, 1]]
    assert schedule.fetched_slots_WE.tolist() == [[0, 0, 3, 0], [0] * 4]
    assert [list(phase) for phase in schedule.gather_phases] == [[(1, 0, 2, 0, 0, 15)]]
