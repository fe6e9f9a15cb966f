"""A whole model: greedy generation of an OLMoE-shaped one with random weights, under several implementations."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import OlmoeConfig, OlmoeForCausalLM
from transformers.models.olmoe.modeling_olmoe import OlmoeRotaryEmbedding

import moesaic.hf  # noqa: F401  (registers the implementation "moesaic")
from moesaic.bench.timing import Times, alternate, timed
from moesaic.bench.workload import distance, tiled

_PROMPT = 16


@dataclass(frozen=True)
class Generation:
    """Greedy generation under one experts implementation.

    Attributes:
        name: of the implementation.
        seconds, quartiles, runs: of one generation.
        same_tokens: how many of the new tokens are those of the first implementation, before the first other one.
        logits_error: ``‖logits − ref‖ / ‖ref‖`` over the first implementation's text, against the model in float32.
        ratio, ratio_quartiles: its time over that of the first implementation.
    """

    name: str
    seconds: float
    quartiles: tuple[float, float]
    runs: int
    same_tokens: int
    logits_error: float
    ratio: float
    ratio_quartiles: tuple[float, float]


def run_generation(
    implementations: list[str],
    seconds: float,
    new_tokens: int = 64,
    layers: int = 4,
    seed: int = 0,
    **settings: Any,
) -> list[Generation]:
    """Generate ``new_tokens`` after a random prompt of 16, the implementations taking turns on one model in bf16.

    Args:
        implementations: names as ``experts_implementation`` takes them; times are compared with the first.
        seconds: how long to go on; three rounds at least.
        settings: of transformers' ``OlmoeConfig`` other than its defaults (OLMoE's experts are half as wide).
    """
    config = OlmoeConfig(num_hidden_layers=layers, eos_token_id=None, **settings)
    model = random_olmoe(config, seed)
    prompt = torch.randint(config.vocab_size, (1, _PROMPT), generator=torch.Generator().manual_seed(seed))

    run = partial(_generate, model, prompt, new_tokens)
    texts = {name: run(name) for name in implementations}
    text = torch.cat([prompt[0], texts[implementations[0]]])[None]
    errors = _errors(model, text, implementations)
    contenders = {name: partial(_seconds, run, name) for name in implementations}
    times, _ = alternate(contenders, {}, seconds, least_rounds=3)
    first = implementations[0]
    return [
        _result(name, times[name], times[first], texts[name] == texts[first], errors[name]) for name in implementations
    ]


def _generate(model: Any, prompt: Tensor, new_tokens: int, name: str) -> Tensor:
    model.config._experts_implementation = name
    text: Tensor = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return text[0, _PROMPT:]


def _seconds(run: Callable[[str], Tensor], name: str, number: int) -> float:
    return timed(lambda: run(name))


def _result(name: str, times: Times, first: Times, same: Tensor, logits_error: float) -> Generation:
    ratio, low, high = first.ratio_of(times)
    agreed = int(same.long().cumprod(0).sum())
    return Generation(
        name, times.median, times.quartiles(), len(times.seconds), agreed, logits_error, ratio, (low, high)
    )


def _errors(model: nn.Module, text: Tensor, names: list[str]) -> dict[str, float]:
    logits = {name: _logits(model, text, name) for name in names}
    reference = _logits(copy.deepcopy(model).float(), text, "eager")
    return {name: distance(found, reference) for name, found in logits.items()}


@torch.inference_mode()
def _logits(model: Any, text: Tensor, name: str) -> Tensor:
    model.config._experts_implementation = name
    logits: Tensor = model(text).logits
    return logits.float()


def random_olmoe(config: OlmoeConfig, seed: int) -> nn.Module:
    """The model in bf16; matrices are normal, scaled by their input width, norms are one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        model: Any = OlmoeForCausalLM(config)
        model.to(torch.bfloat16)
    model.to_empty(device="cpu")
    model.model.rotary_emb = OlmoeRotaryEmbedding(config=config)
    model.tie_weights()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim < 2:
                nn.init.ones_(parameter)
            else:
                parameter.copy_(tiled(parameter.shape, 1 / math.sqrt(parameter.shape[-1]), torch.bfloat16, generator))
    found: nn.Module = model.eval()
    return found
