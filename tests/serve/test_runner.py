"""Steps over pages give the logits of transformers' own forward, for many families of models."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from tests.serve.tiny import CONFIGS, VOCABULARY, tiny
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    DogeConfig,
    GPTJConfig,
    Lfm2Config,
    Llama4TextConfig,
    LlamaConfig,
    MambaConfig,
    PhimoeConfig,
    PreTrainedModel,
    Qwen3NextConfig,
    T5Config,
)

from moesaic.errors import ConfigError, UnsupportedError
from moesaic.experts.native import attention as native
from moesaic.serve import model as serve_model
from moesaic.serve.cache import free_memory, make_pools, num_pages
from moesaic.serve.load import ExpertLoad
from moesaic.serve.model import KVShape, context_limit, prepare
from moesaic.serve.runner import Runner
from moesaic.serve.scheduler import Chunk
from moesaic.serve.sequence import Sequence

PAGE = 16


def runner_of(model: PreTrainedModel, pages: int) -> Runner:
    layers = prepare(model, 512)
    return Runner(model, make_pools(layers, pages, PAGE), PAGE)


def sequences_of(lengths: list[int], pages: int, rng: np.random.Generator) -> list[Sequence]:
    """Sequences with random tokens, and pages anywhere."""
    free = rng.permutation(pages).tolist()
    found = []
    for order, length in enumerate(lengths):
        each = Sequence((order, 0), rng.integers(0, VOCABULARY, length), None, length)
        for _ in range(-(-length // PAGE)):
            each.add_page(free.pop())
        found.append(each)
    return found


def random_steps(sequences: list[Sequence], rng: np.random.Generator) -> list[list[Chunk]]:
    steps = []
    while open_ := [each for each in sequences if each.pending]:
        chosen = rng.permutation(len(open_))[: rng.integers(1, len(open_) + 1)]
        chunks = []
        for each in (open_[index] for index in chosen):
            count = int(rng.integers(1, min(each.pending, 30) + 1))
            chunks.append(Chunk(each, each.computed, count, last=bool(rng.integers(2)) or count == each.pending))
            each.computed += count
        steps.append(chunks)
    return steps


def whole(model: PreTrainedModel, sequence: Sequence) -> Tensor:
    with torch.no_grad():
        ids = torch.from_numpy(sequence.tokens(0, sequence.length))[None]
        logits: Tensor = model(input_ids=ids, use_cache=False).logits[0]
    return logits


@pytest.mark.parametrize("native_attention", [True, False], ids=["native", "reference"])
@pytest.mark.parametrize("family", CONFIGS)
def test_logits_are_those_of_the_plain_forward(
    family: str, native_attention: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not native_attention:
        monkeypatch.setattr(native, "refusal", lambda *_: "not today")
    plain = tiny(family, attn_implementation="eager", experts_implementation="eager")
    model = copy.deepcopy(plain)
    model.set_experts_implementation("moesaic")
    runner = runner_of(model, pages=20)
    rng = np.random.default_rng(len(family))
    sequences = sequences_of([1, 16, 35, 50, 64], 20, rng)
    expected = {each: whole(plain, each) for each in sequences}
    compared = 0
    for chunks in random_steps(sequences, rng):
        logits = runner.run(chunks, [0] * len(chunks))
        ends = [(chunk.sequence, chunk.start + chunk.count - 1) for chunk in chunks if chunk.last]
        assert logits.shape == (len(ends), VOCABULARY)
        for row, (each, position) in zip(logits, ends, strict=True):
            torch.testing.assert_close(row, expected[each][position], rtol=1e-5, atol=1e-5)
            compared += 1
    assert compared >= 5


def test_a_model_that_computes_all_logits_gives_those_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    rng = np.random.default_rng(0)
    sequences = sequences_of([5, 9], 4, rng)
    chunks = [Chunk(each, 0, each.length, last=each.length == 9) for each in sequences]
    runner = runner_of(model, pages=4)
    few = runner.run(chunks, [0, 0])
    monkeypatch.setattr(runner, "_keeps_rows", False)
    torch.testing.assert_close(runner.run(chunks, [0, 0]), few)
    assert few.shape == (1, VOCABULARY)


@pytest.mark.parametrize("family", ["olmoe", "moesaic"])
def test_rows_of_experts_are_counted(family: str) -> None:
    model = tiny(family, experts_implementation="moesaic")
    runner, load = runner_of(model, pages=20), ExpertLoad(model)
    rng = np.random.default_rng(0)
    assert all(sum(counts) == 0 for counts in load.by_layer().values())
    for chunks in random_steps(sequences_of([20, 30], 20, rng), rng):
        runner.run(chunks, [0] * len(chunks))
        load.add()
    layers = load.by_layer()
    assert len(layers) == 2
    assert all(len(counts) == 8 and sum(counts) == 2 * 50 for counts in layers.values())


SMALL = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (MambaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, state_size=4), "recurrent state"),
        (Qwen3NextConfig(**SMALL, num_experts=2, num_experts_per_tok=1), "recurrent state|'linear_attention'"),
        (Lfm2Config(**SMALL, num_key_value_heads=1, layer_types=["conv", "full_attention"]), "recurrent state|'conv'"),
        (Llama4TextConfig(**SMALL, num_key_value_heads=1, num_local_experts=2), "'chunked_attention'"),
        (PhimoeConfig(**SMALL, num_key_value_heads=1, num_local_experts=2, sliding_window=12), "the sliding window"),
        (GPTJConfig(vocab_size=32, n_embd=16, n_layer=1, n_head=2, rotary_dim=4), "attention interface"),
        (DogeConfig(**SMALL, num_key_value_heads=1), "a bias or a mask of its own"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else "",
)
def test_state_of_other_kinds_is_refused(config: object, reason: str) -> None:
    with pytest.raises(UnsupportedError, match=reason):
        prepare(AutoModelForCausalLM.from_config(config), 512)


def test_an_encoder_with_a_decoder_is_refused() -> None:
    config = T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    with pytest.raises(UnsupportedError, match="encoder with a decoder"):
        prepare(AutoModelForSeq2SeqLM.from_config(config), 512)


def test_layers_on_several_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = {
        module: KVShape(1, 8, 8, torch.float32, torch.device(device), 0)
        for module, device in zip((torch.nn.Identity(), torch.nn.Identity()), ("cpu", "meta"), strict=True)
    }
    monkeypatch.setattr(serve_model, "_attention_layers", lambda _: shapes)
    with pytest.raises(UnsupportedError, match=r"several devices \(cpu, meta\)"):
        prepare(llama(), 64)


def llama(**options: object) -> PreTrainedModel:
    return AutoModelForCausalLM.from_config(LlamaConfig(**SMALL, max_position_embeddings=64, **options))  # type: ignore[no-any-return]


def test_the_context_is_the_models_or_less() -> None:
    assert context_limit(llama(), None) == 64
    assert context_limit(llama(), 20) == 20
    with pytest.raises(ConfigError, match="the model has 64 positions"):
        context_limit(llama(), 65)
    with pytest.raises(ConfigError, match="max_context is 1"):
        context_limit(llama(), 1)


def test_positions_that_depend_on_the_batch_are_refused() -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 32}
    model = llama(rope_parameters=rope)
    assert context_limit(model, 32) == 32
    with pytest.raises(UnsupportedError, match="depends on the longest sequence"):
        context_limit(model, None)


def test_the_cache_is_as_large_as_it_is_told() -> None:
    layers = prepare(llama(), 64)
    page = 2 * PAGE * 2 * 2 * 8 * 4  # two layers, keys and values, two heads of 8
    assert num_pages(layers, PAGE, 5 * page + 1, max_batch=4, context=64) == 5
    assert num_pages(layers, PAGE, None, max_batch=4, context=64) == 16
    with pytest.raises(ConfigError, match=f"which has {page} bytes"):
        num_pages(layers, PAGE, page - 1, max_batch=4, context=64)
    assert free_memory(torch.device("cpu")) > 1 << 20
