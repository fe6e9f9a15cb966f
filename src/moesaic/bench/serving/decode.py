"""One request alone: the engine against a plain loop over the same model."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from moesaic.bench.part import Part
from moesaic.bench.serving.engine import EngineUnderTest
from moesaic.bench.serving.load import mixed
from moesaic.bench.serving.models import load
from moesaic.bench.serving.part import opened
from moesaic.bench.targets import Verdict
from moesaic.bench.timing import alternate
from moesaic.hf.freezing import freeze

PROMPT, NEW, SECONDS = 64, 64, 25.0
HEADER = ("contender", "between tokens, ms", "quartiles", "runs")


def run_decode(folder: Path, tell: Callable[[str], None]) -> Part:
    """Time between tokens of the engine and of the loop, which take turns.

    The loop is what one would write oneself: transformers' forward with a ``DynamicCache`` and SDPA, the most probable
    token next, no streamer and no stopping criteria. Its model is loaded and frozen as the engine's is, so that experts
    and linear layers run on the same kernels.
    """
    plain: Any = load(folder)
    freeze(plain)
    (job,) = mixed(plain.config.vocab_size, 1, (PROMPT, PROMPT), (NEW, NEW))
    prompt = torch.tensor([job.prompt_ids])
    with opened(lambda: EngineUnderTest(folder)) as engine:
        contenders: dict[str, Callable[[int], float]] = {
            "moesaic engine": lambda number: engine.serve([job]).gaps().mean,
            "loop": lambda number: _loop(plain, prompt),
        }
        for run in contenders.values():
            run(0)
        tell("the engine and a loop take turns")
        times, _ = alternate(contenders, {}, SECONDS)
    speed, *_ = times["moesaic engine"].ratio_of(times["loop"])
    work = f"1 request, {NEW} new tokens after {PROMPT}"
    rows = []
    for name, found in times.items():
        low, high = (value * 1e3 for value in found.quartiles())
        rows.append((name, f"{found.median * 1e3:.1f}", f"{low:.1f} - {high:.1f}", str(len(found.seconds))))
    verdicts = [Verdict("decode", work, "speed / engine-free loop's", 0.9, speed, "%")]
    return Part(work, HEADER, rows, verdicts, figures={name: found.median for name, found in times.items()})


@torch.inference_mode()
def _loop(model: Any, prompt_1T: torch.Tensor) -> float:
    """Mean seconds between two tokens."""
    out = model(prompt_1T, use_cache=True, logits_to_keep=1)
    token = out.logits[:, -1].argmax(-1, keepdim=True)
    token.item()
    start = time.perf_counter()
    for _ in range(NEW - 1):
        out = model(token, past_key_values=out.past_key_values, use_cache=True)
        token = out.logits[:, -1].argmax(-1, keepdim=True)
        token.item()
    return (time.perf_counter() - start) / (NEW - 1)
