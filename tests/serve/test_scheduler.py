"""The scheduler: everybody finishes in turn, nobody stalls, budgets hold, and no page is lost, whatever happens."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesaic.serve.scheduler import Chunk, Scheduler
from moesaic.serve.sequence import Sequence

PAGE = 4


def sequence(order: int, prompt: list[int], output: int = 4, index: int = 0, root: str | None = None) -> Sequence:
    return Sequence((order, index), np.asarray(prompt, np.int64), root, len(prompt) + output)


@dataclass
class Driver:
    """Plays the engine: runs steps, chooses tokens, ends sequences; checks each plan against the rules."""

    scheduler: Scheduler
    steps: int = 0
    finished: list[Sequence] = field(default_factory=list)
    admitted: list[Sequence] = field(default_factory=list)

    def step(self) -> list[Chunk]:
        scheduler = self.scheduler
        generating = {each for each in scheduler.running if each.pending == 1}
        before = scheduler.preemptions
        chunks = scheduler.schedule()
        self.steps += 1
        scheduled = [chunk.sequence for chunk in chunks]
        assert len(set(scheduled)) == len(scheduled)
        assert set(scheduled) <= set(scheduler.running)
        assert sum(chunk.count for chunk in chunks) <= scheduler.token_budget
        assert len(scheduler.running) <= scheduler.max_running
        assert scheduler.running == sorted(scheduler.running)
        # Whoever generates, and did not have to give way, gets its token.
        assert generating <= set(scheduled) or scheduler.preemptions > before
        assert (generating & set(scheduler.running)) <= set(scheduled)
        if scheduler.running and scheduler.preemptions == before:
            assert chunks
        for chunk in chunks:
            self.check(chunk)
            if chunk.sequence not in self.admitted:
                self.admitted.append(chunk.sequence)
            if chunk.last:
                chunk.sequence.append(1000 + chunk.sequence.length)
                if chunk.sequence.length == chunk.sequence.limit:
                    scheduler.remove(chunk.sequence)
                    self.finished.append(chunk.sequence)
        self.count_pages()
        return chunks

    def check(self, chunk: Chunk) -> None:
        each = chunk.sequence
        assert chunk.count >= 1
        assert each.computed == chunk.start + chunk.count
        assert chunk.last == (each.pending == 0)
        assert each.num_pages * PAGE >= each.computed
        assert [node.page for node in each.nodes] == each.pages()[: each.computed // PAGE].tolist()
        assert len(set(each.pages().tolist())) == each.num_pages

    def count_pages(self) -> None:
        pool, tree = self.scheduler.pool, self.scheduler.tree
        held = {page for each in self.scheduler.running for page in each.pages().tolist()}
        assert pool.used == len(held)
        assert pool.used + pool.cached + pool.free == pool.total
        assert tree.available() == pool.cached + pool.free

    def finish(self) -> None:
        while self.scheduler.has_work:
            self.step()
            assert self.steps < 5000, "it does not come to an end"


def driver(pages: int = 64, max_batch: int = 8, token_budget: int = 16) -> Driver:
    return Driver(Scheduler(pages, PAGE, max_batch, token_budget))


def counts(chunks: list[Chunk]) -> dict[int, int]:
    return {chunk.sequence.order[0]: chunk.count for chunk in chunks}


def test_a_prompt_is_computed_in_chunks_beside_what_generates() -> None:
    run = driver(token_budget=6)
    run.scheduler.add([sequence(0, [1, 2, 3], output=9)])
    run.step()
    run.scheduler.add([sequence(1, list(range(10, 24)), output=2)])
    assert [counts(run.step()) for _ in range(4)] == [{0: 1, 1: 5}, {0: 1, 1: 5}, {0: 1, 1: 4}, {0: 1, 1: 1}]


def test_the_oldest_prompt_takes_the_budget_first() -> None:
    run = driver(token_budget=6)
    for order in range(3):
        run.scheduler.add([sequence(order, [order] * 4)])
    assert counts(run.step()) == {0: 4, 1: 2}
    assert counts(run.step()) == {0: 1, 1: 2, 2: 3}


def test_nobody_overtakes_who_waits_for_pages() -> None:
    run = driver(pages=8)
    run.scheduler.add([sequence(0, [0] * 16, output=2)])
    run.step()
    run.scheduler.add([sequence(1, [1] * 16)])  # four pages are free, and one is kept for the first
    run.scheduler.add([sequence(2, [2] * 2)])  # this one would fit
    assert counts(run.step()) == {0: 1}
    run.finish()
    assert [each.order[0] for each in run.admitted] == [0, 1, 2]


def test_the_youngest_gives_way_and_goes_on_from_what_is_still_there() -> None:
    run = driver(pages=6)
    old, young = sequence(0, [0] * 7, output=15), sequence(1, [1] * 7, output=10)
    run.scheduler.add([old])
    run.scheduler.add([young])
    while not run.scheduler.preemptions:
        run.step()
    assert run.scheduler.running == [old]
    assert (young.num_pages, young.computed) == (0, 0)
    assert run.scheduler.num_waiting == 1
    length = young.length
    run.finish()
    assert run.finished == [old, young]
    assert length < young.length == young.limit


def test_equal_beginnings_are_computed_once() -> None:
    run = driver(token_budget=64)
    prefix = list(range(12))
    run.scheduler.add([sequence(0, [*prefix, 100])])
    run.scheduler.add([sequence(1, [*prefix, 101, 102])])
    assert counts(run.step()) == {0: 13, 1: 2}  # in one step already
    assert run.scheduler.pool.used == 3 + 2
    run.scheduler.add([sequence(2, prefix)])
    assert counts(run.step())[2] == 4  # the last token is computed in any case
    run.scheduler.add([sequence(3, prefix, root="another adapter")])
    assert counts(run.step())[3] == 12


def test_continuations_share_their_prompt() -> None:
    run = driver(token_budget=10)
    first, *others = (sequence(0, list(range(14)), index=index) for index in range(3))
    run.scheduler.add([first, *others])
    assert run.scheduler.num_waiting == 3
    run.step()
    assert run.scheduler.running == [first]
    assert [chunk.count for chunk in run.step()] == [4, 2, 2]
    assert run.scheduler.pool.used == 3 + 3
    run.finish()
    assert len(run.finished) == 3


def test_continuations_go_on_without_the_first() -> None:
    run = driver(token_budget=10)
    first, other = (sequence(0, list(range(14)), index=index) for index in range(2))
    run.scheduler.add([first, other])
    run.step()
    run.scheduler.remove(first)
    run.finish()
    assert run.finished == [other]


def test_who_leaves_the_queue_is_forgotten() -> None:
    scheduler = Scheduler(8, PAGE, 1, 8)
    first = sequence(0, [1] * 5, 9)
    scheduler.add([first])
    scheduler.schedule()
    waiting = [sequence(order, [order], 1) for order in (2, 1)]
    for one in waiting:
        scheduler.add([one])
    for order in range(3, 1000):
        left = sequence(order, [1] * 5)
        scheduler.add([left])
        scheduler.remove(left)
    assert scheduler.num_waiting == 2 and len(scheduler._waiting) < 100
    scheduler.remove(first)
    assert [chunk.sequence for chunk in scheduler.schedule()] == [waiting[1]]


def test_after_a_failed_step_nothing_is_trusted() -> None:
    run = driver()
    run.scheduler.add([sequence(0, list(range(9)))])
    run.scheduler.add([sequence(1, list(range(9)))])
    run.step()
    run.scheduler.preempt_all()
    assert run.scheduler.pool.free == run.scheduler.pool.total
    run.finish()
    assert len(run.finished) == 2


@pytest.mark.parametrize("budget", [1, 3])
def test_a_small_budget_limits_how_many_run(budget: int) -> None:
    run = driver(token_budget=budget)
    for order in range(5):
        run.scheduler.add([sequence(order, [order] * 5)])
    run.finish()
    assert [each.order[0] for each in run.finished] == list(range(5))


prompts = st.lists(st.sampled_from("ab"), min_size=1, max_size=30).map(lambda text: [ord(c) for c in text])
arrivals = st.lists(
    st.tuples(
        st.integers(0, 3),  # steps before it
        prompts,
        st.integers(1, 20),  # tokens of output
        st.integers(1, 3),  # continuations
        st.sampled_from(["base", "adapter"]),
        st.one_of(st.none(), st.integers(0, 12)),  # cancelled after so many steps
    ),
    min_size=1,
    max_size=10,
)


@given(arrivals, st.integers(13, 40), st.integers(1, 6), st.integers(1, 40))
def test_whatever_happens(
    arrivals: list[tuple[int, list[int], int, int, str, int | None]], pages: int, max_batch: int, budget: int
) -> None:
    run = driver(pages, max_batch, budget)
    due: dict[int, list[Sequence]] = {}
    wanted, cancelled = [], set()
    for order, (wait, prompt, output, n, root, patience) in enumerate(arrivals):
        for _ in range(wait):
            run.step()
            for each in due.pop(run.steps, ()):
                run.scheduler.remove(each)
        group = [sequence(order, prompt, output, index, root) for index in range(n)]
        run.scheduler.add(group)
        wanted += group
        if patience is not None:
            due.setdefault(run.steps + patience + 1, []).extend(group)
            cancelled |= set(group)
    while run.scheduler.has_work:
        run.step()
        for each in due.pop(run.steps, ()):
            run.scheduler.remove(each)
        assert run.steps < 5000
    assert set(wanted) - cancelled <= set(run.finished)
    assert all(each.length == each.limit for each in run.finished)
    # First come, first served: of the requests' first continuations, nobody is admitted before an older one.
    leaders = [each.order for each in run.admitted if each.order[1] == 0]
    assert leaders == sorted(leaders)
    assert run.scheduler.num_waiting == 0
    assert run.scheduler.pool.used == 0
    run.scheduler.tree.clear()
    assert run.scheduler.pool.free == pages
