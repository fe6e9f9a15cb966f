"""Servers with OpenAI's API under a load, each in a process of its own; the same client for all."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from moesaic.bench.serving.load import Job
from moesaic.bench.serving.models import load_tokenizer
from moesaic.bench.serving.served import Served
from moesaic.errors import MoesaicError

_PATIENCE = 180
_REQUEST_PATIENCE = 600
_HOST = "127.0.0.1"


class Server:
    """A server that is started, asked and ended.

    Args:
        name: of the contender.
        command: what to run; ``{port}`` is replaced by a free one.
        folder: of the model, whose tokenizer makes text of the prompts.
        model: what requests call it.
        extra: further fields of a request's body.
    """

    def __init__(self, name: str, command: Sequence[str], folder: Path, model: str, extra: dict[str, Any]) -> None:
        self.name, self.model, self.extra = name, model, extra
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(folder)
        port = _free_port()
        self.url = f"http://{_HOST}:{port}"
        filled = [part.replace("{port}", str(port)) for part in command]
        self.process = subprocess.Popen(
            filled, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        try:
            self._wait()
            self._ask(Job(tuple(range(1, 17)), 2))  # transformers' loads its model at the first request
        except BaseException:
            self.close()
            raise

    def serve(self, jobs: Sequence[Job]) -> Served:
        """Send all requests at once, each by a client of its own, and wait for the last answer."""
        start = time.perf_counter()
        with ThreadPoolExecutor(len(jobs)) as clients:
            new = list(clients.map(self._ask, jobs))
        seconds = time.perf_counter() - start
        return Served(self.name, seconds, len(jobs), sum(len(job.prompt_ids) for job in jobs), sum(new))

    def close(self) -> None:
        """End the process."""
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def _ask(self, job: Job) -> int:
        """How many tokens the answer has."""
        body = {
            "model": self.model,
            "prompt": self.tokenizer.decode(list(job.prompt_ids)),
            "max_tokens": job.new_tokens,
            "temperature": 0.0,
            **self.extra,
        }
        request = urllib.request.Request(
            f"{self.url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=_REQUEST_PATIENCE) as answer:
                usage = json.loads(answer.read())["usage"]
        except urllib.error.HTTPError as error:
            raise MoesaicError(f"{self.name} answered {error.code}: {error.read()[:300]!r}") from error
        if usage["prompt_tokens"] != len(job.prompt_ids):
            raise MoesaicError(f"{self.name} read {usage['prompt_tokens']} tokens, not {len(job.prompt_ids)}")
        return int(usage["completion_tokens"])

    def _wait(self) -> None:
        end = time.perf_counter() + _PATIENCE
        while time.perf_counter() < end:
            if self.process.poll() is not None:
                raise MoesaicError(f"{self.name} ended with exit code {self.process.returncode} before it was ready")
            for path in ("/ready", "/health"):
                try:
                    with urllib.request.urlopen(self.url + path, timeout=5):
                        return
                except urllib.error.HTTPError as error:
                    if error.code == 503:  # /ready, while it loads; others have no such path
                        break
                except OSError:
                    break
            time.sleep(0.2)
        raise MoesaicError(f"{self.name} was not ready after {_PATIENCE} s")


def moesaic_serve(folder: Path) -> Server:
    """Ours."""
    command = [sys.executable, "-m", "moesaic", "serve", str(folder), "--port", "{port}", "--name", "model"]
    return Server("moesaic serve", command, folder, "model", {"ignore_eos": True})


def transformers_serve(folder: Path) -> Server:
    """transformers' as it comes: it answers one request after the other."""
    main = "from transformers.cli.transformers import main; main()"
    command = [sys.executable, "-c", main, "serve", str(folder), "--device", "cpu", "--host", _HOST, "--port", "{port}"]
    return Server("transformers serve", command, folder, str(folder), {})


def _free_port() -> int:
    with socket.socket() as free:
        free.bind((_HOST, 0))
        return int(free.getsockname()[1])
