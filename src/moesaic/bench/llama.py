"""llama.cpp, through its Python bindings in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from importlib import util
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from moesaic.bench.contenders import Contender
from moesaic.bench.workload import Bank, Call, Workload
from moesaic.errors import MoesaicError, UnsupportedError

PYTHON_VARIABLE = "MOESAIC_LLAMA_PYTHON"
_WORKER = Path(__file__).with_name("llama_worker.py")
_NEEDED = ("llama_cpp", "gguf")
_MOST_TOKENS = 2048
_CHECKED_TOKENS = 16
_SPINNING_SECONDS = 0.02


def missing() -> str | None:
    """Why llama.cpp cannot be used here, or None."""
    python = os.environ.get(PYTHON_VARIABLE)
    if python is None:
        if all(util.find_spec(name) for name in _NEEDED):
            return None
        return f"llama-cpp-python and gguf are not installed, and {PYTHON_VARIABLE} names no Python that has them"
    try:
        subprocess.run([python, "-c", f"import {', '.join(_NEEDED)}"], capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        return f"{PYTHON_VARIABLE}={python} cannot import {' and '.join(_NEEDED)}: {_last_line(error)}"
    return None


class LlamaContender(Contender):
    """One OLMoE layer in llama.cpp, less the same layer with experts of width 32 in the next run.

    What is left is nearly the experts alone: attention, router, top-k and the graph's own cost are taken off, which
    flatters llama.cpp. Weights and tokens are its own random ones; up to 64 tokens are sequences of their own.
    """

    def __init__(self, work: Workload) -> None:
        if work.dtype != "bf16" or work.shape.d_model % 64:
            raise UnsupportedError("llama.cpp is compared in bf16 only, for a model width that is a multiple of 64")
        shape = work.shape
        sizes = {
            "num_experts": shape.num_experts,
            "top_k": shape.top_k,
            "d_model": shape.d_model,
            "d_ff": shape.d_ff,
            "threads": torch.get_num_threads(),
        }
        self.process = subprocess.Popen(
            [os.environ.get(PYTHON_VARIABLE, sys.executable), str(_WORKER), json.dumps(sizes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is for us alone; it ends when its input does
        )
        self._answer()
        self.tokens, self.rest = 0, list[float]()

    def output(self, call: Call) -> Tensor:
        """Not there: it computes on its own weights."""
        raise NotImplementedError

    def error(self, call: Call, bank: Bank) -> float:
        """Of its own logits on as many tokens, at most 16, against float32."""
        return self._ask({"tokens": min(len(call.x), _CHECKED_TOKENS), "check": True})["error"]

    def seconds(self, call: Call) -> float:
        """The layer's time less that of the rest."""
        if len(call.x) > _MOST_TOKENS:
            raise UnsupportedError(f"llama.cpp is compared with up to {_MOST_TOKENS} tokens")
        # The idle threads of either process go on spinning for some milliseconds, on the other one's cores.
        time.sleep(_SPINNING_SECONDS)
        if len(call.x) != self.tokens:
            self.tokens, self.rest = len(call.x), []
        told = self._ask({"tokens": len(call.x)})
        time.sleep(_SPINNING_SECONDS)
        self.rest.append(told["rest"])
        # The median of the runs so far, because a single disturbed one would be taken off in full; and never nothing,
        # however noisy the measurements of a tiny layer are.
        return max(told["layer"] - median(self.rest), 1e-6)

    def cpu_seconds(self) -> float:
        """Of the process; 0 where the system does not tell."""
        try:
            fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return 0.0
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        """End the process."""
        self.process.communicate()

    def _ask(self, question: dict[str, object]) -> dict[str, float]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, float]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            _, told = self.process.communicate()
            raise MoesaicError(f"llama.cpp's process ended: {told.strip().splitlines()[-1:] or 'without a word'}")
        found: dict[str, float] = json.loads(line)
        return found


def _last_line(error: OSError | subprocess.CalledProcessError) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        return str(error.stderr.decode().strip().splitlines()[-1:] or error)
    return error.strerror or str(error)
