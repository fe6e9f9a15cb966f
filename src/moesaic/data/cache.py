"""A folder of finished entries: published whole, checked when opened, rebuilt when damaged.

    <folder>/tokens/<key>/     one entry; ``entry.json`` lists its files with their checksums
    <folder>/scans/<key>.json  which entry a scan of unchanged files led to
    <folder>/locks/<key>.lock  held while an entry is built, so that of many processes one does the work

The lock only saves work. What keeps an entry whole is that it is built under another name and
renamed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from moesaic.errors import DataError
from moesaic.folders import cache_folder

LISTING = "entry.json"
BLOCK = 1 << 20
MOST_BLOCKS = 64


class Cache:
    """Entries under ``folder`` (made when it is first written to). Reading needs no write permission."""

    def __init__(self, folder: str | Path | None = None) -> None:
        self.folder = Path(folder) if folder is not None else cache_folder()

    def entry(self, key: str) -> Path:
        return self.folder / "tokens" / key

    def open(self, key: str) -> dict[str, Any] | None:
        """What the writer of an entry said about it, or None when the entry is missing or damaged."""
        try:
            listing = json.loads((self.entry(key) / LISTING).read_bytes())
            about, files = listing["about"], listing["files"]
            if listing["seal"] != _seal(about, files):
                return None
            for name, expected in files.items():
                if _checksum(self.entry(key) / name) != expected:
                    return None
        except (OSError, ValueError, LookupError, TypeError):
            return None
        return dict(about)

    def build(self, key: str, write: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
        """Make the entry ``key`` by ``write(folder)`` unless a good one is there; returns what ``write`` said.

        Raises :class:`DataError` when the disk is full or not writable; nothing half-made is left then.
        """
        with self.lock(key) as is_alone:
            about = self.open(key)
            if about is not None:
                return about
            if is_alone:
                self._sweep(key)
            with self._explained():
                self.entry(key).parent.mkdir(parents=True, exist_ok=True)
                making = _unused(self.entry(key))
                making.mkdir()
            try:
                with self._explained():
                    about = write(making)
                    _finish(making, about)
                    self._publish(making, key)
            finally:
                shutil.rmtree(making, ignore_errors=True)
            return about

    def recall(self, scan: str) -> dict[str, Any] | None:
        """What :meth:`remember` wrote for this scan, or None."""
        try:
            note = json.loads(self._note(scan).read_bytes())
        except (OSError, ValueError):
            return None
        return note if isinstance(note, dict) else None

    def remember(self, scan: str, note: dict[str, Any]) -> None:
        """Write a note under the name of a scan; raises :class:`DataError` as :meth:`build` does."""
        with self._explained():
            path = self._note(scan)
            path.parent.mkdir(parents=True, exist_ok=True)
            making = _unused(path)
            try:
                with making.open("w", encoding="utf-8") as file:
                    json.dump(note, file)
                making.replace(path)
            finally:
                making.unlink(missing_ok=True)

    @contextlib.contextmanager
    def lock(self, key: str) -> Iterator[bool]:
        """Wait until no other process holds ``key``. It is let go when its holder ends, however it ends.

        Gives False, and holds nothing, on a file system that has no locks.
        """
        with self._explained():
            path = self.folder / "locks" / f"{key}.lock"
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("ab")
        with file:
            is_held = True
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError:
                is_held = False
            yield is_held

    def _note(self, scan: str) -> Path:
        return self.folder / "scans" / f"{scan}.json"

    def _publish(self, making: Path, key: str) -> None:
        entry = self.entry(key)
        if entry.exists() and self.open(key) is None:
            # Out of the way first, because a rename does not replace a folder that holds something.
            damaged = entry.rename(_unused(entry))
            shutil.rmtree(damaged, ignore_errors=True)
        try:
            making.rename(entry)
        except OSError as error:
            # On a file system without locks another process may have come first; its entry is as good.
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) or self.open(key) is None:
                raise

    def _sweep(self, key: str) -> None:
        """Remove what killed builds of this entry left behind; the lock says that none is running."""
        for leftover in self.entry(key).parent.glob(f"{key}.making-*"):
            shutil.rmtree(leftover, ignore_errors=True)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            hint = "choose another folder with MOESAIC_CACHE"
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise DataError(
                    f"no space left for the token cache in {str(self.folder)!r}: free some, or {hint}"
                ) from error
            reason = error.strerror or error
            raise DataError(f"cannot write the token cache in {str(self.folder)!r}: {reason}; {hint}") from error


def _unused(path: Path) -> Path:
    """A name beside ``path`` that no other process uses."""
    return path.with_name(f"{path.name}.making-{uuid.uuid4().hex}")


def _finish(folder: Path, about: dict[str, Any]) -> None:
    """List and seal the files of an entry, and have them on disk before the entry gets its name."""
    files = {path.name: _checksum(path) for path in sorted(folder.iterdir())}
    with (folder / LISTING).open("w", encoding="utf-8") as listing:
        json.dump({"about": about, "files": files, "seal": _seal(about, files)}, listing)
    for path in (*folder.iterdir(), folder):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _seal(about: object, files: object) -> str:
    return hashlib.blake2b(json.dumps([about, files], sort_keys=True).encode(), digest_size=16).hexdigest()


def _checksum(path: Path) -> str:
    """Digest of a file's size and content; of a file over 64 MiB, of 64 blocks spread over it.

    A full read of a large corpus would cost every start seconds; cut off, zeroed and mixed-up files show
    anyway.
    """
    size = path.stat().st_size
    digest = hashlib.blake2b(size.to_bytes(8, "little"), digest_size=16)
    with path.open("rb") as file:
        if size <= MOST_BLOCKS * BLOCK:
            while block := file.read(BLOCK):
                digest.update(block)
        else:
            for number in range(MOST_BLOCKS):
                file.seek((size - BLOCK) * number // (MOST_BLOCKS - 1))
                digest.update(file.read(BLOCK))
    return digest.hexdigest()
