"""Batch isolation: the same bits whoever shares the batch, whatever is cached, however prompts are cut."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.adapters.lora_models import random_lora
from tests.adapters.test_pool import write
from tests.experts.native.problems import needs_library
from tests.serve.tiny import CONFIGS, VOCABULARY, byte_tokenizer, tiny
from torch import Tensor
from torch.nn import functional as F

from moesaic.adapters.lora_format import save_lora
from moesaic.adapters.pool import AdapterPool
from moesaic.errors import UnsupportedError
from moesaic.serve import isolation
from moesaic.serve.engine import Engine
from moesaic.serve.request import EngineSettings, Request, SamplingParams
from moesaic.serve.sampling import Sampled, Sampler, SamplingState

pytestmark = needs_library
Rows = dict[tuple[int, int], Tensor]


class _Recorder(Sampler):
    """Keeps the logits that each continuation's tokens were drawn from, by the id of its state."""

    def __init__(self) -> None:
        self.rows: dict[int, list[Tensor]] = defaultdict(list)
        self.kept: list[SamplingState] = []

    def sample(self, logits_SV: Tensor, states: list[SamplingState]) -> list[Sampled]:
        for row, state in zip(logits_SV, states, strict=True):
            self.rows[id(state)].append(row.clone())
            self.kept.append(state)  # ids of objects that are gone are given again
        return super().sample(logits_SV, states)


def engine_of(family: str, dtype: torch.dtype = torch.float32, **settings: object) -> Engine:
    model = tiny(family, experts_implementation="moesaic").to(dtype)
    return Engine(model, byte_tokenizer(), EngineSettings(**{"max_context": 288, **settings}))  # type: ignore[arg-type]


def logits_of(engine: Engine, probe: Request, mates: Iterator[Request] | None = None) -> tuple[list[int], Tensor]:
    """The tokens of ``probe`` and the logits that they were drawn from, while ``mates`` come and go."""
    recorder = _Recorder()
    engine._sampler = recorder
    engine.add(probe)
    (continuation,) = engine._flights[probe.id].open.values()
    state = continuation.state
    tokens: list[int] = []
    while not tokens or probe.id in engine._flights:
        if mates is not None and (mate := next(mates, None)) is not None:
            engine.add(mate)
        for output in engine.step():
            if output.request_id == probe.id:
                tokens += output.token_ids
    while engine.has_work:
        for request_id in list(engine._flights):
            engine.cancel(request_id)
        engine.step()
    return tokens, torch.stack(recorder.rows[id(state)])


def crowd(seed: int, prompt: list[int]) -> Iterator[Request]:
    """Requests that come at random: long and short, some with the probe's own beginning, some cut off by others."""
    rng = random.Random(seed)
    for index in range(10_000):
        ids = [rng.randrange(VOCABULARY) for _ in range(rng.choice([1, 3, 16, 33, 120]))]
        if rng.random() < 0.3:
            ids = prompt[: rng.randrange(1, len(prompt))] + ids
        params = SamplingParams(max_tokens=rng.choice([1, 5, 30]), seed=index, ignore_eos=True)
        yield Request(f"mate-{index}", ids, params)


PROMPT = [7 * i % 251 for i in range(53)]
LATE_PROBE = Request("probe", PROMPT[:9], SamplingParams(max_tokens=50, seed=5, ignore_eos=True))
PROBE = Request("probe", PROMPT, SamplingParams(max_tokens=12, seed=5, ignore_eos=True))


@pytest.mark.parametrize("family", CONFIGS)
def test_logits_do_not_depend_on_the_batch(family: str) -> None:
    tokens, alone = logits_of(engine_of(family), PROBE)
    assert len(tokens) == 12 and len(set(tokens)) > 1
    # The same engine again finds the prompt in its prefix tree; small pools preempt; small budgets cut prompts.
    for settings in ({}, {"token_budget": 23}, {"max_batch": 5, "token_budget": 61}, {"prefix_sharing": False}):
        engine = engine_of(family, **settings)
        for seed in range(2):
            others, together = logits_of(engine, PROBE, crowd(seed, PROMPT))
            assert others == tokens
            assert torch.equal(alone, together), (family, settings, seed)


def test_logits_do_not_depend_on_preemption() -> None:
    tokens, alone = logits_of(engine_of("olmoe"), LATE_PROBE)
    token_bytes = 2 * 2 * (8 + 8) * 4  # layers, heads, widths of keys and values, float32
    engine = engine_of("olmoe", kv_bytes=16 * token_bytes * 10, max_context=120, token_budget=64)
    growing = SamplingParams(max_tokens=60, seed=1, ignore_eos=True)
    for _ in range(2):
        mates = (Request(f"mate-{index}", [index % 250, 1, 2], growing) for index in range(10_000))
        others, together = logits_of(engine, LATE_PROBE, mates)
        assert others == tokens and torch.equal(alone, together)
    assert engine.stats().preemptions


@pytest.mark.parametrize("family", ["moesaic", "gpt_oss"])
def test_logits_do_not_depend_on_the_adapters_of_others(family: str, tmp_path: Path) -> None:
    model = tiny(family, experts_implementation="moesaic")
    folders = {f"esft-{seed}": write(model, tmp_path / f"esft-{seed}", seed) for seed in range(3)}
    for seed, rank in enumerate((2, 9, 20)):
        lora = random_lora(model, rank=rank, seed=seed)
        folders[f"lora-{seed}"] = save_lora(tmp_path / f"lora-{seed}", lora, model)
    alone = {}
    for name in (None, "esft-1", "lora-1"):
        engine = adapted(family, {name: folders[name]} if name else {})
        alone[name] = logits_of(engine, replace(PROBE, adapter=name))
    assert not torch.equal(alone[None][1], alone["esft-1"][1]) and not torch.equal(alone[None][1], alone["lora-1"][1])
    # Loaded in other orders, so that the same adapter lies in other slots; and beside what was there and is gone.
    engine = adapted(family, folders)
    other = adapted(family, dict(reversed(folders.items())))
    other.unload_adapter("esft-2")
    for one, seed in ((engine, 1), (engine, 2), (other, 3)):
        mates = (
            replace(
                mate, adapter=random.Random(f"{seed}{mate.id}").choice([None, "esft-0", "esft-1", "lora-1", "lora-2"])
            )
            for mate in crowd(seed, PROMPT)
        )
        for name, (tokens, wanted) in alone.items():
            others, together = logits_of(one, replace(PROBE, adapter=name), mates)
            assert others == tokens
            assert torch.equal(together, wanted), (name, seed)


def adapted(family: str, folders: Mapping[str, Path]) -> Engine:
    model = tiny(family, experts_implementation="moesaic")
    pool = AdapterPool(model)
    for name, folder in folders.items():
        pool.load(name, folder)
    return Engine(model, byte_tokenizer(), EngineSettings(max_context=288, token_budget=90), adapters=pool)


@pytest.mark.parametrize("threads", [1, 3])
def test_bfloat16_by_option(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for family in ("olmoe", "gpt_oss", "moesaic"):
            tokens, alone = logits_of(engine_of(family, torch.bfloat16, isolate=True), PROBE)
            others, together = logits_of(
                engine_of(family, torch.bfloat16, isolate=True, token_budget=50), PROBE, crowd(1, PROMPT)
            )
            assert others == tokens and torch.equal(alone, together)
    finally:
        torch.set_num_threads(before)


def test_without_isolation_bits_do_depend_on_the_batch() -> None:
    # Else the tests above would hold for a reason that isolation has no part in.
    _, alone = logits_of(engine_of("llama", isolate=False), PROBE)
    _, together = logits_of(engine_of("llama", isolate=False), PROBE, crowd(0, PROMPT))
    torch.testing.assert_close(alone[0], together[0], rtol=1e-4, atol=1e-4)
    assert not torch.equal(alone, together)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("width", [8, 33, 2048])
def test_functions_row_by_row(width: int, threads: int) -> None:
    functions = [F.silu, F.softplus, torch.sigmoid, torch.rsqrt, lambda x: F.gelu(x, approximate="tanh")]
    functions += [lambda x: x**1.7, lambda x: x.softmax(-1), lambda x: x.pow(2).mean(-1), lambda x: x.exp().sum(-1)]
    functions += [F.gelu, torch.cos, torch.log, lambda x: F.rms_norm(x, x.shape[-1:]), lambda x: x / (x + 3)]
    functions += [lambda x: (x[:, :1, None] @ x.new_ones(len(x), 1, 7)).cos()]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.rand(700, width, generator=torch.Generator().manual_seed(width)).to(dtype) * 9
            for function in functions:
                with isolation.isolated():
                    together = function(x)
                    for first, rows in ((0, 1), (13, 2), (100, 7), (279, 1), (349, 3), (693, 7)):
                        part = function(x[first : first + rows].clone())
                        assert torch.equal(part, together[first : first + rows])
                torch.testing.assert_close(together, function(x))
    finally:
        torch.set_num_threads(before)


def test_what_cannot_be_isolated_is_refused() -> None:
    with isolation.isolated(), pytest.raises(UnsupportedError, match="only products with one matrix"):
        torch.ones(3, 4, 5) @ torch.ones(3, 5, 6)
    with isolation.isolated(), pytest.raises(UnsupportedError, match="einsum cannot be isolated"):
        torch.einsum("ij,jk->ik", torch.ones(3, 4), torch.ones(4, 5))
    model = tiny("llama").double()
    assert "float32, bfloat16 and float16" in str(isolation.refusal(model))
    with pytest.raises(UnsupportedError, match="cannot be isolated"):
        Engine(model, byte_tokenizer(), EngineSettings(isolate=True))


@pytest.mark.parametrize(("family", "watched"), [("olmoe", False), ("moesaic", False), ("llama", True)])
def test_functions_are_watched_only_where_some_have_to_be_replaced(family: str, watched: bool) -> None:
    model = tiny(family, experts_implementation="moesaic")
    Engine(model, byte_tokenizer(), EngineSettings(max_context=64))  # its linear layers run on the native kernels now
    ids = torch.zeros(1, 1, dtype=torch.int64)
    model.set_attn_implementation("eager")
    layer = model.model.layers[0]
    with torch.inference_mode():
        hidden = model.model.embed_tokens(ids)
        assert isolation.needs_no_functions(lambda: layer.mlp(hidden)) is not watched
