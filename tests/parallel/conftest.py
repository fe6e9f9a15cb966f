"""No process of a pool outlives the tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.parallel import harness


@pytest.fixture(autouse=True, scope="session")
def pools() -> Iterator[None]:
    with harness.pools_stopped_at_end():
        yield
