"""Whether the tuner learns: ``MOESAIC_TUNE``, or :class:`use_tuning` in a program."""

from __future__ import annotations

import os
from types import TracebackType

from moesaic.errors import ConfigError, did_you_mean

ALLOWED = ("on", "off")


class _Setting:
    """Process-wide; None until it is first asked for, so that a wrong word in the environment is told then."""

    on: bool | None = None


def is_tuning_on() -> bool:
    """Whether timings are taken, remembered and used."""
    if _Setting.on is None:
        _Setting.on = _checked(os.environ.get("MOESAIC_TUNE") or "on", "the environment variable MOESAIC_TUNE")
    return _Setting.on


class use_tuning:  # noqa: N801  (as use_backend)
    """Switch the tuner's learning on or off for all following calls; as a context manager, for a block.

    Off, ``"auto"`` chooses by the cost model alone: the same backend for the same call in every process on a machine,
    which makes results repeatable bit for bit; nothing is timed, read or written. So it is, too, while
    ``torch.use_deterministic_algorithms`` is on.

    Args:
        word: ``"on"`` or ``"off"``.

    Raises:
        ConfigError: for another word.
    """

    def __init__(self, word: str) -> None:
        on = _checked(word, "use_tuning")
        self._before = _Setting.on
        _Setting.on = on

    def __enter__(self) -> None:
        """It holds already."""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        _Setting.on = self._before


def _checked(word: str, where: str) -> bool:
    if word not in ALLOWED:
        raise ConfigError(f"{where} is {word!r}: {did_you_mean(word, ALLOWED)}")
    return word == "on"
