"""Which strategy the user wishes for, for the whole process."""

from __future__ import annotations

from types import TracebackType

from moesaic.parallel.plan import Wish


class _Setting:
    wish: Wish | None = None


def current_wish() -> Wish | None:
    """What :class:`use_strategy` set last; None where each layer has its own."""
    return _Setting.wish


class use_strategy:  # noqa: N801  (it reads as a verb, like torch.no_grad)
    """Choose how all following steps of parallelized layers are carried out; used as a context manager, the earlier
    choice comes back. Changing it moves no weights and costs nothing. All ranks must do the same.

    Args:
        strategy: ``"auto"``, ``"tokens"``, ``"weights"`` or ``"hybrid"``.
        overlap: chunks of the pipeline. exchange: a name of ``moesaic.parallel.EXCHANGES``. gather: ``"direct"`` or
            ``"relay"``. replicas: see :class:`Plan`. What is not given is chosen from step to step.

    Raises:
        ConfigError: for an unknown name or a number below 1.
    """

    def __init__(
        self,
        strategy: str,
        *,
        overlap: int | None = None,
        exchange: str | None = None,
        gather: str | None = None,
        replicas: int | None = None,
    ) -> None:
        self.wish = Wish(strategy, overlap, exchange, gather, replicas)
        # The choice holds from here on, without a with block too; entering one only remembers what to go back to.
        self._before = [_Setting.wish]
        self._entered = 0
        _Setting.wish = self.wish

    def __enter__(self) -> None:
        if self._entered:
            self._before.append(_Setting.wish)
            _Setting.wish = self.wish
        self._entered += 1

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        _Setting.wish = self._before.pop()
