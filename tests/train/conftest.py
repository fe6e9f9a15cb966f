from __future__ import annotations

from pathlib import Path

import pytest
from tests.train import tiny

from moesaic.train.recipe import Recipe


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two small domains, as ``data.sources`` names them."""
    return tiny.write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def recipe(corpus: list[str]) -> Recipe:
    """Twelve steps of a tiny model on the tiny corpus."""
    return tiny.recipe(corpus)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "run"
