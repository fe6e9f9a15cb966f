"""Split and distil in one go: what the second half would refuse is refused before the first one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.convert.models import dense_folder
from tests.convert.test_calibration import text_folder

from moesaic.convert import DistillSettings, SplitSettings, split_and_distill
from moesaic.convert.writing import partial_path
from moesaic.errors import CheckpointError, DataError


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOESAIC_CACHE", str(tmp_path / "cache"))


def make(tmp_path: Path, **changes: Any) -> Any:
    data = text_folder(tmp_path / "text")
    teaching = {"tokens": 128, "sequence_length": 32, "warm_start": 64, "held_out": 0.3, "precision": "fp32", **changes}
    return split_and_distill(
        dense_folder(tmp_path / "dense"),
        tmp_path / "out",
        SplitSettings(experts=4, tokens=400, sequence_length=48, held_out=0.3, data=data),
        DistillSettings(data=data, **teaching),
    )


def test_both_and_nothing_else_is_left(tmp_path: Path) -> None:
    made = make(tmp_path)
    assert made.split is not None and made.distilled.steps == 2
    assert [path.name for path in tmp_path.glob("out*")] == ["out"]


def test_text_shorter_than_a_passage_is_refused_before_the_split(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="100000"):
        make(tmp_path, sequence_length=100000)
    assert not list(tmp_path.glob("out*"))


def test_another_unfinished_conversion_is_refused_before_the_split(tmp_path: Path) -> None:
    partial_path(tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match=r"out\.partial' is in the way, .*: remove it to begin anew"):
        make(tmp_path)
    assert [path.name for path in tmp_path.glob("out*")] == ["out.partial"]
