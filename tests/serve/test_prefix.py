"""The tree of pages finds what is there, evicts the least recently used leaf, and loses nothing."""

from __future__ import annotations

from collections.abc import Hashable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesaic.serve.pages import PagePool
from moesaic.serve.prefix import Node, PrefixTree


def tree_of(total: int) -> PrefixTree:
    return PrefixTree(PagePool(total))


def insert(tree: PrefixTree, keys: str, root: Hashable = None) -> list[Node]:
    """Hold the pages that spell ``keys``, taking those that are not there."""
    nodes = tree.match(root, keys)
    tree.claim(nodes)
    for key in keys[len(nodes) :]:
        nodes.append(tree.extend(root, nodes[-1] if nodes else None, key, tree.take()))
    return nodes


def spelled(nodes: list[Node]) -> str:
    return "".join(str(node.key) for node in nodes)


def test_the_longest_known_beginning_is_found() -> None:
    tree = tree_of(9)
    insert(tree, "abc")
    insert(tree, "abd")
    assert tree.pool.used == 4
    assert spelled(tree.match(None, "abdx")) == "abd"
    assert spelled(tree.match(None, "xab")) == ""
    assert tree.match("another adapter", "abc") == []


def test_what_is_let_go_of_stays_until_room_is_needed() -> None:
    tree = tree_of(3)
    tree.release(insert(tree, "abc"))
    assert (tree.pool.used, tree.pool.cached, tree.available()) == (0, 3, 3)
    assert spelled(tree.match(None, "abc")) == "abc"
    tree.take()
    assert spelled(tree.match(None, "abc")) == "ab"


def test_the_least_recently_used_leaf_is_evicted() -> None:
    tree = tree_of(6)
    old, new = insert(tree, "ab"), insert(tree, "cd")
    tree.release(old)
    tree.release(new)
    tree.release(insert(tree, "ab"))  # used again: now the newer one
    for _ in range(3):
        tree.take()  # the two free pages, then one that is evicted
    assert spelled(tree.match(None, "cd")) == "c"
    assert spelled(tree.match(None, "ab")) == "ab"


def test_held_pages_are_not_evicted() -> None:
    tree = tree_of(3)
    insert(tree, "ab")
    tree.release(insert(tree, "abc"))
    assert tree.available() == 1
    tree.take()
    with pytest.raises(IndexError):
        tree.take()


def test_a_page_that_is_known_already_is_given_back() -> None:
    tree = tree_of(4)
    first = insert(tree, "a")
    page = tree.take()
    node = tree.extend(None, None, "a", page)
    assert node is first[0]
    assert not tree.pool.is_used(page)
    tree.release(first)
    assert tree.pool.used == 1


def test_a_root_is_forgotten_with_its_pages_only() -> None:
    tree = tree_of(9)
    tree.release(insert(tree, "abc", "one"))
    tree.release(insert(tree, "abc", "two"))
    tree.forget("one")
    tree.forget("never seen")
    assert tree.match("one", "abc") == []
    assert spelled(tree.match("two", "abc")) == "abc"
    assert (tree.pool.cached, tree.pool.free) == (3, 6)
    assert tree.available() == 9


words = st.text("ab", min_size=1, max_size=5)
steps = st.lists(st.tuples(words, st.sampled_from(["one", "two"]), st.integers(0, 3)), max_size=40)


@given(steps)
def test_nothing_is_lost(steps: list[tuple[str, str, int]]) -> None:
    tree, held = tree_of(12), []
    for word, root, action in steps:
        known = tree.match(root, word)
        if action < 3 and len(word) - len(known) + tree.unheld(known) <= tree.available():
            nodes = insert(tree, word, root)
            assert spelled(nodes) == word
            held.append(nodes)
        elif held:
            tree.release(held.pop(action % len(held)))
        pool = tree.pool
        assert pool.used + pool.cached + pool.free == pool.total
        assert pool.used == len({node.page for nodes in held for node in nodes})
        assert tree.available() == pool.free + pool.cached
    for nodes in held:
        tree.release(nodes)
    tree.clear()
    assert tree.pool.free == tree.pool.total
