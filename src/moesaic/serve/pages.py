"""Pages of the KV cache: who holds each one, and which are free; every operation takes constant time."""

from __future__ import annotations


class PagePool:
    """Counts references to pages 0 to ``total - 1``.

    A page is *used* (somebody holds it), *cached* (nobody does, but what it holds is worth keeping) or *free*: the
    three always sum to ``total``.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self.used = 0
        self.cached = 0
        self._references = [0] * total
        self._free = list(range(total - 1, -1, -1))

    @property
    def free(self) -> int:
        return len(self._free)

    def is_used(self, page: int) -> bool:
        return self._references[page] > 0

    def take(self) -> int:
        """A free page, with one reference; IndexError where none is free."""
        page = self._free.pop()
        self._references[page] = 1
        self.used += 1
        return page

    def share(self, page: int) -> None:
        """One reference more to a page that is used or cached."""
        if not self._references[page]:
            self.cached -= 1
            self.used += 1
        self._references[page] += 1

    def drop(self, page: int, *, keep: bool) -> bool:
        """One reference less; True where it was the last one, and the page is cached (``keep``) or free from now on."""
        self._references[page] -= 1
        if self._references[page]:
            return False
        self.used -= 1
        if keep:
            self.cached += 1
        else:
            self._free.append(page)
        return True

    def discard(self, page: int) -> None:
        """A cached page becomes free."""
        self.cached -= 1
        self._free.append(page)
