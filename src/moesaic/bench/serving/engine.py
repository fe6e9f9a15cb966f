"""Our engine under a load, stepped in this thread, as fast as it goes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import moesaic
from moesaic.adapters.pool import AdapterPool
from moesaic.bench.limits import OtherProcesses
from moesaic.bench.serving.load import Job, mixed
from moesaic.bench.serving.models import load, load_tokenizer
from moesaic.bench.serving.served import Served
from moesaic.hf.quantized import expert_modules
from moesaic.serve.engine import Engine
from moesaic.serve.request import EngineSettings, Request, SamplingParams

NAME = "moesaic engine"


class EngineUnderTest:
    """A model and an engine around it, which serves loads one after the other.

    Args:
        adapters: whether requests may name adapters, which :attr:`pool` then holds.
    """

    def __init__(self, folder: Path, settings: EngineSettings | None = None, adapters: bool = False) -> None:
        self.model: Any = load(folder)
        moesaic.freeze(self.model)
        self.pool = AdapterPool(self.model) if adapters else None
        self._tokenizer = load_tokenizer(folder)
        self.restart(settings)
        self._experts: list[Any] = list(expert_modules(self.model).values())
        # What is made at first use is there afterwards.
        self.serve(mixed(self.model.config.vocab_size, 4, (8, 64), (4, 4), seed=1))

    def restart(self, settings: EngineSettings | None) -> None:
        """Go on with a new engine around the same model."""
        self.engine = Engine(self.model, self._tokenizer, settings, self.pool)

    def serve(self, jobs: Sequence[Job], late: Sequence[tuple[int, Job]] = ()) -> Served:
        """Serve a load.

        Args:
            late: further requests, each with the number of the step before which it is sent, in this order.
        """
        times: list[list[float]] = []
        waiting, steps, touched = list(late), list[float](), 0.0
        others, start = OtherProcesses(0.0), time.perf_counter()
        for job in jobs:
            self._send(job, times)
        while self.engine.has_work or waiting:
            while waiting and waiting[0][0] <= len(steps):
                self._send(waiting.pop(0)[1], times)
            outputs = self.engine.step()
            here = time.perf_counter() - start
            for output in outputs:
                times[int(output.request_id)].extend([here] * len(output.token_ids))
            steps.append(here)
            touched += self._touched()
        seconds = time.perf_counter() - start
        everything = [*jobs, *(job for _, job in late)]
        prompts, new = sum(len(job.prompt_ids) for job in everything), sum(map(len, times))
        share, experts = others.share(0.0), touched / len(steps)
        return Served(NAME, seconds, len(times), prompts, new, tuple(map(tuple, times)), share, experts, tuple(steps))

    def close(self) -> None:
        """Unload the adapters."""
        if self.pool is not None:
            self.pool.close()

    def _send(self, job: Job, times: list[list[float]]) -> None:
        params = SamplingParams(max_tokens=job.new_tokens, temperature=0, ignore_eos=True)
        self.engine.add(Request(str(len(times)), job.prompt_ids, params, job.adapter))
        times.append([])

    def _touched(self) -> float:
        counts = [module.last_counts for module in self._experts]
        return sum(int(each.count_nonzero()) for each in counts if each is not None) / max(1, len(counts))
