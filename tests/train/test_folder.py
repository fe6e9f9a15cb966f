"""A run's folder: who may use it, and what is told to those who may not."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from moesaic.errors import CheckpointError, UsageError
from moesaic.train import folder as module
from moesaic.train.folder import RunFolder

FRESH = {"resume": False, "overwrite": False}
NOTE = {"recipe": {}, "status": "interrupted"}


def with_run(path: Path) -> Path:
    (path / "checkpoints/step-00000001").mkdir(parents=True)
    (path / "model").mkdir()
    (path / "run.json").write_text(json.dumps(NOTE))
    return path


def listing(path: Path) -> list[str]:
    return sorted(str(entry.relative_to(path)) for entry in path.rglob("*"))


def test_a_new_folder_is_made_and_locked_while_it_is_open(tmp_path: Path) -> None:
    path = tmp_path / "a/b"
    first, second = RunFolder(path), RunFolder(path)
    first.open(**FRESH)
    for use in (second.check, second.open):
        with pytest.raises(UsageError, match=rf"in use by another run \(process {os.getpid()}\)"):
            use(**FRESH)
    assert listing(path) == ["lock"]
    first.close()
    assert listing(path) == []
    second.open(**FRESH)
    second.close()


def test_another_process_is_refused_and_its_end_frees_the_folder(tmp_path: Path) -> None:
    script = "import sys\nfrom moesaic.train.folder import RunFolder\nfrom pathlib import Path\n"
    script += "RunFolder(Path(sys.argv[1])).open(resume=False, overwrite=False)\nprint('open', flush=True)\ninput()\n"
    command = [sys.executable, "-c", script, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "open\n"
        with pytest.raises(UsageError, match=rf"in use by another run \(process {other.pid}\)"):
            RunFolder(tmp_path).check(resume=True, overwrite=False)
        other.kill()
        other.wait()
    mine = RunFolder(tmp_path)
    mine.open(**FRESH)  # the lock went with the process, though its file is still there
    mine.close()


@pytest.mark.parametrize("use", ["check", "open"])
def test_a_file_system_without_locks_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, use: str) -> None:
    def flock(handle: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(module.fcntl, "flock", flock)
    if use == "check":
        (tmp_path / "lock").touch()  # without it there is nothing to lock yet
    with pytest.raises(UsageError, match=r"cannot be locked \(No locks available\): choose one on another file system"):
        getattr(RunFolder(tmp_path), use)(**FRESH)


def test_a_lock_file_that_was_removed_meanwhile_is_not_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Between our opening of the lock file and our locking of it, its holder ended and removed it.
    original, opened = module._try_lock, []

    def removed_once(handle: int) -> bool:
        opened.append(handle)
        if len(opened) == 1:
            (tmp_path / "lock").unlink()
        return original(handle)

    monkeypatch.setattr(module, "_try_lock", removed_once)
    mine = RunFolder(tmp_path)
    mine.open(**FRESH)
    assert len(opened) == 2
    with pytest.raises(UsageError, match="in use"):
        RunFolder(tmp_path).check(**FRESH)
    mine.close()


def test_a_run_that_is_there_is_not_touched_unless_asked(tmp_path: Path) -> None:
    before = listing(with_run(tmp_path))
    with pytest.raises(UsageError) as raised:
        RunFolder(tmp_path).open(**FRESH)
    assert "holds a run already (interrupted): go on with it by --resume, replace it by --overwrite" in str(
        raised.value
    )
    assert listing(tmp_path) == before


def test_overwriting_removes_the_run_and_nothing_else(tmp_path: Path) -> None:
    (with_run(tmp_path) / "notes.txt").write_text("mine")
    folder = RunFolder(tmp_path)
    folder.open(resume=False, overwrite=True)
    folder.close()
    assert listing(tmp_path) == ["notes.txt"]


def test_overwriting_does_not_follow_links(tmp_path: Path) -> None:
    precious = with_run(tmp_path / "run") / "checkpoints"
    precious.rename(tmp_path / "precious")
    (tmp_path / "run/checkpoints").symlink_to(tmp_path / "precious")
    folder = RunFolder(tmp_path / "run")
    folder.open(resume=False, overwrite=True)
    folder.close()
    assert listing(tmp_path / "precious") == ["step-00000001"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_with_other_files_is_refused(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="is not empty and holds no run"):
        RunFolder(tmp_path).open(resume=False, overwrite=overwrite)
    assert listing(tmp_path) == ["notes.txt"]


@pytest.mark.parametrize("below", ["", "deeper/run"])
def test_a_file_in_the_way_is_refused(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UsageError, match="cannot be written to: choose another one with --out"):
        RunFolder(tmp_path / "file" / below).check(**FRESH)


def test_a_folder_without_permission_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        module.os, "access", lambda path, mode: False
    )  # the superuser, in whom tests may run, may write
    with pytest.raises(UsageError, match="cannot be written to"):
        RunFolder(tmp_path / "new").check(**FRESH)
    assert listing(tmp_path) == []


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def mkdir(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", mkdir)
    with pytest.raises(UsageError, match="cannot be written to: Permission denied"):
        RunFolder(tmp_path / "new").open(**FRESH)


@pytest.mark.parametrize("resume", ["check", "open"])
def test_without_a_run_there_is_nothing_to_resume(tmp_path: Path, resume: str) -> None:
    with pytest.raises(CheckpointError, match="there is no run to resume in"):
        getattr(RunFolder(tmp_path / "none"), resume)(resume=True, overwrite=False)
    assert listing(tmp_path) == []


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"recipe": 3}'])
def test_a_damaged_note_is_explained(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"run\.json"):
        RunFolder(tmp_path).read()


def test_the_note_is_replaced_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder(tmp_path)
    folder.open(**FRESH)
    folder.write(status="running", recipe={"a": 1})

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        folder.write(status="finished")
    assert folder.read() == {"status": "running", "recipe": {"a": 1}}
    assert listing(tmp_path) == ["lock", "run.json"]
    folder.close()
