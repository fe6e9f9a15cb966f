"""A split that is killed at any change that it makes on disk goes on, and ends with the same files."""

from __future__ import annotations

import itertools
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file
from tests.convert.models import dense_folder
from tests.convert.test_calibration import text_folder

from moesaic.convert import SplitSettings, split
from moesaic.convert.writing import partial_path

_CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir")


class Killed(BaseException):
    """Nothing catches it."""


class Disk:
    """Counts the changes under a folder, and from one of them on makes none: what stands there is what a kill leaves.

    A file that is opened to be written is empty at a kill, and of one that safetensors writes there is a half beside
    it, under a name of safetensors' own.
    """

    watching: Disk | None = None

    def __init__(self, folder: Path, changes: int) -> None:
        self.folder, self.left, self.is_dead = str(folder), changes, False

    def see(self, event: str, args: tuple[Any, ...]) -> None:
        is_written = event == "open" and bool(args[2] & (os.O_WRONLY | os.O_RDWR))
        # Of what is removed in a folder that is open, as shutil.rmtree does it, there is a name only.
        is_relative = event in ("os.remove", "os.rmdir") and not os.path.isabs(args[0])
        if is_relative or ((is_written or event in _CHANGES) and str(args[0]).startswith(self.folder)):
            self.change(Path(args[0]) if is_written else None)

    def change(self, torn: Path | None) -> None:
        if not self.left and not self.is_dead and torn is not None:
            with self.unseen():
                torn.write_bytes(b"")
        if not self.left:
            self.is_dead = True
            raise Killed
        self.left -= 1

    def save(self, tensors: Any, path: Path, **options: Any) -> None:
        self.change(path.with_name(".tmpAbCdEf"))
        save_file(tensors, path, **options)

    @contextmanager
    def unseen(self) -> Iterator[None]:
        Disk.watching = None
        try:
            yield
        finally:
            Disk.watching = self


def _hook(event: str, args: tuple[Any, ...]) -> None:
    if Disk.watching is not None and (event == "open" or event in _CHANGES):
        Disk.watching.see(event, args)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_kill_at_any_change_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, out = dense_folder(tmp_path / "dense"), tmp_path / "out"
    data = text_folder(tmp_path / "text")
    settings = SplitSettings(
        experts=4, tokens=128, sequence_length=32, held_out=0.0, data=data, pre_gating="stack", criterion="weight"
    )
    split(model, tmp_path / "whole", settings, shard_bytes=60_000)
    whole = files(tmp_path / "whole")
    assert "model.safetensors.index.json" in whole
    sys.addaudithook(_hook)  # for good, but it sees nothing unless it is told to
    ended_without = 0
    for changes in itertools.count():
        disk = Disk(out, changes)
        monkeypatch.setattr("moesaic.convert.writing.save_file", disk.save)
        Disk.watching = disk
        try:
            split(model, out, settings, shard_bytes=60_000)
            break
        except Killed:
            pass
        finally:
            Disk.watching = None
            monkeypatch.undo()
        if out.exists():  # what was not removed any more
            ended_without += 1
            assert {name: content for name, content in files(out).items() if not name.startswith("work/")} == whole
        else:
            split(model, out, settings, shard_bytes=60_000)
            assert files(out) == whole, changes
        shutil.rmtree(out)
        assert not partial_path(out).exists()
    assert files(out) == whole and changes > 30 and 0 < ended_without < 10
