"""Pages are counted: used, cached and free always sum to the total."""

from __future__ import annotations

import pytest

from moesaic.serve.pages import PagePool


def counts(pool: PagePool) -> tuple[int, int, int]:
    assert pool.used + pool.cached + pool.free == pool.total
    return pool.used, pool.cached, pool.free


def test_a_page_is_used_until_its_last_holder_lets_go() -> None:
    pool = PagePool(3)
    page = pool.take()
    pool.share(page)
    assert counts(pool) == (1, 0, 2)
    assert not pool.drop(page, keep=False)
    assert pool.is_used(page)
    assert pool.drop(page, keep=False)
    assert counts(pool) == (0, 0, 3)


def test_a_cached_page_is_nobodys_and_not_free() -> None:
    pool = PagePool(2)
    page = pool.take()
    pool.drop(page, keep=True)
    assert counts(pool) == (0, 1, 1)
    assert pool.take() != page
    pool.share(page)
    assert counts(pool) == (2, 0, 0)
    with pytest.raises(IndexError):
        pool.take()
    pool.drop(page, keep=True)
    pool.discard(page)
    assert counts(pool) == (1, 0, 1)
    assert pool.take() == page


def test_each_page_is_given_once() -> None:
    pool = PagePool(100)
    assert {pool.take() for _ in range(100)} == set(range(100))
