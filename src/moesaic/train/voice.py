"""What ends a job of several ranks is said once, by one of them."""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from moesaic.errors import MoesaicError, Told
from moesaic.train.world import joined_by, launched

# Rank 0 speaks where it can: so long the others wait for it, and then for whoever speaks to have spoken.
_FOR_RANK_0 = timedelta(seconds=2)
_FOR_THE_SPEAKER = timedelta(seconds=5)


@contextlib.contextmanager
def one_voice() -> Iterator[None]:
    """Let the error of one rank through, of rank 0 where it has one, and replace those of the others by :class:`Told`.

    The others' processes end after the speaker's, because a launcher ends all as soon as one has failed.
    """
    if launched() == 1:
        yield
        return
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # we are ending; the line must not be cut off
        if _is_told_by_another():
            raise Told(_exit_code(error)) from error
        raise


def is_first() -> bool:
    """Whether this process is the one that shows results: rank 0, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def _is_told_by_another() -> bool:
    """Whether another rank speaks, which has then ended; else this one does."""
    try:
        store = PrefixStore("voice", joined_by[-1] if joined_by else _store_of_launcher())
        if not is_first():
            _wait_for(store, "speaks", _FOR_RANK_0)
        if store.add("speakers", 1) > 1:
            _wait_for(store, "spoken", _FOR_THE_SPEAKER)
            return True
        store.set("speaks", "")
        atexit.register(_leave, store)
    except (RuntimeError, ValueError, OSError):  # the store has gone with its host
        return False
    return False


def _store_of_launcher() -> Any:
    # torchrun keeps its store when it starts the workers anew.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return PrefixStore(attempt, next(rendezvous("env://", timeout=_FOR_THE_SPEAKER))[0])


def _wait_for(store: Any, key: str, limit: timedelta) -> None:
    # Not by wait(), whose end PyTorch reports on standard error.
    end = time.monotonic() + limit.total_seconds()
    while not store.check([key]) and time.monotonic() < end:
        time.sleep(0.05)


def _leave(store: Any) -> None:
    with contextlib.suppress(RuntimeError):
        store.set("spoken", "")


def _exit_code(error: BaseException) -> int:
    return error.exit_code if isinstance(error, MoesaicError) else 130 if isinstance(error, KeyboardInterrupt) else 1
