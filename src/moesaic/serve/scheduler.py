"""What the next step computes: tokens of running sequences first, then prompts in chunks; who waits, who gives way."""

from __future__ import annotations

import heapq
from bisect import insort
from collections.abc import Sequence as Items
from dataclasses import dataclass

from moesaic.serve.pages import PagePool
from moesaic.serve.prefix import PrefixTree
from moesaic.serve.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens ``start`` to ``start + count - 1`` of a sequence; ``last``: its next token follows from them."""

    sequence: Sequence
    start: int
    count: int
    last: bool


class Scheduler:
    """Continuous batching with chunked prompts (Agrawal et al., Sarathi-Serve, section 4), and no clock.

    * Every sequence that generates gets a token in every step: a step computes those first, and fills what
      ``token_budget`` leaves with prompts, in chunks. The time between two tokens of a running request is therefore at
      most that of one step over ``token_budget`` tokens, however long the prompts that arrive.
    * First come, first served: nobody overtakes the oldest that waits, so nobody starves.
    * A sequence gets the pages of all its tokens when it is admitted, and further ones as it grows. Where none is left
      the youngest gives way: it goes back to its place in the queue, to be computed again from what the prefix tree
      still has of it. The oldest never gives way to anyone, so there is always progress.
    * Pages are in the tree from the step that fills them: a model stores a layer's keys before it attends to them, so
      a sequence may share pages that an older one fills in the same step.

    Args:
        pages: of the KV cache. page_size: tokens of a page.
        max_batch: sequences that run at once; not more than ``token_budget`` do either.
        token_budget: tokens of a step.
    """

    def __init__(self, pages: int, page_size: int, max_batch: int, token_budget: int) -> None:
        self.page_size = page_size
        self.max_running = min(max_batch, token_budget)
        self.token_budget = token_budget
        self.pool = PagePool(pages)
        self.tree = PrefixTree(self.pool)
        self.running: list[Sequence] = []  # oldest first
        self.preemptions = 0
        self._waiting: list[Sequence] = []  # a heap; may hold sequences that have been removed
        self._queued: set[Sequence] = set()
        self._followers: dict[Sequence, list[Sequence]] = {}

    @property
    def has_work(self) -> bool:
        return bool(self.running or self._queued)

    @property
    def num_waiting(self) -> int:
        return len(self._queued) + sum(map(len, self._followers.values()))

    def add(self, continuations: Items[Sequence]) -> None:
        """Queue the continuations of a request. The first computes the prompt, whose pages the others then share."""
        leader, *followers = continuations
        self._queue(leader)
        if followers:
            self._followers[leader] = followers

    def schedule(self) -> list[Chunk]:
        """Decide the next step, and take it as computed: pages are assigned, and ``computed`` has advanced."""
        preempted = self._make_room()
        chunks: list[Chunk] = []
        budget = self.token_budget
        generating = [sequence for sequence in self.running if sequence.pending == 1]
        prompts = [sequence for sequence in self.running if sequence.pending > 1]
        for sequence in (*generating, *prompts):
            if budget:
                budget -= self._advance(sequence, budget, chunks)
        while budget and not preempted and len(self.running) < self.max_running and self._queued:
            sequence = self._next()
            if not self._admit(sequence):
                self._queue(sequence)
                break
            budget -= self._advance(sequence, budget, chunks)
        return chunks

    def remove(self, sequence: Sequence) -> None:
        """A sequence has ended, or is not wanted any more, wherever it is."""
        if sequence in self._queued:
            self._queued.discard(sequence)
            # Clients that come and leave while the oldest waits would fill the heap.
            if len(self._waiting) > 2 * len(self._queued) + 64:
                self._waiting = sorted(self._queued)
        elif sequence in self.running:
            self.running.remove(sequence)
            self._release(sequence)
        for follower in self._followers.pop(sequence, ()):
            self._queue(follower)

    def preempt_all(self) -> None:
        """Send everything that runs back to the queue and forget all pages: what a failed step wrote is unknown."""
        for sequence in list(self.running):
            self._preempt(sequence)
        self.tree.clear()

    def _make_room(self) -> bool:
        """A page for the next token of each sequence that generates; True where somebody had to give way for it."""
        before = self.preemptions
        index = 0
        while index < len(self.running):
            sequence = self.running[index]
            if sequence.computed == sequence.num_pages * self.page_size:
                while not self.tree.available() and sequence is not self.running[-1]:
                    self._preempt(self.running[-1])
                if not self.tree.available():
                    self._preempt(sequence)
                    break
                sequence.add_page(self.tree.take())
            index += 1
        return self.preemptions > before

    def _advance(self, sequence: Sequence, budget: int, chunks: list[Chunk]) -> int:
        count = min(sequence.pending, budget)
        start = sequence.computed
        sequence.computed += count
        chunks.append(Chunk(sequence, start, count, sequence.pending == 0))
        full = sequence.computed // self.page_size
        if full > len(sequence.nodes):
            pages = sequence.pages().tolist()
            for key in sequence.page_keys(self.page_size, len(sequence.nodes), full):
                parent = sequence.nodes[-1] if sequence.nodes else None
                sequence.add_node(self.tree.extend(sequence.root, parent, key, pages[len(sequence.nodes)]))
        if self._followers and sequence.computed >= sequence.prompt_length:
            for follower in self._followers.pop(sequence, ()):
                self._queue(follower)
        return count

    def _admit(self, sequence: Sequence) -> bool:
        """Give a sequence the pages of its tokens and let it run, where there is room for that."""
        # The last token is computed in any case: the next one follows from what it computes.
        known = self.tree.match(
            sequence.root, sequence.page_keys(self.page_size, 0, (sequence.length - 1) // self.page_size)
        )
        missing = -(-sequence.length // self.page_size) - len(known)
        # One page more for each that runs: else the newcomer would soon have to give way again.
        if self.tree.available() - self.tree.unheld(known) < missing + len(self.running):
            return False
        self.tree.claim(known)
        for node in known:
            sequence.add_page(node.page)
            sequence.add_node(node)
        for _ in range(missing):
            sequence.add_page(self.tree.take())
        sequence.computed = len(known) * self.page_size
        if sequence.cached is None:
            sequence.cached = sequence.computed
        insort(self.running, sequence)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._release(sequence)
        self._queue(sequence)
        self.preemptions += 1

    def _release(self, sequence: Sequence) -> None:
        for page in sequence.own_pages():
            self.pool.drop(page, keep=False)
        self.tree.release(sequence.nodes)
        sequence.forget_pages()

    def _queue(self, sequence: Sequence) -> None:
        self._queued.add(sequence)
        heapq.heappush(self._waiting, sequence)

    def _next(self) -> Sequence:
        while (sequence := heapq.heappop(self._waiting)) not in self._queued:
            pass
        self._queued.discard(sequence)
        return sequence
