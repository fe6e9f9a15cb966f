"""A server in a process of its own, and what can be seen of it from outside."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from moesaic.bench.soak.wire import Wire
from moesaic.errors import UsageError

_START_SECONDS = 180.0
_END_SECONDS = 60.0


class ServerProcess(AbstractContextManager["ServerProcess"]):
    """``moesaic serve`` while the block runs.

    Args:
        arguments: of ``moesaic serve``, without ``--port``. log: the file that its stderr goes to.

    Raises:
        UsageError: on entering, where it does not start.
    """

    def __init__(self, arguments: Sequence[str], log: Path, environment: dict[str, str] | None = None) -> None:
        self._command = [sys.executable, "-m", "moesaic", "serve", *arguments, "--port", "0"]
        self._log, self._environment = log, {**os.environ, **(environment or {})}
        self.url = ""

    def __enter__(self) -> Self:
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                self._command, stdout=subprocess.PIPE, stderr=log, text=True, env=self._environment
            )
        assert self._process.stdout is not None
        too_long = threading.Timer(_START_SECONDS, self._process.kill)
        too_long.start()
        try:
            line = self._process.stdout.readline()
        finally:
            too_long.cancel()
        found = re.search(r" at (http://([\d.]+):(\d+))", line)
        if found is None:
            self._process.kill()
            self._process.communicate()
            raise UsageError(f"the server has not started: {self.log().strip()[-2000:] or line.strip() or 'too slow'}")
        self.url, host, port = found.groups()
        self.wire = Wire(host, int(port))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process.poll() is None:
            self.end()

    def end(self) -> int:
        """Send SIGTERM; the exit code."""
        self._process.terminate()
        try:
            self._process.communicate(timeout=_END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()
        return self._process.returncode

    def log(self) -> str:
        """What it has said on stderr."""
        return self._log.read_text(errors="replace")

    def resident_bytes(self) -> int:
        """Of its memory, what is in RAM now. Linux.

        Raises:
            UsageError: where it has ended.
        """
        try:
            pages = int(Path(f"/proc/{self._process.pid}/statm").read_text().split()[1])
        except (OSError, IndexError) as error:
            raise UsageError(f"the server has ended: {self.log().strip()[-2000:]}") from error
        return pages * os.sysconf("SC_PAGESIZE")

    async def stats(self) -> dict[str, Any]:
        """Its answer at ``/stats``."""
        async with self.wire.ask("GET", "/stats") as answer:
            told: dict[str, Any] = await answer.json()
            return told
