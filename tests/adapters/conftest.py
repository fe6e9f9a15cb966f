from __future__ import annotations

from pathlib import Path

import pytest
from tests.adapters import bases
from tests.train import tiny


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two small domains, as ``data.sources`` names them."""
    return tiny.write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def base_folders(corpus: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of each kind of base: ours, mixtral, olmoe, dense."""
    top = tmp_path_factory.mktemp("bases")
    return {kind: bases.save(kind, top / kind, corpus) for kind in (*bases.MOE, "dense")}


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "run"
