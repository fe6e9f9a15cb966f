"""What has been timed: a few ratios of measured to expected seconds for each kind of call and backend."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from statistics import median

from moesaic.autotune.signature import Family, Signature

# How many of the latest timings are kept, and how many make a figure that may decide.
KEPT, ENOUGH = 9, 3
# Farther buckets say nothing about each other.
_NEARBY = 8


class Samples:
    """The latest timings of one backend for one signature, each divided by what the cost model expects of that call.

    The division takes out how the calls of one bucket differ in size. ``noted`` counts all timings of this process,
    ``fresh`` those that no file holds yet.
    """

    __slots__ = ("fresh", "noted", "ratios")

    def __init__(self) -> None:
        self.ratios: deque[float] = deque(maxlen=KEPT)
        self.noted = self.fresh = 0

    def note(self, ratio: float) -> None:
        """Add one timing."""
        self.ratios.append(ratio)
        self.noted += 1
        self.fresh += 1

    def remember(self, ratio: float, count: int) -> None:
        """Take over what ``count`` timings of earlier processes came to."""
        self.ratios.extendleft([ratio] * min(count, ENOUGH))

    @property
    def trusted(self) -> bool:
        return len(self.ratios) >= ENOUGH

    def typical(self, latest: int = KEPT) -> float:
        """What the fastest quarter stays within: whatever disturbs a timing makes it slower.

        Args:
            latest: of how many of the latest timings.
        """
        ratios = sorted(list(self.ratios)[-latest:])
        return ratios[len(ratios) // 4]

    def disturbance(self) -> float:
        """How many times the typical timing the average one is."""
        ratios = list(self.ratios)
        return sum(ratios) / len(ratios) / self.typical() if ratios else 1.0


class Timings:
    """All samples of a process, by family, signature and backend."""

    def __init__(self) -> None:
        self._families: dict[Family, dict[Signature, dict[str, Samples]]] = {}

    def of(self, signature: Signature, backend: str) -> Samples:
        """The samples of one backend for one signature; made empty where there are none."""
        by_backend = self._families.setdefault(signature.family, {}).setdefault(signature, {})
        # Another thread may come first: setdefault gives both the same one.
        return by_backend.setdefault(backend, Samples())

    def nearby(self, signature: Signature, backend: str) -> float | None:
        """The backend's ratio in the nearest bucket where it was timed often enough, or None."""
        best: tuple[int, float] | None = None
        for other, by_backend in list(self._families.get(signature.family, {}).items()):
            samples = by_backend.get(backend)
            if samples is None or not samples.trusted or other == signature:
                continue
            distance = signature.distance(other)
            if distance <= _NEARBY and (best is None or distance < best[0]):
                best = distance, samples.typical()
        return None if best is None else best[1]

    def anywhere(self, family: Family, backend: str) -> float | None:
        """The backend's middle ratio over everything that was timed on the same device in the same format, or None."""
        ratios = [
            samples.typical()
            for signature, name, samples in self
            if name == backend and samples.trusted and _alike(signature.family, family)
        ]
        return median(ratios) if ratios else None

    def __iter__(self) -> Iterator[tuple[Signature, str, Samples]]:
        for signatures in list(self._families.values()):
            for signature, by_backend in list(signatures.items()):
                for backend, samples in list(by_backend.items()):
                    if samples.ratios:
                        yield signature, backend, samples


def _alike(one: Family, other: Family) -> bool:
    return (one.device, one.format, one.grad, one.threads) == (other.device, other.format, other.grad, other.threads)
