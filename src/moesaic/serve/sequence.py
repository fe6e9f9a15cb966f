"""One continuation of a request: its tokens, how many of them are computed, and its pages."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from moesaic.serve.prefix import Node

_T = TypeVar("_T", bound=np.generic)


class Sequence:
    """A continuation on its way.

    Tokens and page table are NumPy buffers that grow by doubling, so that a batch is put together from slices.

    Args:
        order: arrival of the request, index of the continuation: the smaller, the older.
        prompt: ``[n]`` int64, not copied.
        root: root of the prefix tree under which its pages are kept.
        limit: tokens that it may have in the end.
    """

    __slots__ = (
        "_pages",
        "_tokens",
        "cached",
        "computed",
        "length",
        "limit",
        "nodes",
        "num_pages",
        "order",
        "prompt_length",
        "root",
    )

    def __init__(self, order: tuple[int, int], prompt: NDArray[np.int64], root: Hashable, limit: int) -> None:
        self.order = order
        self.root = root
        self.limit = limit
        self.prompt_length = self.length = len(prompt)
        self.computed = 0
        self.cached: int | None = None  # tokens that were found in the tree when it was first admitted
        self.nodes: list[Node] = []  # of its full pages that are computed: the first of its pages
        self.num_pages = 0
        self._tokens = prompt
        self._pages = np.empty(8, np.int32)

    def __lt__(self, other: Sequence) -> bool:
        return self.order < other.order

    @property
    def pending(self) -> int:
        """Tokens that are there but not computed; one while it generates."""
        return self.length - self.computed

    def tokens(self, start: int, end: int) -> NDArray[np.int64]:
        return self._tokens[start:end]

    def pages(self) -> NDArray[np.int32]:
        """``[num_pages]`` int32: a view of the page table."""
        return self._pages[: self.num_pages]

    def page_keys(self, page_size: int, first: int, last: int) -> Iterator[bytes]:
        """The tokens of its pages ``first`` to ``last - 1``, which must be full, as keys of the prefix tree."""
        for page in range(first, last):
            yield self._tokens[page * page_size : (page + 1) * page_size].tobytes()

    def append(self, token: int) -> None:
        """A token was chosen."""
        if self.length == len(self._tokens) or self.length == self.prompt_length:
            # The prompt is shared with the other continuations: the first token that is added makes a copy of it.
            self._tokens = _grown(self._tokens, self.length)
        self._tokens[self.length] = token
        self.length += 1

    def add_page(self, page: int) -> None:
        if self.num_pages == len(self._pages):
            self._pages = _grown(self._pages, self.num_pages)
        self._pages[self.num_pages] = page
        self.num_pages += 1

    def add_node(self, node: Node) -> None:
        """The next page is full, and the tree's; a page of its own with the same tokens is replaced."""
        self._pages[len(self.nodes)] = node.page
        self.nodes.append(node)

    def own_pages(self) -> list[int]:
        """Pages that the tree does not know."""
        pages: list[int] = self._pages[len(self.nodes) : self.num_pages].tolist()
        return pages

    def forget_pages(self) -> None:
        """Begin anew; the caller has given the pages back."""
        self.nodes.clear()
        self.num_pages = 0
        self.computed = 0


def _grown(buffer: NDArray[_T], length: int) -> NDArray[_T]:
    grown = np.empty(max(16, 2 * length), buffer.dtype)
    grown[:length] = buffer[:length]
    return grown
