"""Names for the parts that can be exchanged: a new part is one new file and one ``@registry.register(name)``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from moesaic.errors import ConfigError, did_you_mean

T = TypeVar("T")


class Registry(Generic[T]):
    """A read-mostly mapping from a name to a part of one kind (``"router"``, ``"backend"``, ...).

    Args:
        base: gives the class that every part is derived from, once it is there; None where parts may be anything.
    """

    def __init__(self, kind: str, base: Callable[[], type] | None = None) -> None:
        self.kind, self._base = kind, base
        self._parts: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that enters a part under ``name``; a name is taken only once.

        Raises:
            ConfigError: for a name that is taken, or a part that is not derived from the base.
        """

        def enter(part: T) -> T:
            if name in self._parts:
                raise ConfigError(f"the {self.kind} {name!r} is registered twice")
            base = self._base and self._base()
            if base and not (isinstance(part, type) and issubclass(part, base)):
                raise ConfigError(
                    f"the {self.kind} {name!r} must be a class derived from {base.__name__}: it is {part!r}"
                )
            self._parts[name] = part
            return part

        return enter

    def get(self, name: str) -> T:
        """The part called ``name``; raises :class:`ConfigError` with the nearest name where there is none."""
        if name not in self._parts:
            raise ConfigError(f"unknown {self.kind} {name!r}: {did_you_mean(name, self._parts)}")
        return self._parts[name]

    def names(self) -> list[str]:
        return sorted(self._parts)

    def parts(self) -> tuple[T, ...]:
        """The parts themselves, in the order of registration."""
        return tuple(self._parts.values())

    def __contains__(self, name: object) -> bool:
        return name in self._parts

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())
