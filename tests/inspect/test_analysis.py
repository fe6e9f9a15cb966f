"""The report as data: its keys, and that its numbers are finite and agree with each other and with the trace."""

from __future__ import annotations

import json
import math
import re
from typing import Any

import numpy as np
import pytest
from tests.inspect.traces import made_up_trace

from moesaic.inspect import RoutingTrace, analysis, analyze
from moesaic.inspect.examples import CONTEXT

SHAPES: dict[str, dict[str, Any]] = {
    "several layers and domains": {},
    "one of everything": {"layers": [(1, 1)], "domains": ["only"], "passages_per_domain": 1, "tokens_per_passage": 1},
    "different layers, empty slots": {
        "layers": [(8, 2), (4, 1), (16, 4)],
        "domains": ["a", "b", "c"],
        "null_share": 0.4,
        "numbers": [1, 2, 5],
    },
    "no slot has an expert": {"null_share": 1.0},
    "no slot has an expert, by choice": {"null_share": 1.0, "adaptive": True},
    "numbers vary": {"null_share": 0.5, "adaptive": True, "numbers": [0, 0, 3]},
    "experts that compute nothing": {"zero_computation": ["zero", "copy", "constant", "constant"]},
}


def numbers(value: object) -> list[float]:
    if isinstance(value, dict):
        return [number for inner in value.values() for number in numbers(inner)]
    if isinstance(value, list):
        return [number for inner in value for number in numbers(inner)]
    return [value] if isinstance(value, int | float) else []


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_everything_is_finite_json(shape: dict[str, Any]) -> None:
    report = analyze(made_up_trace(**shape))
    assert all(math.isfinite(number) for number in numbers(report))
    assert json.loads(json.dumps(report, allow_nan=False)) == report


LAYER_KEYS = """
number label name experts top_k zero_computation load load_by_domain token_share token_share_by_domain imbalance
variation idle_experts empty_slots dropped_slots entropy entropy_by_domain entropy_source domain_information
specialization domain_mix token_consistency top_tokens examples experts_per_token locality similarity
"""


def test_the_documented_keys() -> None:
    report = analyze(made_up_trace())
    assert set(report) == {"format", "model", "data", "experts_per_token", "locality", "layers", "transitions"}
    assert set(report["model"]) == {"name", "architecture", "num_layers", "total_parameters", "active_parameters"}
    assert set(report["data"]) == {"tokens", "domains"}
    assert set(report["transitions"][0]) == {"from", "to", "information", "affinity", "counts", "probabilities"}
    layer = report["layers"][0]
    assert set(layer) == set(LAYER_KEYS.split())
    spent = {"varies", "mean", "spread", "free", "by_kind"}
    assert set(report["experts_per_token"]) == spent
    assert set(layer["experts_per_token"]) == {*spent, "sparsity"}
    assert set(layer["experts_per_token"]["sparsity"]) == {"token", "chunk"}
    of_kind = {"tokens", "mean", "spread", "free"}
    assert set(layer["experts_per_token"]["by_kind"]["word"]) == of_kind
    assert set(layer["locality"]) == {"segments", "caches", "experts"}
    assert set(report["locality"]) == {"segments", "caches"}
    assert set(report["locality"]["segments"]["16"]) == {"performance", "size"}
    assert set(report["transitions"][0]["affinity"]) == {"share", "chance"}
    assert set(layer["token_consistency"]) == {"share", "chance", "tokens"}
    assert set(layer["top_tokens"][0][0]) == {"token", "text", "count", "lift"}
    example_keys = {"position", "domain", "document", "weight", "before", "text", "after"}
    assert set(layer["examples"][0][0]) == example_keys
    documented = f"{analysis.analyze.__doc__} {analysis._layer.__doc__}"
    assert all(re.search(rf"\b{key}\b", documented) for key in [*report, *layer, *example_keys, *spent, *of_kind])


@pytest.fixture(scope="module")
def trace() -> RoutingTrace:
    return made_up_trace([(8, 2), (4, 1), (16, 4)], ("a", "b", "c"), null_share=0.2, numbers=[1, 2, 5])


@pytest.fixture(scope="module")
def report(trace: RoutingTrace) -> dict[str, Any]:
    return analyze(trace)


def test_shares_count_tokens(trace: RoutingTrace, report: dict[str, Any]) -> None:
    assert report["data"]["tokens"] == trace.num_tokens == sum(d["tokens"] for d in report["data"]["domains"])
    for layer, traced in zip(report["layers"], trace.layers, strict=True):
        assert sum(layer["load"]) == pytest.approx(1, abs=1e-4)
        assert layer["empty_slots"] == (traced.expert_ids == traced.num_experts).sum() == layer["dropped_slots"]
        for e in range(layer["experts"]):
            taken = (traced.expert_ids == e).any(axis=1)
            assert layer["token_share"][e] == pytest.approx(taken.mean(), abs=1e-5)
            for d, name in enumerate(trace.domains):
                share = taken[trace.domain_ids == d].mean()
                assert layer["token_share_by_domain"][name][e] == pytest.approx(share, abs=1e-5)


def test_transitions_join_neighbours(report: dict[str, Any]) -> None:
    assert [(t["from"], t["to"]) for t in report["transitions"]] == [(1, 2), (2, 5)]
    assert np.shape(report["transitions"][1]["probabilities"]) == (4, 16)


def test_the_nearest_experts(trace: RoutingTrace) -> None:
    cosines = np.array([[1.0, 0.2, -0.4, 0.6], [0.2, 1.0, 0.7, 0.1], [-0.4, 0.7, 1.0, 0.3], [0.6, 0.1, 0.3, 1.0]])
    trace.layers[1].similarity = {"outputs": cosines}
    similarity = analyze(trace)["layers"][1]["similarity"]
    assert similarity["outputs"]["mean"] == pytest.approx((0.2 - 0.4 + 0.6 + 0.7 + 0.1 + 0.3) / 6)
    expected = [{"expert": e, "cosine": c} for e, c in ((3, 0.6), (2, 0.7), (1, 0.7), (0, 0.6))]
    assert similarity["outputs"]["nearest"] == expected
    trace.layers[1].similarity = {}


def test_examples_show_the_experts_own_tokens(trace: RoutingTrace, report: dict[str, Any]) -> None:
    shown = 0
    for layer, traced in zip(report["layers"], trace.layers, strict=True):
        for expert, examples in enumerate(layer["examples"]):
            tops = [top["token"] for top in layer["top_tokens"][expert]]
            assert len(examples) == min(6, len(tops))
            for token, example in zip(tops, examples, strict=False):
                position = example["position"]
                passage = trace.passage_of(position)
                slot = traced.expert_ids[position].tolist().index(expert)
                start, stop = trace.spans[position]
                assert trace.token_ids[position] == token
                assert example["weight"] == pytest.approx(traced.weights[position, slot], abs=1e-5)
                assert (example["domain"], example["document"]) == (passage.domain, passage.document)
                assert example["text"] == passage.text[start:stop]
                assert passage.text[:start].endswith(example["before"])
                assert passage.text[stop:].startswith(example["after"])
                assert len(example["before"]) == min(start, CONTEXT)
                shown += 1
    assert shown > 50


def test_examples_come_from_different_passages(trace: RoutingTrace, report: dict[str, Any]) -> None:
    for layer in report["layers"]:
        for examples in layer["examples"]:
            first = [trace.passage_ids[example["position"]] for example in examples[:3]]
            assert len(set(first)) == len(first)
