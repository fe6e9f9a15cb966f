"""Driving an engine in tests, and what transformers' own generate says to the same."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from tests.serve.tiny import VOCABULARY, byte_tokenizer, tiny
from torch import Tensor
from transformers import PreTrainedModel

from moesaic.adapters.pool import AdapterPool
from moesaic.serve.engine import Engine
from moesaic.serve.request import EngineSettings, Output, Request, SamplingParams

TOKENIZER = byte_tokenizer()
END = 256
GREEDY = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)
# Two layers, keys and values of 16 tokens, two heads.
PAGE_BYTES = {"olmoe": 2 * 2 * 16 * 2 * 8 * 4, "moesaic": 2 * 2 * 16 * 2 * 16 * 4}


@cache
def model_of(family: str) -> PreTrainedModel:
    return tiny(family, experts_implementation="moesaic")


def engine_of(family: str = "olmoe", pages: int = 200, adapters: AdapterPool | None = None, **options: Any) -> Engine:
    model = model_of(family) if adapters is None else adapters.model
    kv_bytes = pages * PAGE_BYTES.get(family, 4096)
    return Engine(model, TOKENIZER, EngineSettings(**{"kv_bytes": kv_bytes, "isolate": False} | options), adapters)  # type: ignore[arg-type]


@cache
def plain_model(family: str) -> PreTrainedModel:
    return tiny(family, attn_implementation="eager", experts_implementation="eager")


@cache
def generated(prompt: tuple[int, ...], length: int, family: str = "olmoe") -> tuple[int, ...]:
    """What generate says, which ends nowhere: these models' configurations name no end token."""
    return continued(plain_model(family), prompt, length)


def continued(model: PreTrainedModel, prompt: tuple[int, ...], length: int) -> tuple[int, ...]:
    ids = torch.tensor([prompt])
    options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 0}
    out: Tensor = model.generate(ids, max_new_tokens=length, **options)  # type: ignore[operator]
    return tuple(out[0, len(prompt) :].tolist())


def random_prompts(lengths: Iterable[int]) -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(0)
    return [tuple(torch.randint(VOCABULARY, (n,), generator=generator).tolist()) for n in lengths]


def finish(engine: Engine) -> list[Output]:
    outputs = []
    while engine.has_work:
        outputs += engine.step()
    return outputs


def gathered(outputs: Iterable[Output]) -> dict[tuple[str, int], Output]:
    """The outputs of each continuation as one."""
    whole: dict[tuple[str, int], Output] = {}
    for output in outputs:
        key = output.request_id, output.index
        if key in whole:
            before = whole[key]
            assert before.finish_reason is None, "something came after the end"
            output = replace(
                output,
                token_ids=before.token_ids + output.token_ids,
                text=before.text + output.text,
                logprobs=before.logprobs + output.logprobs,
            )
        whole[key] = output
    return whole


def run(engine: Engine, *requests: Request) -> dict[tuple[str, int], Output]:
    for request in requests:
        engine.add(request)
    return gathered(finish(engine))


def assert_all_returned(engine: Engine) -> None:
    stats = engine.stats()
    assert (stats.waiting, stats.running, stats.pages_used) == (0, 0, 0)
    assert not engine.has_work
    assert not engine._flights and not engine._continuations


PROMPTS = random_prompts([1, 5, 16, 17, 33, 60, 100, 160])
PROMPTS += [PROMPTS[-1][:90] + PROMPTS[1], PROMPTS[-1][:96], PROMPTS[-1]]  # beginnings in common
