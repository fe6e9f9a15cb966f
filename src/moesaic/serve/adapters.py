"""Adapters while serving: which requests use which one, and when its slots may go back."""

from __future__ import annotations

from collections.abc import Callable, Hashable

from moesaic.adapters.pool import AdapterPool, Prepared
from moesaic.errors import UsageError, did_you_mean
from moesaic.serve.request import UnknownAdapterError


class LentAdapters:
    """The adapters of a pool by their users.

    An adapter's pages in the prefix tree are kept under a key that no later adapter of the same name has.

    Args:
        pool: None where there is the base only.
        before_unload: called with the key of the adapter's pages, once nobody uses it any more.
    """

    def __init__(self, pool: AdapterPool | None, before_unload: Callable[[Hashable], None]) -> None:
        self.pool = pool
        self._before_unload = before_unload
        self.users: dict[str, int] = {}
        self.leaving: set[str] = set()
        self._generation: dict[str, int] = {}

    def borrow(self, name: str | None) -> tuple[int, Hashable]:
        """One user more: the adapter's index, and the key of its pages.

        Raises:
            UnknownAdapterError: where it is not loaded, or is about to be unloaded.
        """
        if name is None:
            return 0, None
        index = self._index(name)
        self.users[name] = self.users.get(name, 0) + 1
        return index, self._key(name)

    def give_back(self, name: str | None) -> None:
        """One user less; where it was the last one of a leaving adapter, unload it."""
        if name is None:
            return
        self.users[name] -= 1
        if not self.users[name]:
            del self.users[name]
            if name in self.leaving:
                self._unload(name)

    def unload(self, name: str) -> None:
        """Refuse new users from now on, and unload it as soon as there are none.

        Raises:
            UnknownAdapterError: where it is not loaded.
        """
        self._index(name)
        self.leaving.add(name)
        if name not in self.users:
            self._unload(name)

    def publish(self, prepared: Prepared) -> None:
        """Let an adapter that the pool has prepared be used."""
        if self.pool is None:
            raise UsageError("this engine has no pool of adapters")
        self.pool.publish(prepared)

    def _key(self, name: str) -> Hashable:
        return name, self._generation.get(name, 0)

    def _index(self, name: str) -> int:
        known = [] if self.pool is None else [each for each in self.pool.names() if each not in self.leaving]
        if name not in known:
            raise UnknownAdapterError(f"there is no adapter {name!r}: {did_you_mean(name, known)}")
        index: int = self.pool.index(name)  # type: ignore[union-attr]
        return index

    def _unload(self, name: str) -> None:
        self._before_unload(self._key(name))
        self._generation[name] = self._generation.get(name, 0) + 1
        self.leaving.discard(name)
        self.pool.unload(name)  # type: ignore[union-attr]
