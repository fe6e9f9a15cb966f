"""Prefix sharing: a tree of full pages, so that equal beginnings are computed once and kept once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterable, Sequence

from moesaic.serve.pages import PagePool


class Node:
    """A full page: what its tokens and all those before them computed. The path from the root spells them out."""

    __slots__ = ("children", "key", "page", "parent")

    def __init__(self, parent: Node | None, key: Hashable, page: int) -> None:
        self.parent = parent
        self.key = key
        self.page = page
        self.children: dict[Hashable, Node] = {}


class PrefixTree:
    """A radix tree whose edges are the tokens of one page each; a root for each adapter.

    Whoever holds a node holds its ancestors too, so nodes that nobody holds form whole subtrees, and a node is let go
    of no earlier than its descendants. The list of unheld nodes by the time they were let go, deepest first, therefore
    begins with a leaf: evicting the least recently used leaf takes constant time, without a heap. The idea of the tree
    is RadixAttention's (Zheng et al., SGLang, section 3).

    Args:
        pool: the pages, which this tree evicts from.
    """

    def __init__(self, pool: PagePool) -> None:
        self.pool = pool
        self._roots: dict[Hashable, Node] = {}
        self._unheld: OrderedDict[Node, None] = OrderedDict()

    def available(self) -> int:
        """Pages that :meth:`take` can give: free ones and evictable ones."""
        return self.pool.free + len(self._unheld)

    def unheld(self, nodes: Iterable[Node]) -> int:
        """How many of these nodes nobody holds: claiming them takes as many from :meth:`available`."""
        return sum(not self.pool.is_used(node.page) for node in nodes)

    def match(self, root: Hashable, keys: Iterable[Hashable]) -> list[Node]:
        """The nodes of the longest known beginning; nobody's until :meth:`claim`.

        Args:
            keys: the tokens of each full page, in order; read only as far as they match.
        """
        node, found = self._roots.get(root), []
        if node is not None:
            for key in keys:
                if (node := node.children.get(key)) is None:
                    break
                found.append(node)
        return found

    def claim(self, nodes: Iterable[Node]) -> None:
        """Hold these nodes (with their ancestors, which must be among them or held already)."""
        for node in nodes:
            self.pool.share(node.page)
            self._unheld.pop(node, None)

    def extend(self, root: Hashable, parent: Node | None, key: Hashable, page: int) -> Node:
        """Hand a page that has been filled over to the tree, and hold its node.

        Where the tree knows these tokens already, its own page is held instead, and ``page`` let go of.

        Args:
            parent: the node of the page before, held by the caller; None for a first page.
        """
        if parent is None:
            parent = self._roots.get(root) or self._roots.setdefault(root, Node(None, root, -1))
        known = parent.children.get(key)
        if known is not None:
            self.claim((known,))
            self.pool.drop(page, keep=False)
            return known
        node = parent.children[key] = Node(parent, key, page)
        return node

    def release(self, nodes: Sequence[Node]) -> None:
        """Let go of nodes, given from the root on."""
        for node in reversed(nodes):
            if self.pool.drop(node.page, keep=True):
                self._unheld[node] = None

    def take(self) -> int:
        """A page, evicted where none is free; IndexError where none is :meth:`available`."""
        if not self.pool.free:
            self._evict()
        return self.pool.take()

    def forget(self, root: Hashable) -> None:
        """Free the pages under a root, none of which may be held."""
        found = self._roots.pop(root, None)
        nodes = [found] if found else []
        while nodes:
            node = nodes.pop()
            nodes.extend(node.children.values())
            if node.parent is not None:
                del self._unheld[node]
                self.pool.discard(node.page)

    def clear(self) -> None:
        """Free all pages; none may be held."""
        for root in list(self._roots):
            self.forget(root)

    def _evict(self) -> None:
        if not self._unheld:
            raise IndexError("every page is held")
        node, _ = self._unheld.popitem(last=False)
        parent = node.parent
        assert parent is not None and not node.children
        del parent.children[node.key]
        self.pool.discard(node.page)
        if parent.parent is None and not parent.children:
            del self._roots[parent.key]
