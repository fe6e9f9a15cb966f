"""The tuner of this process, and what can be asked of it."""

from __future__ import annotations

import atexit
import functools
import os
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moesaic import hardware
from moesaic.autotune.decision import Candidate, Decision, estimates
from moesaic.autotune.memory import Memory
from moesaic.autotune.prior import costs
from moesaic.autotune.signature import Signature
from moesaic.autotune.tuner import Statistics, Tuner
from moesaic.dispatch import Dispatch
from moesaic.errors import UsageError
from moesaic.experts import BACKENDS, Choice, ExpertWeights
from moesaic.experts.backend import Tuned, tune_with
from moesaic.experts.native import library
from moesaic.folders import cache_folder


@functools.cache
def tuner() -> Tuner:
    """The one tuner of this process."""
    made = Tuner(BACKENDS, _memory)
    atexit.register(made.save)
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=made.start_anew)
    return made


def install() -> None:
    """Let the tuner compute the calls of ``"auto"``."""
    tune_with(tuner().run)


def explain() -> list[Choice]:
    """What ``"auto"`` would do now for every kind of call that it knows, with the estimates that it rests on.

    That is each :class:`Signature` that was met in this process or timed in an earlier one on this machine, each for a
    call of typical size, the smallest calls of each family first.
    """
    timings = tuner().known_timings()
    met = {decision.signature: decision for decision in tuner().decisions()}
    for signature, backend, _ in timings:
        if signature not in met and backend in BACKENDS:
            model = costs(signature.family, BACKENDS)
            able = [name for name in BACKENDS if BACKENDS.get(name).missing() is None or name == backend]
            candidates = [
                Candidate(name, BACKENDS.get(name), model[name], timings.of(signature, name)) for name in able
            ]
            met[signature] = Decision(signature, candidates, frozen=True)
    told = {}
    for signature, decision in met.items():
        guesses = decision.guesses(signature.typical_rows(), signature.typical_active(), timings)
        if not decision.calls:
            decision.settle(guesses)
        told[signature] = Choice(decision.best.name, decision.choice.why, signature, estimates(guesses))
    return [told[signature] for signature in sorted(told, key=Signature.order)]


def statistics() -> Statistics:
    """What tuning has cost in this process, and what became of its file."""
    return tuner().statistics()


class _Blocks:
    """Of :func:`record` and :func:`replay` that are open."""

    open: int = 0


def needs_every_call() -> bool:
    """Whether calls are recorded or replayed: then all of them have to come by here."""
    return _Blocks.open > 0


@contextmanager
def _instead(run: Tuned) -> Iterator[None]:
    """Let ``run`` compute the calls of ``"auto"`` in a block."""
    before = tune_with(run)
    _Blocks.open += 1
    try:
        yield
    finally:
        _Blocks.open -= 1
        tune_with(before)


@contextmanager
def record() -> Iterator[list[Choice]]:
    """Collect the choices of all calls of ``"auto"`` in a block, in their order; their names can be replayed."""
    log: list[Choice] = []
    computes = tuner().run

    def run(x_TD: Tensor, dispatch: Dispatch, weights: ExpertWeights) -> tuple[Tensor, Choice]:
        y_TD, choice = computes(x_TD, dispatch, weights)
        log.append(choice)
        return y_TD, choice

    with _instead(run):
        yield log


@contextmanager
def replay(names: Sequence[str]) -> Iterator[None]:
    """Let the calls of ``"auto"`` in a block be computed by these backends, one after the other.

    With the names that :func:`record` saw, one thread and the same input, the output is the same bit for bit.

    Raises:
        UsageError: at the call that follows the last name.
        ConfigError: for an unknown name.
    """
    backends = iter([BACKENDS.get(name) for name in names])
    told = iter(names)

    def run(x_TD: Tensor, dispatch: Dispatch, weights: ExpertWeights) -> tuple[Tensor, Choice]:
        backend = next(backends, None)
        if backend is None:
            raise UsageError(f"there are more calls than the {len(names)} choices that are replayed")
        return backend.run(x_TD, dispatch, weights), Choice(next(told), "replayed")

    with _instead(run):
        yield


def _memory() -> Memory:
    return Memory(cache_folder() / "tuner", _machine(), _expected)


def _expected(signature: Signature, backend: str) -> float | None:
    if backend not in BACKENDS:
        return None
    cost = costs(signature.family, BACKENDS)[backend]
    return cost.seconds(signature.typical_rows(), signature.typical_active())


def _machine() -> dict[str, Any]:
    """What timings depend on, beside what a signature says: versions, the processor, and the compiled kernels."""
    versions, cpu = hardware.versions(), hardware.cpu()
    return {
        "moesaic": versions["moesaic"],
        "torch": torch.__version__,  # names the build as well
        "triton": versions["triton"],
        "cpu": cpu.model,
        "cores": cpu.cores,
        "features": cpu.features,
        "capability": cpu.capability,
        "native": None if library.missing() else [library.isa(), zlib.crc32(_library().read_bytes())],
    }


def _library() -> Path:
    return Path(os.environ.get("MOESAIC_LIBRARY") or library.BUILT)
