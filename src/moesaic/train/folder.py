"""A run's folder: who may write to it, and ``run.json``, which holds everything needed to repeat the run.

run.json  metrics.jsonl  tensorboard/  checkpoints/step-00000100/  model/ or adapter/, and ``lock`` while it is used
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

from moesaic.errors import CheckpointError, UsageError

NOTE = "run.json"
LOCK = "lock"
_PARTS = (NOTE, "metrics.jsonl", "tensorboard", "checkpoints", "model", "model.tmp", "adapter", "adapter.tmp", "report")


class RunFolder:
    """The folder of one run; :meth:`check` before long work, then :meth:`open` until :meth:`close`.

    Args:
        is_ours: False for the ranks that leave the folder to the first one: what they :meth:`write` is kept in
            :attr:`note` only.
    """

    def __init__(self, path: Path, is_ours: bool = True) -> None:
        self.path, self._is_ours = path, is_ours
        self.note: dict[str, Any] = {}
        self._lock: int | None = None

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def holds_run_of(self, launch: str | None) -> bool:
        """Whether the run in the folder was last worked on by this start of ``torchrun``, which has started anew since;
        see :func:`moesaic.train.world.launch`.
        """
        if launch is None or not (self.path / NOTE).is_file():
            return False
        lives = self.read().get("lives") or [{}]
        return bool(lives[-1].get("launch") == launch)

    def wait_until_free(self, seconds: float) -> None:
        """Until the process that uses the folder has ended, but not longer than that."""
        end = time.monotonic() + seconds
        while self._used_by_another() and time.monotonic() < end:
            time.sleep(0.1)

    def check(self, *, resume: bool, overwrite: bool) -> None:
        """Refuse a folder that a run could not use; writes nothing.

        Raises:
            UsageError: where another run is using it, it holds another run or other files, or cannot be written to.
            CheckpointError: where there is nothing to resume.
        """
        existing = next(folder for folder in (self.path, *self.path.absolute().parents) if folder.exists())
        if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
            raise UsageError(
                f"the output folder {str(self.path)!r} cannot be written to: choose another one with --out"
            )
        if self._used_by_another():
            raise self._in_use()
        holds_run = (self.path / NOTE).is_file()
        if resume:
            if not holds_run:
                raise CheckpointError(f"there is no run to resume in {str(self.path)!r}: it holds no {NOTE}")
            return
        if holds_run and not overwrite:
            state = self.read().get("status", "unfinished")
            raise UsageError(
                f"the output folder {str(self.path)!r} holds a run already ({state}): go on with it by --resume, "
                "replace it by --overwrite, or choose another folder with --out"
            )
        if not holds_run and self.path.exists() and {entry.name for entry in self.path.iterdir()} - {LOCK}:
            raise UsageError(
                f"the output folder {str(self.path)!r} is not empty and holds no run: choose another one with --out"
            )

    def open(self, *, resume: bool, overwrite: bool) -> None:
        """Take the folder for this process, after another :meth:`check`; with ``overwrite`` its run is removed.

        The lock is the operating system's, and so goes away with the process, however that ends.
        """
        self.check(resume=resume, overwrite=overwrite)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._acquire()
            if resume:
                self.note = self.read()
            else:
                self._clear()
        except OSError as error:
            self.close()
            raise UsageError(
                f"the output folder {str(self.path)!r} cannot be written to: {error.strerror or error}"
            ) from error

    def close(self) -> None:
        """Let other runs use the folder."""
        if self._lock is not None:
            # Removed before it is let go: whoever opened it meanwhile notices that it has no name any more.
            (self.path / LOCK).unlink(missing_ok=True)
            os.close(self._lock)
            self._lock = None

    def read(self) -> dict[str, Any]:
        """What ``run.json`` says; raises :class:`CheckpointError` where it is missing or damaged."""
        try:
            note = json.loads((self.path / NOTE).read_bytes())
        except FileNotFoundError:
            raise CheckpointError(f"there is no run in {str(self.path)!r}: it holds no {NOTE}") from None
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{str(self.path / NOTE)!r} cannot be read: {error}") from error
        if not isinstance(note, dict) or not isinstance(note.get("recipe"), dict):
            raise CheckpointError(f"{str(self.path / NOTE)!r} does not describe a run: it holds no recipe")
        return note

    def write(self, **changes: Any) -> None:
        """Change ``run.json``, which is replaced as a whole; None values too are written."""
        self.note |= changes
        if not self._is_ours:
            return
        making = self.path / f"{NOTE}.tmp"
        try:
            with making.open("w", encoding="utf-8") as file:
                json.dump(self.note, file, indent=2)
                file.flush()
                os.fsync(file.fileno())
            os.replace(making, self.path / NOTE)
        finally:
            making.unlink(missing_ok=True)

    def size(self) -> int:
        """Bytes in the folder's files."""
        return sum(path.stat().st_size for path in self.path.rglob("*") if path.is_file())

    def _acquire(self) -> None:
        while True:
            lock = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
            if not self._lock_is_free(lock):
                os.close(lock)
                raise self._in_use()
            if _is_named(lock, self.path / LOCK):
                break
            os.close(lock)
        os.ftruncate(lock, 0)
        os.write(lock, f"{os.getpid()}\n".encode())
        self._lock = lock

    def _used_by_another(self) -> bool:
        try:
            lock = os.open(self.path / LOCK, os.O_RDONLY)
        except OSError:
            return False
        try:
            return self._lock is None and not self._lock_is_free(lock)
        finally:
            os.close(lock)

    def _lock_is_free(self, handle: int) -> bool:
        try:
            return _try_lock(handle)
        except OSError as error:  # such as ENOLCK on some network file systems
            raise UsageError(
                f"the output folder {str(self.path)!r} cannot be locked ({error.strerror or error}): "
                "choose one on another file system with --out"
            ) from error

    def _in_use(self) -> UsageError:
        try:
            holder = (self.path / LOCK).read_text().strip()
        except OSError:
            holder = ""
        process = f" (process {holder})" if holder else ""
        return UsageError(
            f"the output folder {str(self.path)!r} is in use by another run{process}: "
            "wait for its end, or choose another folder with --out"
        )

    def _clear(self) -> None:
        for name in _PARTS:
            part = self.path / name
            if part.is_dir() and not part.is_symlink():
                shutil.rmtree(part)
            else:
                part.unlink(missing_ok=True)


def _try_lock(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        raise
    return True


def _is_named(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False
