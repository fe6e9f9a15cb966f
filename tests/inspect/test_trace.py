"""The trace: what it holds, and its file."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from tests.inspect.traces import made_up_trace

from moesaic.errors import DataError
from moesaic.inspect import LayerTrace, RoutingTrace


@pytest.fixture
def trace() -> RoutingTrace:
    return made_up_trace(null_share=0.3, zero_computation=["zero", "copy"])


def test_a_saved_trace_comes_back(trace: RoutingTrace, tmp_path: Path) -> None:
    trace.layers[1].similarity = {"outputs": np.random.default_rng(0).random((6, 6))}
    path = trace.save(tmp_path / "trace.npz")
    again = RoutingTrace.load(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["trace.npz"]
    assert (again.model, again.passages, again.vocabulary) == (trace.model, trace.passages, trace.vocabulary)
    assert np.array_equal(again.token_ids, trace.token_ids)
    assert np.array_equal(again.spans, trace.spans)
    for mine, theirs in zip(trace.layers, again.layers, strict=True):
        for field in fields(LayerTrace):
            value, read = getattr(mine, field.name), getattr(theirs, field.name)
            if field.name == "similarity":
                assert set(read) == set(value)
                assert all(np.allclose(read[key], value[key], atol=1e-6) for key in value)
            elif isinstance(value, np.ndarray):
                assert read.dtype == value.dtype
                assert np.allclose(read, value, atol=1e-6)
            else:
                assert read == value


def test_a_trace_of_format_1_is_read(trace: RoutingTrace, tmp_path: Path) -> None:
    path = trace.save(tmp_path / "trace.npz")
    with np.load(path) as file:
        arrays = dict(file)
    about = json.loads(arrays["about"].tobytes())
    assert about["format"] == 2
    about["format"] = 1
    for layer in about["layers"]:
        del layer["zero_computation"], layer["routing"]
    arrays["about"] = np.frombuffer(json.dumps(about).encode(), dtype=np.uint8)
    np.savez(path, **arrays)
    for mine, old in zip(trace.layers, RoutingTrace.load(path).layers, strict=True):
        assert (old.zero_computation, old.routing, old.label) == ([], 0, str(mine.number))
        assert np.array_equal(old.expert_ids, mine.expert_ids)


def test_several_routings_of_one_layer_have_labels() -> None:
    trace = made_up_trace([(4, 1)] * 4, numbers=[0, 2, 2, 3])
    assert [layer.label for layer in trace.layers] == ["0", "2.1", "2.2", "3"]


@pytest.mark.parametrize("damage", ["missing", "text", "cut", "other", "newer"])
def test_what_is_no_trace_is_refused(trace: RoutingTrace, tmp_path: Path, damage: str) -> None:
    path = trace.save(tmp_path / "trace.npz")
    whole = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "text":
        path.write_text("no zip file")
    elif damage == "cut":
        path.write_bytes(whole[: len(whole) // 2])
    elif damage == "other":
        np.savez(path, x=np.zeros(3))
    else:
        np.savez(path, about=np.frombuffer(b'{"format": 99}', dtype=np.uint8))
    with pytest.raises(DataError, match="routing trace"):
        RoutingTrace.load(path)


def test_tokens_know_their_passage_and_domain(trace: RoutingTrace) -> None:
    for position in range(trace.num_tokens):
        passage = trace.passage_of(position)
        assert passage.start <= position < passage.stop
        assert trace.passages[trace.passage_ids[position]] is passage
        assert trace.domains[trace.domain_ids[position]] == passage.domain


def test_the_top_expert_has_the_largest_weight(trace: RoutingTrace) -> None:
    for layer in trace.layers:
        for ids, weights, top in zip(layer.expert_ids, layer.weights, layer.top_expert, strict=True):
            real = [(w, e) for w, e in zip(weights, ids, strict=True) if e < layer.num_experts]
            assert top == (max(real)[1] if real else layer.num_experts)
        assert (layer.top_expert == layer.num_experts).any()  # some token has no expert at all
