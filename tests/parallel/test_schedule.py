"""Schedules of random routings against sending tokens one by one (``reference.py``)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.parallel import reference

from moesaic.errors import ConfigError
from moesaic.parallel import parcels
from moesaic.parallel.exchange import part
from moesaic.parallel.layout import ExpertLayout
from moesaic.parallel.parcels import Parcels
from moesaic.parallel.plan import Plan
from moesaic.parallel.schedule import Schedule
from moesaic.parallel.selection import NOBODY, Selection
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
        overlap=draw(st.sampled_from([1, 2, 4])),
    )
    return Case(geometry, slots, plan, biases=draw(st.integers(0, 2)))


def matrix(counter: dict[tuple[int, int], int], rows: int, columns: int) -> list[list[int]]:
    return [[counter.get((row, column), 0) for column in range(columns)] for row in range(rows)]


def phases_of_all(schedule: Schedule) -> list[Parcels]:
    """The exchanges of weights as all ranks together have them: every parcel is known to both of its ends."""
    ranks = schedule.workload.layout.ranks
    by_rank = [schedule.gather(rank) for rank in range(ranks)]
    assert len({len(phases) for phases in by_rank}) == 1
    found = []
    for of_ranks in zip(*by_rank, strict=True):
        sent = [parcel for rank, own in enumerate(of_ranks) for parcel in own.sent_by(rank)]
        received = [parcel for rank, own in enumerate(of_ranks) for parcel in own.received_by(rank)]
        assert sorted(sent) == sorted(received)
        assert len(sent) * 2 == sum(len(own) for own in of_ranks)
        check_order(of_ranks)
        found.append(Parcels(np.array(sent, dtype=np.int64).reshape(-1, 6)))
    return found


def check_quantities(case: Case) -> None:
    ranks, experts = case.geometry.ranks, case.geometry.experts
    schedule, wanted = case.schedule, reference.traffic(case.slots_of_rank, case.geometry, case.plan)
    assert schedule.rows_WW.tolist() == matrix(wanted.rows, ranks, ranks)
    assert schedule.own_slots_WE.tolist() == matrix(wanted.own_slots, ranks, experts)
    assert schedule.fetched_slots_WE.tolist() == matrix(wanted.fetched_slots, ranks, experts)


def check_weights(case: Case) -> None:
    """Phase by phase: who sends must have had it before, who gets it must not; in the end each has what it needs."""
    schedule, sizes = case.schedule, case.sizes
    phases = phases_of_all(schedule)
    needed = reference.traffic(case.slots_of_rank, case.geometry, case.plan).needed
    held = reference.owned(case.geometry, sizes)
    goal = {rank: set(elements) for rank, elements in held.items()}
    for rank, expert, slice_ in needed:
        goal[rank] |= {(expert, slice_, i) for i in range(sizes[slice_])}
    sent_by_owner: Counter[tuple[int, int, int]] = Counter()
    pieces: Counter[tuple[int, int]] = Counter()
    for phase in phases:
        before = {rank: frozenset(elements) for rank, elements in held.items()}
        for parcel in phase:
            assert parcel.sender != parcel.receiver
            load = {(parcel.expert, parcel.slice_, i) for i in range(parcel.first, parcel.last)}
            assert load <= before[parcel.sender]
            assert not load & held[parcel.receiver]
            held[parcel.receiver] |= load
            if parcel.sender == case.geometry.owners(parcel.expert)[parcel.slice_]:
                sent_by_owner.update(load)
                pieces[parcel.expert, parcel.slice_] += 1
    assert held == goal
    receivers = Counter((expert, slice_) for _, expert, slice_ in needed)
    is_relayed = {part: min(number, schedule.most_relays) > 1 for part, number in receivers.items()}
    assert len(phases) == bool(needed) + any(is_relayed.values())
    for (expert, slice_), number in receivers.items():
        relays = min(number, schedule.most_relays)
        assert pieces[expert, slice_] == (relays if relays > 1 else number)
        times = 1 if relays > 1 else number
        assert all(sent_by_owner[expert, slice_, i] == times for i in range(sizes[slice_]))


def check_own(case: Case) -> None:
    """What the executor asks for is what the matrices of all ranks say."""
    schedule, ranks = case.schedule, np.arange(case.geometry.ranks)
    rows_WW = schedule.rows_WW
    assert schedule.moves_rows == bool((rows_WW * ~np.eye(len(ranks), dtype=bool)).any())
    some, others = ranks[::2], ranks[::-1][:3]
    assert schedule.rows(some, others).tolist() == rows_WW[np.ix_(some, others)].tolist()
    for rank in ranks:
        assert schedule.rows(ranks[rank : rank + 1], ranks)[0].tolist() == rows_WW[rank].tolist()
        assert schedule.rows(ranks, ranks[rank : rank + 1])[:, 0].tolist() == rows_WW[:, rank].tolist()
        assert schedule.fetches(ranks[rank : rank + 1], slice(None))[0].tolist() == schedule.fetches_WE[rank].tolist()


def check_selection(case: Case) -> None:
    """The chunks' rows are for the receivers in their order, as many as planned; each token's blocks come up once."""
    schedule, layout = case.schedule, case.schedule.workload.layout
    for rank, slots in enumerate(case.slots_of_rank):
        top_k = schedule.workload.top_k
        ids_TK = torch.tensor(slots, dtype=torch.int64).view(len(slots), top_k)
        selection = Selection(schedule, rank, ids_TK)
        fetched = {e for e in range(layout.num_experts) if schedule.fetches_WE[rank, e]}
        met: Counter[tuple[int, int]] = Counter()
        for chunk in range(selection.chunks):
            tokens, ids = selection.tokens(chunk).tolist(), selection.ids(chunk).tolist()
            sizes = part(schedule.rows_WW[rank], chunk, selection.chunks).tolist()
            assert len(tokens) == len(ids) == sum(sizes)
            for receiver, size in enumerate(sizes):
                own = layout.experts_of(receiver)
                for token, row in zip(tokens[:size], ids[:size], strict=True):
                    wanted = [e - own.start if e in own and e not in fetched else NOBODY for e in slots[token]]
                    assert row in (wanted, [NOBODY] * top_k)
                    met[token, receiver] += row != [NOBODY] * top_k
                tokens, ids = tokens[size:], ids[size:]
        for token, row in enumerate(slots):
            for receiver in range(layout.ranks):
                wants = any(e in layout.experts_of(receiver) and e not in fetched for e in row)
                wants &= receiver % layout.slices % schedule.members == rank % schedule.members
                assert met[token, receiver] == wants


def check_order(of_ranks: Sequence[Parcels]) -> None:
    """Sender and receiver go through what is between them in one order; the way back has the same turned round."""
    turned = [own.turned() for own in of_ranks]
    for rank, own in enumerate(of_ranks):
        sent, received = own.sent_by(rank), own.received_by(rank)
        assert [parcel.receiver for parcel in sent] == sorted(parcel.receiver for parcel in sent)
        assert [parcel.sender for parcel in received] == sorted(parcel.sender for parcel in received)
        for other in range(len(of_ranks)):
            for way in (of_ranks, turned):
                there = [parcel for parcel in way[other].sent_by(other) if parcel.receiver == rank]
                assert there == [parcel for parcel in way[rank].received_by(rank) if parcel.sender == other]
            back = [parcel for parcel in turned[rank].sent_by(rank) if parcel.receiver == other]
            assert back == [p._replace(sender=rank, receiver=other) for p in received if p.sender == other]


@settings(max_examples=300)
@given(case=cases())
def test_rows_and_slots(case: Case) -> None:
    check_quantities(case)
    check_own(case)


@settings(max_examples=100)
@given(case=cases())
def test_every_token_goes_where_it_wants(case: Case) -> None:
    check_selection(case)


@settings(max_examples=300)
@given(case=cases())
def test_every_receiver_gets_every_element_once(case: Case) -> None:
    check_weights(case)


@pytest.mark.parametrize("most", [1, 4, 12, 40])
@settings(max_examples=100)
@given(case=cases())
def test_few_relays(case: Case, most: int) -> None:
    """Of many parts, each has fewer relays than receivers, or none."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parcels, "MOST_PIECES", most)
        check_weights(replace(case, plan=replace(case.plan, gather="relay")))


@pytest.mark.slow
@settings(max_examples=5000)
@given(case=cases())
def test_any_schedule_at_length(case: Case) -> None:
    check_quantities(case)
    check_own(case)
    check_selection(case)
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
        assert block * layout.slices + slice_ == rank
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
    assert [list(phase) for phase in phases_of_all(schedule)] == [[(1, 0, 2, 0, 0, 15)]]
