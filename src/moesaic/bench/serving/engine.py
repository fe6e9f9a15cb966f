"""Our engine under a load, stepped in this thread, as fast as it goes."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moesaic.adapters.pool import AdapterPool
from moesaic.bench.limits import OtherProcesses
from moesaic.bench.serving.load import Job, mixed
from moesaic.bench.serving.models import load, load_tokenizer
from moesaic.bench.serving.served import Served
from moesaic.hf.freezing import freeze
from moesaic.hf.quantized import expert_modules
from moesaic.serve.engine import Engine
from moesaic.serve.request import EngineSettings, Request, SamplingParams

NAME = "moesaic engine"


class Run:
    """A load on its way through an engine. Its clock runs during its own steps only, so that two may take turns.

    Args:
        experts: modules, whose distinct experts are counted in every step.
        late: further requests, each with the number of the step before which it is sent, in this order.
    """

    def __init__(
        self, engine: Engine, experts: Sequence[Any], jobs: Sequence[Job], late: Sequence[tuple[int, Job]] = ()
    ) -> None:
        self._engine, self._experts = engine, experts
        self._waiting = deque(late)
        self._jobs: list[Job] = []
        self._times: list[list[float]] = []
        self._steps: list[float] = []
        self._clock = self._touched = 0.0
        self._others = OtherProcesses(0.0)
        for job in jobs:
            self._send(job)

    @property
    def has_work(self) -> bool:
        """Whether there is a step to make."""
        return self._engine.has_work or bool(self._waiting)

    def step(self) -> None:
        """One step of the engine."""
        start = time.perf_counter()
        while self._waiting and self._waiting[0][0] <= len(self._steps):
            self._send(self._waiting.popleft()[1])
        outputs = self._engine.step()
        self._clock += time.perf_counter() - start
        for output in outputs:
            self._times[int(output.request_id)].extend([self._clock] * len(output.token_ids))
        self._steps.append(self._clock)
        counts = [module.last_counts for module in self._experts if module.last_counts is not None]
        self._touched += sum(int(each.count_nonzero()) for each in counts) / max(1, len(counts))

    def served(self) -> Served:
        """What came of it."""
        return Served(
            NAME,
            self._clock,
            len(self._jobs),
            sum(len(job.prompt_ids) for job in self._jobs),
            sum(map(len, self._times)),
            times=tuple(map(tuple, self._times)),
            others=self._others.share(0.0),
            experts=self._touched / len(self._steps),
            steps=tuple(self._steps),
        )

    def _send(self, job: Job) -> None:
        params = SamplingParams(max_tokens=job.new_tokens, temperature=0, ignore_eos=True)
        self._engine.add(Request(str(len(self._jobs)), job.prompt_ids, params, job.adapter))
        self._jobs.append(job)
        self._times.append([])


class EngineUnderTest:
    """A model and an engine around it, which serves loads one after the other.

    Args:
        adapters: whether requests may name adapters, which :attr:`pool` then holds.
    """

    def __init__(self, folder: Path, settings: EngineSettings | None = None, adapters: bool = False) -> None:
        self.model: Any = load(folder)
        freeze(self.model)
        self.pool = AdapterPool(self.model) if adapters else None
        self._tokenizer = load_tokenizer(folder)
        self._experts: list[Any] = list(expert_modules(self.model).values())
        self.restart(settings)
        # What is made at first use is there afterwards.
        self.serve(mixed(self.model.config.vocab_size, 4, (8, 64), (4, 4), seed=1))

    def restart(self, settings: EngineSettings | None) -> None:
        """Go on with a new engine around the same model."""
        self.settings = settings
        self.engine = Engine(self.model, self._tokenizer, settings, self.pool)

    def serve(self, jobs: Sequence[Job], late: Sequence[tuple[int, Job]] = ()) -> Served:
        """Serve a load, and ``late`` as :class:`Run` takes it."""
        run = Run(self.engine, self._experts, jobs, late)
        while run.has_work:
            run.step()
        return run.served()

    def serve_in_turns(self, loads: Sequence[Sequence[Job]]) -> list[Served]:
        """Serve several loads, each by an engine of its own around the same model, step by step in turns.

        What disturbs a step of one then disturbs the same step of the others; who comes first changes every time.
        """
        engines = [Engine(self.model, self._tokenizer, self.settings, self.pool) for _ in loads]
        runs = [Run(engine, self._experts, jobs) for engine, jobs in zip(engines, loads, strict=True)]
        turn = 1
        while any(run.has_work for run in runs):
            for run in runs[::turn]:
                if run.has_work:
                    run.step()
            turn = -turn
        return [run.served() for run in runs]

    def close(self) -> None:
        """Unload the adapters."""
        if self.pool is not None:
            self.pool.close()
