"""Checkpoints: written apart from training, published whole or not at all, and checked when they are read."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.train import tiny
from torch.distributed.checkpoint import filesystem

from moesaic.errors import CheckpointError, TrainingError
from moesaic.train import checkpoint as module
from moesaic.train.checkpoint import Checkpoints, NoSpaceError, newest_good, published
from moesaic.train.loop import Trainer


@pytest.fixture
def trainer(corpus: list[str]) -> Trainer:
    trainer = tiny.trainer_of(tiny.recipe(corpus))
    trainer.train_step()
    return trainer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints"


def save(checkpoints: Checkpoints, trainer: Trainer, step: int) -> None:
    trainer.step = step
    checkpoints.save(step, trainer.state(), {"progress": trainer.progress()})


def saved(folder: Path, trainer: Trainer, *steps: int, keep: int = 9) -> Checkpoints:
    checkpoints = Checkpoints(folder, keep)
    for step in steps:
        save(checkpoints, trainer, step)
    checkpoints.wait()
    return checkpoints


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def fail(error: BaseException) -> Callable[..., Any]:
    def function(*_: Any, **__: Any) -> Any:
        raise error

    return function


def test_it_is_a_checkpoint_of_torch_with_a_listing(folder: Path, trainer: Trainer) -> None:
    saved(folder, trainer, 7)
    assert names(folder) == ["step-00000007"]
    files = set(names(folder / "step-00000007"))
    note = json.loads((folder / "step-00000007/complete.json").read_text())
    assert set(note["files"]) == files - {"complete.json"}
    metadata = filesystem.FileSystemReader(folder / "step-00000007").read_metadata()
    assert "model.model.layers.0.mlp.experts.up" in metadata.state_dict_metadata
    assert "optimizer.state.model.layers.0.mlp.experts.up.exp_avg" in metadata.state_dict_metadata


def test_what_training_does_after_save_returns_does_not_reach_it(folder: Path, trainer: Trainer) -> None:
    written = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    random = torch.get_rng_state()
    checkpoints = Checkpoints(folder, 1)
    save(checkpoints, trainer, 1)
    for parameter in trainer.model.parameters():
        parameter.data.fill_(7.0)
        trainer.optimizer.state[parameter]["exp_avg"].fill_(7.0)
    torch.rand(5)
    checkpoints.wait()
    found, _ = newest_good(folder)
    assert found is not None
    trainer.restore(found)
    assert all(torch.equal(value, written[name]) for name, value in trainer.model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert all(not (state["exp_avg"] == 7.0).any() for state in trainer.optimizer.state.values())


def test_the_newest_are_kept(folder: Path, trainer: Trainer) -> None:
    checkpoints = saved(folder, trainer, 1, 2, 30, 400, keep=2)
    assert names(folder) == ["step-00000030", "step-00000400"]
    assert checkpoints.last_good == folder / "step-00000400"
    assert [found.step for found in published(folder)] == [400, 30]


def test_one_with_a_higher_number_does_not_displace_the_one_just_written(folder: Path, trainer: Trainer) -> None:
    saved(folder, trainer, 8, 12)
    truncate(folder / "step-00000012/.metadata")
    saved(folder, trainer, 9, 10, keep=1)
    assert names(folder) == ["step-00000010", "step-00000012"]


def test_more_than_eight_digits_sort_as_numbers(folder: Path, trainer: Trainer) -> None:
    saved(folder, trainer, 99_999_999, 100_000_000)
    assert [found.step for found in published(folder)] == [100_000_000, 99_999_999]


def test_nothing_there_is_no_error(folder: Path) -> None:
    assert newest_good(folder) == (None, [])


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [truncate, flip, Path.unlink])
@pytest.mark.parametrize("file", [".metadata", "__0_0.distcp", "complete.json"])
def test_a_damaged_one_is_left_out(folder: Path, trainer: Trainer, damage: Callable[[Path], None], file: str) -> None:
    saved(folder, trainer, 1, 2)
    if (damage, file) == (flip, "complete.json"):
        (folder / "step-00000002/complete.json").write_text("[]")
    else:
        damage(folder / "step-00000002" / file)
    found, damaged = newest_good(folder)
    assert found is not None
    assert found.step == 1
    assert [one.step for one in damaged] == [2]
    assert file in str(damaged[0].damage)


def test_where_all_are_damaged_each_is_named(folder: Path, trainer: Trainer) -> None:
    saved(folder, trainer, 1, 2)
    truncate(folder / "step-00000001/__0_0.distcp")
    (folder / "step-00000002/complete.json").unlink()
    with pytest.raises(CheckpointError) as raised:
        newest_good(folder)
    assert "step-00000001: __0_0.distcp has" in str(raised.value)
    assert "step-00000002: complete.json is missing" in str(raised.value)


def test_of_another_model_it_is_refused(folder: Path, trainer: Trainer, corpus: list[str]) -> None:
    saved(folder, trainer, 1)
    found, _ = newest_good(folder)
    assert found is not None
    other = tiny.trainer_of(tiny.recipe(corpus, "d_ff=32"))
    with pytest.raises(CheckpointError, match=r"cannot be loaded: .*experts"):
        other.restore(found)


@pytest.mark.parametrize("moment", ["seal", "_sync"])
def test_a_crash_between_writing_and_publishing_leaves_the_older(
    folder: Path, trainer: Trainer, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    checkpoints = saved(folder, trainer, 1)
    monkeypatch.setattr(module, moment, fail(RuntimeError("crash")))
    save(checkpoints, trainer, 2)
    with pytest.raises(TrainingError, match=r"step 2 could not be written: crash; .*step-00000001"):
        checkpoints.wait()
    found, damaged = newest_good(folder)
    assert found is not None
    assert (found.step, damaged) == (1, [])
    assert names(folder) == ["step-00000001"]


def test_what_a_killed_run_left_is_not_read_and_is_removed_later(folder: Path, trainer: Trainer) -> None:
    saved(folder, trainer, 1, 2)
    (folder / "step-00000002").rename(folder / "step-00000003.tmp")
    found, damaged = newest_good(folder)
    assert found is not None
    assert (found.step, damaged) == (1, [])
    saved(folder, trainer, 3)
    assert names(folder) == ["step-00000001", "step-00000003"]


def test_a_damaged_one_of_the_same_step_is_replaced(folder: Path, trainer: Trainer) -> None:
    saved(folder, trainer, 1)
    truncate(folder / "step-00000001/.metadata")
    saved(folder, trainer, 1)
    assert [found.damage for found in published(folder)] == [None]


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
# Where the disk may turn out to be full: torch's files, and ours.
FULL_AT = [(filesystem.FileSystem, "create_stream"), (module, "seal"), (module, "async_save")]


@pytest.mark.parametrize(("owner", "name"), FULL_AT, ids=lambda value: str(getattr(value, "__name__", value)))
def test_a_full_disk_keeps_the_last_good_one_and_names_it(
    folder: Path, trainer: Trainer, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str
) -> None:
    checkpoints = saved(folder, trainer, 1, keep=1)
    monkeypatch.setattr(owner, name, fail(FULL))

    def save_and_wait() -> None:
        save(checkpoints, trainer, 2)
        checkpoints.wait()

    with pytest.raises(NoSpaceError) as raised:
        save_and_wait()
    assert raised.value.exit_code == 2
    assert "the checkpoint of step 2 could not be written: no space left on the disk" in str(raised.value)
    assert f"the last good checkpoint is {str(folder / 'step-00000001')!r}" in str(raised.value)
    assert names(folder) == ["step-00000001"]
    found, _ = newest_good(folder)
    assert found is not None
    monkeypatch.undo()
    save(checkpoints, trainer, 3)  # space has been made: it goes on
    checkpoints.wait()
    assert names(folder) == ["step-00000003"]


def test_a_failure_comes_up_while_training_goes_on(
    folder: Path, trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = Checkpoints(folder, 1)
    monkeypatch.setattr(module, "seal", fail(PermissionError(errno.EACCES, os.strerror(errno.EACCES))))
    save(checkpoints, trainer, 1)
    checkpoints.join()
    with pytest.raises(TrainingError, match="Permission denied; there is no checkpoint yet") as raised:
        checkpoints.check()
    assert raised.value.exit_code == 1
    checkpoints.check()  # it is told once
