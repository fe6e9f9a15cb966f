"""transformers' own continuous batching (``ContinuousBatchingManager``) under a load, in this process."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moesaic.bench.limits import OtherProcesses
from moesaic.bench.serving.load import Job
from moesaic.bench.serving.models import load
from moesaic.bench.serving.served import Served
from moesaic.errors import MoesaicError

# The best of those tried on 2 cores. Its default takes the whole load as one batch of prompts, masked as one
# attention: 14 % slower. Experts "eager" instead of "grouped_mm": 21 % slower; 256 tokens a batch: 5 %.
PAGE_SIZE, PAGES, BATCH_TOKENS = 256, 128, 512
_PATIENCE = 1.0


class ContinuousBatching:
    """A model of transformers with paged attention (SDPA) and its fastest experts, all requests in at once."""

    def __init__(self, folder: Path, most: int = 32) -> None:
        from transformers import ContinuousBatchingConfig, GenerationConfig

        self.model: Any = load(folder, "grouped_mm")
        told = GenerationConfig(do_sample=False, max_new_tokens=1, eos_token_id=-1, pad_token_id=0)
        sizes = ContinuousBatchingConfig(
            page_size=PAGE_SIZE, num_blocks=PAGES, max_batch_tokens=BATCH_TOKENS, max_requests_per_batch=most
        )
        self.manager = self.model.init_continuous_batching(generation_config=told, continuous_batching_config=sizes)
        self.manager.start()
        self.serve([Job(tuple(range(1, 17)), 2)])

    def serve(self, jobs: Sequence[Job]) -> Served:
        """Serve a load.

        Raises:
            MoesaicError: where a request fails, or the manager's thread has ended.
        """
        others, start = OtherProcesses(0.0), time.perf_counter()
        for i, job in enumerate(jobs):
            self.manager.add_request(
                list(job.prompt_ids), request_id=str(i), max_new_tokens=job.new_tokens, record_timestamps=True
            )
        times: dict[int, tuple[float, ...]] = {}
        while len(times) < len(jobs):
            result = self.manager.get_result(timeout=_PATIENCE)
            if result is None and not self.manager.is_running():
                raise MoesaicError("transformers' continuous batching has ended before its requests")
            if result is not None and result.error:
                raise MoesaicError(f"transformers' continuous batching failed: {result.error}")
            if result is not None and result.is_finished():
                times[int(result.request_id)] = tuple(each - start for each in result.timestamps)
        seconds = time.perf_counter() - start
        in_order = tuple(times[i] for i in range(len(jobs)))
        prompts, new = sum(len(job.prompt_ids) for job in jobs), sum(map(len, in_order))
        name = "transformers' continuous batching"
        return Served(name, seconds, len(jobs), prompts, new, in_order, others.share(0.0))

    def close(self) -> None:
        """End its thread."""
        self.manager.stop(block=True, timeout=10)
