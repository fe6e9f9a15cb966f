"""One process a rank, in the namespace of its host, that measures what it is asked to."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import IO, Any

from moesaic.bench.parallel.lab import Lab, Setting
from moesaic.errors import MoesaicError

_WORKER = "moesaic.bench.parallel.worker"
_PATIENCE = 300.0
_GLANCE = 0.2


@contextmanager
def started(setting: Setting, more: Mapping[str, str] | None = None) -> Iterator[Ranks]:
    """The ranks of a setting, when all of them know each other; they are ended and their network deleted afterwards.

    Args:
        more: added to the environment of every rank.

    Raises:
        MoesaicError: where a command of the lab fails, or as :meth:`Ranks.ask`.
    """
    with Lab(setting) as lab:
        ranks = Ranks(lab, more or {})
        try:
            ranks.answer()
            yield ranks
        finally:
            ranks.close()


class Ranks:
    """Processes that answer questions; rank 0 speaks for all of them."""

    def __init__(self, lab: Lab, more: Mapping[str, str]) -> None:
        self.setting = lab.setting
        self.processes: list[subprocess.Popen[bytes]] = []
        self.errors: list[IO[str]] = []
        self.rest = b""
        port = free_port()
        for rank in range(self.setting.ranks):
            errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  (close() ends it with the process)
            self.errors.append(errors)
            host = rank // self.setting.per_host
            self.processes.append(
                subprocess.Popen(
                    lab.command(host, [sys.executable, "-m", _WORKER]),
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
                    stderr=errors,
                    env=os.environ | environment(lab, rank, port) | dict(more),
                    start_new_session=True,  # Ctrl-C is for us alone, and we end them
                )
            )

    def ask(self, question: Mapping[str, Any]) -> Any:
        """What rank 0 answers when every rank has done what the question says.

        Raises:
            MoesaicError: where a rank ends instead, or nothing is said for five minutes.
        """
        line = json.dumps(question).encode() + b"\n"
        for process in self.processes:
            assert process.stdin is not None
            with suppress(BrokenPipeError):  # answer() says why
                process.stdin.write(line)
                process.stdin.flush()
        return self.answer()

    def answer(self) -> Any:
        """The next line that rank 0 writes."""
        told = self.processes[0].stdout
        assert told is not None
        end = time.perf_counter() + _PATIENCE
        while b"\n" not in self.rest:
            if select.select([told], [], [], _GLANCE)[0]:
                self.rest += os.read(told.fileno(), 1 << 16)
            for rank, process in enumerate(self.processes):
                if process.poll() is not None and b"\n" not in self.rest:
                    raise MoesaicError(
                        f"rank {rank} of {self.setting} ended with exit code {process.returncode}: {self._why(rank)}"
                    )
            if time.perf_counter() > end:
                raise MoesaicError(f"{self.setting}: no answer within {_PATIENCE:.0f} s")
        line, _, self.rest = self.rest.partition(b"\n")
        return json.loads(line)

    def close(self) -> None:
        """End the processes."""
        for process in self.processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        for process, errors in zip(self.processes, self.errors, strict=True):
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with suppress(BrokenPipeError):
                        pipe.close()
            errors.close()

    def _why(self, rank: int) -> str:
        errors = self.errors[rank]
        errors.seek(0)
        lines = errors.read().strip().splitlines()
        return lines[-1] if lines else "it said nothing"


def environment(lab: Lab, rank: int, port: int) -> dict[str, str]:
    """What ``torchrun`` would set for a rank, and by which interface to talk."""
    setting = lab.setting
    host, local = divmod(rank, setting.per_host)
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(setting.ranks),
        "LOCAL_RANK": str(local),
        "LOCAL_WORLD_SIZE": str(setting.per_host),
        "GROUP_RANK": str(host),
        "GROUP_WORLD_SIZE": str(setting.hosts),
        "MASTER_ADDR": lab.address,
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": lab.interface,
        "OMP_NUM_THREADS": "1",
    }


def free_port() -> int:
    """A port that nobody listens at here; in a namespace all of them are free."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
