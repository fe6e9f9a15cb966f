"""vLLM's engine for CPUs under a load, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from importlib import util
from pathlib import Path
from typing import Any

from moesaic.bench.serving.load import Job
from moesaic.bench.serving.served import Served
from moesaic.errors import MoesaicError

PYTHON_VARIABLE = "MOESAIC_VLLM_PYTHON"
_WORKER = Path(__file__).with_name("vllm_worker.py")


def missing() -> str | None:
    """Why vLLM's engine cannot be used here, or None. Its kernel alone, which needs no install, serves no requests."""
    python = os.environ.get(PYTHON_VARIABLE)
    if python is None:
        if util.find_spec("vllm"):
            return None
        return f"vllm is not installed, and {PYTHON_VARIABLE} names no Python that has it"
    try:
        find = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"
        subprocess.run([python, "-c", find], capture_output=True, check=True)
    except OSError as error:
        return f"{PYTHON_VARIABLE}={python} cannot be run: {error.strerror}"
    except subprocess.CalledProcessError:
        return f"{PYTHON_VARIABLE}={python} has no vllm"
    return None


class Vllm:
    """``vllm.LLM.generate`` over the whole load, without prefix caching, tokens in and tokens out."""

    def __init__(self, folder: Path) -> None:
        self.process = subprocess.Popen(
            [os.environ.get(PYTHON_VARIABLE, sys.executable), str(_WORKER), str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,  # Ctrl-C is for us alone; it ends when its input does
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
        )
        self.name = f"vLLM {self._answer()['ready']} (CPU)"

    def serve(self, jobs: Sequence[Job]) -> Served:
        """Serve a load."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([[list(job.prompt_ids), job.new_tokens] for job in jobs]) + "\n")
        self.process.stdin.flush()
        told = self._answer()
        prompts = sum(len(job.prompt_ids) for job in jobs)
        return Served(self.name, told["seconds"], len(jobs), prompts, told["new"])

    def close(self) -> None:
        """End the process."""
        self.process.communicate()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise MoesaicError(f"vLLM's process ended with exit code {self.process.wait()}")
        found: dict[str, Any] = json.loads(line)
        return found
