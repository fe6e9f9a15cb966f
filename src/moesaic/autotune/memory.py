"""Timings that outlive a process: one JSON file for each machine and version, in the user's cache folder.

The file is replaced whole, under a lock, after what other processes wrote has been merged in. A computation never fails
by it: what cannot be read counts as empty, what cannot be written is tried again later, and ``problem`` says why.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from moesaic.autotune.signature import Family, Signature
from moesaic.autotune.timings import KEPT, Samples, Timings

# Changed whenever the meaning of what is stored changes.
FORMAT = 1
# Signatures times backends: about a megabyte.
MOST_ENTRIES = 4000
_MOST_FILES = 16
_EVERY_SECONDS = 30.0
_PATIENCE_SECONDS = 1.0
_LARGEST_BUCKET = 128
# Beyond any layer and any call; what is in between can be computed with.
_LARGEST = 1 << 40
_FEWEST_SECONDS, _MOST_SECONDS = 1e-12, 1e9
_TYPES: dict[str, type] = {"str": str, "int": int, "bool": bool}

# Signature and backend to seconds of a typical call and the number of timings behind them, the longest untouched first.
Entries = dict[tuple[Signature, str], tuple[float, int]]
# Seconds that the cost model expects of a typical call of a signature on a backend; None for a backend unknown here.
Expected = Callable[[Signature, str], float | None]


class Memory:
    """The file of one machine.

    Args:
        folder: of all such files; made when it is first written to.
        machine: everything that makes timings of another machine or version worthless here; the file's name and its
            head follow from it.
        expected: what turns a stored time into a ratio and back, so that a change of the cost model spoils nothing.
        clock: seconds, to space out the writing.
    """

    def __init__(
        self, folder: Path, machine: Mapping[str, Any], expected: Expected, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.machine = {"format": FORMAT, **machine}
        digest = hashlib.blake2b(json.dumps(self.machine, sort_keys=True).encode(), digest_size=8).hexdigest()
        self.file = folder / f"timings-{digest}.json"
        self.problem: str | None = None
        self._expected = expected
        self._clock = clock
        self._saved_at: float | None = None

    def load(self, timings: Timings) -> None:
        """Put what earlier processes left into ``timings``."""
        for (signature, backend), (seconds, count) in self.read().items():
            expected = self._expected(signature, backend)
            if expected:
                timings.of(signature, backend).remember(seconds / expected, count)

    def read(self) -> Entries:
        """The file's entries; none where there is no file, or not a sound one of this machine."""
        try:
            told = json.loads(self.file.read_bytes())
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, RecursionError) as error:
            self.problem = f"cannot read {str(self.file)!r}, which is ignored: {error}"
            return {}
        if (
            not isinstance(told, dict)
            or told.get("machine") != self.machine
            or not isinstance(told.get("timings"), list)
        ):
            self.problem = f"{str(self.file)!r} is ignored: it is not of this machine, or no file of timings"
            return {}
        return dict(filter(None, map(_entry, told["timings"])))

    def save_sometimes(self, timings: Timings) -> None:
        """:meth:`save`, at most every half minute, and only if there is much that the file does not hold."""
        now = self._clock()
        if self._saved_at is None:
            self._saved_at = now  # a short process writes once, at its end
        elif now - self._saved_at >= _EVERY_SECONDS:
            self._saved_at = now
            if any(samples.trusted and 2 * samples.fresh >= samples.noted for *_, samples in timings):
                self.save(timings, patience=0.0)

    def save(self, timings: Timings, patience: float = _PATIENCE_SECONDS) -> None:
        """Add what is fresh in ``timings`` to the file.

        Args:
            patience: seconds to wait for another process that is writing.
        """
        fresh = [each for each in timings if each[2].fresh and each[2].trusted]
        if not fresh:
            return
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with _lock(self.file.with_suffix(".lock"), patience) as is_ours:
                if not is_ours:
                    return  # later
                entries = self.read()
                added = [(signature, backend, samples, samples.fresh) for signature, backend, samples in fresh]
                for signature, backend, samples, count in added:
                    self._merge(entries, signature, backend, samples, count)
                self._replace(entries)
            for *_, samples, count in added:
                samples.fresh -= count
            self.problem = None
        except OSError as error:
            self.problem = f"cannot write {str(self.file)!r}: {error.strerror or error}"

    def _merge(self, entries: Entries, signature: Signature, backend: str, samples: Samples, fresh: int) -> None:
        expected = self._expected(signature, backend)
        if not expected:
            return
        count = min(fresh, KEPT)
        seconds = samples.typical(count) * expected
        before = entries.pop((signature, backend), None)  # so that it goes to the end
        if before is not None:
            # Many old timings must not keep a machine from being found changed.
            weight = min(before[1], KEPT)
            seconds = (before[0] * weight + seconds * count) / (weight + count)
            fresh += before[1]
        entries[signature, backend] = seconds, fresh

    def _replace(self, entries: Entries) -> None:
        latest = list(entries.items())[-MOST_ENTRIES:]
        told = {"machine": self.machine, "timings": [_told(*key, *value) for key, value in latest]}
        making = self.file.with_name(f"{self.file.name}.making-{uuid.uuid4().hex}")
        try:
            making.write_text(json.dumps(told), encoding="utf-8")
            making.replace(self.file)
        finally:
            making.unlink(missing_ok=True)
        self._sweep()

    def _sweep(self) -> None:
        """Other versions and machines leave files too: the longest untouched ones go."""
        files = sorted(self.file.parent.glob("timings-*.json"), key=lambda file: file.stat().st_mtime)
        for file in files[:-_MOST_FILES]:
            file.unlink(missing_ok=True)
            file.with_suffix(".lock").unlink(missing_ok=True)


def _told(signature: Signature, backend: str, seconds: float, count: int) -> dict[str, Any]:
    return {**asdict(signature), "backend": backend, "seconds": seconds, "count": count}


def _entry(told: Any) -> tuple[tuple[Signature, str], tuple[float, int]] | None:
    """One entry as it is used, or None for what is not one."""
    try:
        family = Family(**_typed(Family, told["family"]))
        signature = Signature(family=family, **_typed(Signature, told))
        backend, seconds, count = told["backend"], told["seconds"], told["count"]
    except (LookupError, TypeError, OverflowError):
        return None
    sound = isinstance(backend, str) and type(count) is int and type(seconds) in (int, float)
    if not sound or not 1 <= count <= _LARGEST or not _FEWEST_SECONDS <= seconds <= _MOST_SECONDS:
        return None
    sizes = [family.num_experts, family.d_model, family.d_ff, family.hidden]
    if min(sizes) < 1 or (family.device == "cpu" and family.threads < 1):
        return None
    if not (0 < signature.rows <= _LARGEST_BUCKET and 0 <= signature.spread <= _LARGEST_BUCKET):
        return None
    return (signature, backend), (float(seconds), count)


def _typed(kind: type, told: dict[str, Any]) -> dict[str, Any]:
    """The plain fields of a dataclass as JSON holds them; TypeError for another type, OverflowError for no size."""
    found = {}
    for field in fields(kind):
        wanted = _TYPES.get(str(field.type))
        if wanted is None:
            continue
        if type(told[field.name]) is not wanted:
            raise TypeError(field.name)
        if wanted is int and not 0 <= told[field.name] <= _LARGEST:
            raise OverflowError(field.name)
        found[field.name] = told[field.name]
    return found


@contextlib.contextmanager
def _lock(path: Path, patience: float) -> Iterator[bool]:
    """Whether the file is ours to replace: nobody else holds the lock, or this file system has none."""
    with path.open("ab") as file:
        end = time.monotonic() + patience
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() >= end:
                    yield False
                    return
                time.sleep(0.01)
                continue
            except OSError:
                pass  # replacing is atomic all the same; at worst one process's timings are lost
            break
        yield True
