"""Requests of many adapters in one engine, while adapters come and go."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.serve.driving import (
    GREEDY,
    PROMPTS,
    assert_all_returned,
    continued,
    engine_of,
    finish,
    gathered,
    plain_model,
    run,
)
from tests.serve.tiny import tiny
from torch import Tensor
from transformers import PreTrainedModel

from moesaic.adapters.fingerprint import fingerprint
from moesaic.adapters.folder import AdapterLayer, Base, write_adapter
from moesaic.adapters.pool import AdapterPool
from moesaic.errors import UsageError
from moesaic.hf.experts import weights_of
from moesaic.serve.request import Output, Request, UnknownAdapterError


def write_esft(model: PreTrainedModel, folder: Path, seed: int) -> dict[str, Tensor]:
    """An adapter of three experts of each layer; returns all experts as the merged model has them."""
    torch.manual_seed(seed)
    layers, tensors, merged = {}, {}, {}
    for name, module in model.named_modules():
        if not hasattr(module, "gate_up_proj"):
            continue
        weights = weights_of(module)
        layers[name] = AdapterLayer([1, 4, 6], [0.1, 0.2, 0.3], 8)
        tensors[name] = {}
        for parameter, base in (("gate_up_proj", weights.up), ("down_proj", weights.down)):
            whole = base.detach().clone()
            whole[[1, 4, 6]] += torch.randn_like(whole[[1, 4, 6]]) * 0.3
            tensors[name][parameter] = whole[[1, 4, 6]]
            merged[f"{name}.{parameter}"] = whole
    write_adapter(folder, Base(fingerprint(model), "olmoe", "tiny"), layers, tensors, {})
    return merged


def merged_model(merged: dict[str, Tensor]) -> PreTrainedModel:
    model = tiny("olmoe", attn_implementation="eager", experts_implementation="eager")
    with torch.no_grad():
        for name, tensor in merged.items():
            model.get_parameter(name).copy_(tensor)
    return model


@dataclass
class Served:
    """A model with room for two adapters, the folders of three, and what each says to the prompts."""

    pool: AdapterPool
    folders: dict[str, Path]
    merged: dict[str | None, PreTrainedModel]

    def says(self, name: str | None, prompt: tuple[int, ...], length: int) -> tuple[int, ...]:
        return continued(self.merged[name], prompt, length)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("adapters")
    model = tiny("olmoe", experts_implementation="moesaic")
    merged: dict[str | None, PreTrainedModel] = {None: plain_model("olmoe")}
    for seed, name in enumerate(("poet", "critic", "clerk")):
        merged[name] = merged_model(write_esft(model, folder / name, seed))
    pool = AdapterPool(model, max_slots=6)
    yield Served(pool, {name: folder / name for name in merged if name}, merged)
    pool.close()


def test_adapters_come_and_go_while_requests_run(served: Served) -> None:
    prompt, pool = PROMPTS[5], served.pool
    pool.load("poet", served.folders["poet"])
    engine = engine_of(adapters=pool, token_budget=50)
    engine.add(Request("p", prompt, GREEDY, adapter="poet"))
    engine.add(Request("b", prompt, GREEDY))
    outputs = engine.step() + engine.step()
    engine.publish_adapter(pool.prepare("critic", served.folders["critic"]))
    engine.add(Request("c", prompt, GREEDY, adapter="critic"))
    assert engine.stats().adapters == {"poet": 1, "critic": 1}
    assert engine.stats().slots_used == 2 * 6

    engine.unload_adapter("poet")  # it goes when its request has ended
    with pytest.raises(UnknownAdapterError, match="no adapter 'poet'"):
        engine.add(Request("late", prompt, GREEDY, adapter="poet"))
    with pytest.raises(UnknownAdapterError):
        engine.unload_adapter("poet")
    assert pool.names() == ["poet", "critic"]
    found = {name: output.token_ids for (name, _), output in gathered(outputs + finish(engine)).items()}
    expected = {name[0]: served.says(name, prompt, 24) for name in ("poet", "critic")} | {
        "b": served.says(None, prompt, 24)
    }
    assert found == expected
    assert len(set(expected.values())) == 3
    assert pool.names() == ["critic"]
    stats = engine.stats()
    assert stats.slots_used == 2 * 3
    computed = 3 * (len(prompt) + 24 - 1)
    assert all(len(counts) == 8 and sum(counts) == 2 * computed for counts in stats.expert_load.values())
    engine.unload_adapter("critic")
    assert pool.names() == []


def test_an_adapter_under_an_old_name_has_nothing_of_the_old_ones_pages(served: Served) -> None:
    engine = engine_of(adapters=served.pool)
    for name in ("poet", "clerk"):
        engine.publish_adapter(served.pool.prepare("guest", served.folders[name]))
        for cached in (0, 48):
            output = run(engine, Request("a", PROMPTS[5], GREEDY, adapter="guest"))["a", 0]
            assert (output.token_ids, output.cached_tokens) == (served.says(name, PROMPTS[5], 24), cached)
        engine.unload_adapter("guest")


names = st.sampled_from(["poet", "critic", "clerk"])
actions = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.one_of(names, st.none()), st.integers(2, 6)),
        st.tuples(st.just("load"), names, st.just(0)),
        st.tuples(st.just("unload"), names, st.just(0)),
        st.tuples(st.just("cancel"), st.none(), st.integers(0, 20)),
        st.tuples(st.just("step"), st.none(), st.integers(1, 6)),
    ),
    max_size=30,
)


@settings(max_examples=12)
@given(actions, st.integers(10, 30))
def test_whatever_happens(served: Served, actions: list[tuple[str, str | None, int]], pages: int) -> None:
    engine = engine_of(pages=pages, adapters=served.pool, token_budget=40)
    expected: dict[str, tuple[int, ...]] = {}
    outputs: list[Output] = []
    for number, (action, name, value) in enumerate(actions):
        try:
            if action == "add":
                engine.add(Request(str(number), PROMPTS[value], GREEDY, adapter=name))
                expected[str(number)] = served.says(name, PROMPTS[value], 24)
            elif action == "load" and name:
                engine.publish_adapter(served.pool.prepare(name, served.folders[name]))
            elif action == "unload" and name:
                engine.unload_adapter(name)
        except UsageError:  # not loaded, loaded already, or no room: nothing has changed
            continue
        if action == "cancel":
            engine.cancel(str(value))
        elif action == "step":
            outputs += [output for _ in range(value) for output in engine.step()]
    found = gathered(outputs + finish(engine))
    assert {name for name, _ in found} == set(expected)
    for (name, _), output in found.items():
        assert output.token_ids == expected[name][: len(output.token_ids)]
        assert output.finish_reason == "cancelled" or len(output.token_ids) == 24
    assert_all_returned(engine)
    for name in served.pool.names():
        engine.unload_adapter(name)
    assert engine.stats().slots_used == 0
    assert engine.stats().pages_used == 0
