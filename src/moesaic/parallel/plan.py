"""How one step of one layer is carried out over the ranks, and what a user may say about it."""

from __future__ import annotations

from dataclasses import dataclass

from moesaic.errors import ConfigError, did_you_mean

AUTO = "auto"
STRATEGIES = ("tokens", "weights", "hybrid")
GATHERS = ("direct", "relay")


@dataclass(frozen=True)
class Plan:
    """One way to carry out a step; all give the same numbers.

    Attributes:
        strategy: ``"tokens"`` (expert parallelism: tokens travel to the weights and back), ``"weights"`` (every rank
            gets the weights of all experts that its tokens want), ``"hybrid"`` (some experts' weights travel, the
            other experts get tokens: Hecate's sparse materialization).
        fetched: the experts whose weights travel: none for ``tokens``, all for ``weights``.
        least: a rank fetches such an expert if it has at least so many slots for it; else it sends tokens.
        overlap: chunks in which the tokens' exchange and the experts' compute are pipelined.
        exchange: how tokens travel, a name of ``moesaic.parallel.EXCHANGES``.
        gather: how weights travel: ``"direct"`` (the owner sends each receiver everything) or ``"relay"`` (the owner
            scatters pieces, which the receivers pass on to each other: the owner sends every byte once).
        replicas: for experts that are sliced over ranks, Tutel's degree r: a token goes to so many ranks of its
            expert's block, each of which gathers the slices that stand between it and the next one. It divides the
            number of slices; 0 stands for all slices (nothing is gathered).
    """

    strategy: str
    fetched: tuple[int, ...] = ()
    least: int = 1
    overlap: int = 1
    exchange: str = "direct"
    gather: str = "direct"
    replicas: int = 0

    def __str__(self) -> str:
        told = [f"overlap {self.overlap}", self.exchange]
        if self.strategy == "hybrid":
            told.insert(0, f"{len(self.fetched)} experts fetched")
        if self.strategy != "tokens":
            told.append(f"gather {self.gather}")
        if self.replicas:
            told.append(f"replicas {self.replicas}")
        return f"{self.strategy} ({', '.join(told)})"


@dataclass(frozen=True)
class Wish:
    """What a user fixes of a plan; None is left to be chosen.

    Raises:
        ConfigError: for an unknown name or a number below 1.
    """

    strategy: str = AUTO
    overlap: int | None = None
    exchange: str | None = None
    gather: str | None = None
    replicas: int | None = None

    def __post_init__(self) -> None:
        for name, allowed in (("strategy", (AUTO, *STRATEGIES)), ("gather", (None, *GATHERS))):
            value = getattr(self, name)
            if value not in allowed:
                raise ConfigError(
                    f"unknown {name} {value!r}: {did_you_mean(str(value), [each for each in allowed if each])}"
                )
        for name in ("overlap", "replicas"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ConfigError(f"{name} is {value!r}: it must be a whole number, at least 1")
