"""Processes find one another through a store that may still hold what earlier processes have left in it.

torchrun keeps its store when it starts the workers of a job anew, and so the keys of those that have died: a process
that reads one of them waits for an address that nobody has any more (pytorch issue 135712; the count of restarts, with
which keys could be told apart, differs from host to host). Here only what an answer to a fresh call says is believed.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from moesaic.errors import ParallelError
from moesaic.parallel.liveness.suspects import listed

# Seconds after which a rank looks whether the call that it has answered is still the last one.
_PATIENCE = 0.5


def meet(store: Any, ranks: Sequence[int], place: int, mine: str, timeout: float) -> tuple[Any, list[str]]:
    """A part of ``store`` that only the processes that meet now have written to, and what each of them brings.

    The first rank calls, the others answer with a word of their own, and the first one lists the answers: who finds its
    word there has met the others.

    Args:
        ranks: of the processes in the job; ``place`` is this one's among them.
        timeout: seconds.

    Raises:
        ParallelError: for a store that fails, and where somebody does not come in time; names the ranks.
    """
    end = time.monotonic() + timeout
    told = f"rank {ranks[place]} waited {timeout:.1f} s for all ranks to start"
    word = json.dumps([uuid.uuid4().hex, mine])
    call = ""
    try:
        if place == 0:
            call = uuid.uuid4().hex
            store.set("call", call)
            store.set(f"{call}/0", word)
            words = _answers(store, call, len(ranks), end)
            store.set(f"{call}/all", json.dumps(words))
        else:
            words = []
            while word not in words:
                call = _answer(store, call, place, word, end)
                words = _listed(store, call, end)
    except RuntimeError as error:
        late = _late(store, call, ranks)
        why = f"{listed(late, ', ')} did not come" if late else f"their store has failed ({error})"
        raise ParallelError(f"{told}: {why}") from error
    return PrefixStore(call, store), [json.loads(each)[1] for each in words]


def fresh_store(timeout: float) -> tuple[Any, int, int]:
    """Store, rank and world size for ``init_process_group``, as its ``env://`` finds them, without old keys.

    Args:
        timeout: seconds that the other ranks may take to start.

    Raises:
        ParallelError: where somebody does not come in time.
    """
    store, rank, size = next(rendezvous("env://", timeout=timedelta(seconds=timeout)))
    found, _ = meet(PrefixStore("moesaic/meeting", store), range(size), rank, "", timeout)
    return found, rank, size


def _answers(store: Any, call: str, size: int, end: float) -> list[str]:
    keys = [f"{call}/{place}" for place in range(size)]
    store.wait(keys, _left(end))
    return [text.decode() for text in store.multi_get(keys)]


def _answer(store: Any, before: str, place: int, word: str, end: float) -> str:
    """Answer the last call, unless that was done; returns it."""
    store.wait(["call"], _left(end))
    call: str = store.get("call").decode()
    if call != before:
        store.set(f"{call}/{place}", word)
    return call


def _listed(store: Any, call: str, end: float) -> list[str]:
    """The answers that are listed to a call; none where it takes so long that there may be another one by now."""
    try:
        store.wait([f"{call}/all"], min(_left(end), timedelta(seconds=_PATIENCE)))
    except RuntimeError:
        if time.monotonic() > end:
            raise
        return []
    words: list[str] = json.loads(store.get(f"{call}/all"))
    return words


def _left(end: float) -> timedelta:
    return timedelta(seconds=max(end - time.monotonic(), 0.001))


def _late(store: Any, call: str, ranks: Sequence[int]) -> list[str]:
    """Who has not answered the call, as far as the store can still tell."""
    try:
        here = [store.check([f"{call}/{place}"]) for place in range(len(ranks))]
    except RuntimeError:
        return []
    late = [f"rank {rank}" for rank, is_here in zip(ranks, here, strict=True) if not is_here]
    return late if call and late else [f"rank {ranks[0]}"]
