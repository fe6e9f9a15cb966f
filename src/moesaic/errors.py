"""One family of exceptions: every message says what was wrong, where, and what is allowed.

The command line prints ``str(error)`` as one line and ends with ``error.exit_code``; a library user catches
:class:`MoesaicError`, or the built-in exception that each class also is.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MoesaicError(Exception):
    """Root of everything that moesaic raises on purpose. ``exit_code`` is what a command ends with."""

    exit_code = 1


class UsageError(MoesaicError, ValueError):
    """Wrong usage or bad input: the caller can mend it by changing what was asked for."""

    exit_code = 2


class ConfigError(UsageError):
    """A setting is unknown, out of range, or does not go together with another one."""


class DataError(UsageError):
    """Text, tokens or a tokenizer cannot be used."""


class CheckpointError(UsageError):
    """A checkpoint or model folder is missing, damaged, or belongs to another configuration."""


class UnsupportedError(MoesaicError, NotImplementedError):
    """A named variant cannot be run here; raised instead of computing a wrong number."""

    exit_code = 2


class MissingDependencyError(UsageError, ImportError):
    """An optional dependency is not installed; the message holds the pip line that installs it."""


class TrainingError(MoesaicError, RuntimeError):
    """Training cannot go on (a non-finite loss, a full disk); the message names the last good checkpoint."""


class Told(MoesaicError):
    """Another process of the same job says what went wrong; this one only ends, with the same ``exit_code``."""

    def __init__(self, exit_code: int) -> None:
        super().__init__("told by another process of the job")
        self.exit_code = exit_code


class ParallelError(MoesaicError, RuntimeError):
    """A collective has failed; the message names the rank that died, hangs or failed, and the collective."""


class Interrupted(MoesaicError):
    """A signal asked for the end; the step was finished and saved first."""

    exit_code = 130


def did_you_mean(name: str, allowed: Iterable[str]) -> str:
    """Say which names are allowed, the nearest one first: the tail of an "unknown name" message."""
    names = sorted(allowed)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{hint}allowed: {', '.join(names) or 'none'}"
