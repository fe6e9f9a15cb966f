"""Processes meet through a store in which earlier ones have left things."""

from __future__ import annotations

import threading

import pytest
import torch.distributed as dist

from moesaic.errors import ParallelError
from moesaic.parallel.liveness.meeting import meet

FOREVER = 240.0  # seconds


def meet_all(store: dist.Store, size: int) -> list[tuple[dist.Store, list[str]]]:
    """All places at once, each in a thread of its own."""
    met: dict[int, tuple[dist.Store, list[str]]] = {}

    def come(place: int) -> None:
        met[place] = meet(store.clone(), range(size), place, f"from {place}", FOREVER)

    threads = [threading.Thread(target=come, args=(place,)) for place in reversed(range(size))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(FOREVER)
    return [met[place] for place in range(size)]


def test_all_bring_something_and_share_what_they_write() -> None:
    met = meet_all(dist.HashStore(), 4)
    assert [words for _, words in met] == [[f"from {place}" for place in range(4)]] * 4
    met[3][0].set("key", "value")
    assert [store.get("key") for store, _ in met] == [b"value"] * 4


def test_what_those_before_have_left_is_not_believed() -> None:
    store = dist.HashStore()
    first = meet_all(store, 3)
    first[0][0].set("address", "of a dead process")
    for _ in range(5):
        met = meet_all(store, 3)
        assert [words for _, words in met] == [[f"from {place}" for place in range(3)]] * 3
        assert not any(part.check(["address"]) for part, _ in met)


def test_an_old_call_is_answered_and_given_up() -> None:
    store = dist.HashStore()
    store.set("call", "an old one")  # of an attempt that died before its list
    assert len(meet_all(store, 3)[2][1]) == 3


@pytest.mark.parametrize(("place", "missing"), [(0, "rank 1, rank 2"), (1, "rank 0")])
def test_who_does_not_come_is_named(place: int, missing: str) -> None:
    told = f"^rank {place} waited 0.1 s for all ranks to start: {missing} did not come$"
    with pytest.raises(ParallelError, match=told):
        meet(dist.HashStore(), range(3), place, "", 0.1)
