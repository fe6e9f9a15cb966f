"""Experts per token by kind: against loops over tokens."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from tests.inspect.traces import made_up_trace

from moesaic.inspect import LayerTrace, RoutingTrace, analyze, spending_table
from moesaic.inspect.findings import Finding, find, most_and_least
from moesaic.inspect.kinds import KINDS, token_kinds
from moesaic.inspect.spending import (
    chunk_sparsity,
    experts_taken,
    free_taken,
    of_all,
    spending,
    token_sparsity,
    varies,
)
from moesaic.routing import Routing
from moesaic.routing import locality as routing_locality

ADAPTIVE: dict[str, Any] = {"null_share": 0.4, "adaptive": True, "zero_computation": ["zero", "copy"]}


@pytest.fixture(scope="module")
def trace() -> RoutingTrace:
    return made_up_trace([(6, 3), (4, 4), (4, 4)], numbers=[1, 2, 2], **ADAPTIVE)


def test_experts_are_counted_apart_from_those_that_compute_nothing(trace: RoutingTrace) -> None:
    for layer in trace.layers:
        taken, free = experts_taken(layer), free_taken(layer)
        for n, ids in enumerate(layer.expert_ids.tolist()):
            assert taken[n] == sum(id_ < layer.num_experts for id_ in ids)
            assert free[n] == sum(layer.num_experts <= id_ < layer.num_experts + 2 for id_ in ids)
        assert 0 < free.sum() < taken.sum() < layer.expert_ids.size


def test_means_and_spreads_by_kind(trace: RoutingTrace) -> None:
    kinds = [list(KINDS)[kind] for kind in token_kinds(trace)]
    report = analyze(trace)
    tables = [layer["experts_per_token"] for layer in report["layers"]] + [report["experts_per_token"]]
    per_layer = [experts_taken(layer) for layer in trace.layers]
    for taken, table in zip([*per_layer, sum(per_layer) / len(per_layer)], tables, strict=True):
        assert table["varies"]
        assert set(table["by_kind"]) == set(kinds)
        for kind, of in [*table["by_kind"].items(), (None, {**table, "tokens": len(kinds)})]:
            own = [float(n) for n, its in zip(taken, kinds, strict=True) if kind in (its, None)]
            mean = sum(own) / len(own)
            spread = math.sqrt(sum((n - mean) ** 2 for n in own) / len(own))
            assert of["tokens"] == len(own)
            assert (of["mean"], of["spread"]) == pytest.approx((mean, spread), abs=1e-5)


def test_sparsity_of_tokens_and_of_chunks(trace: RoutingTrace) -> None:
    for layer, told in zip(trace.layers, analyze(trace)["layers"], strict=True):
        token, chunk = [], []
        rows = [set(ids) - set(range(layer.num_experts, 99)) for ids in layer.expert_ids.tolist()]
        for passage in trace.passages:
            own = rows[passage.start : passage.stop]
            token += [1 - len(used) / layer.num_experts for used in own]
            for i in range(0, len(own) - 7, 8):
                chunk.append(1 - len(set().union(*own[i : i + 8])) / layer.num_experts)
        assert told["experts_per_token"]["sparsity"]["token"] == pytest.approx(np.mean(token), abs=1e-5)
        assert told["experts_per_token"]["sparsity"]["chunk"] == pytest.approx(np.mean(chunk), abs=1e-5)


def test_sparsity_is_that_of_a_routing(trace: RoutingTrace) -> None:
    for layer in trace.layers:
        for passage in trace.passages:
            ids_TK = torch.from_numpy(layer.expert_ids[passage.start : passage.stop]).clamp(max=layer.num_experts)
            routing = Routing(ids_TK, torch.ones(ids_TK.shape), torch.ones(len(ids_TK), layer.num_experts))
            own = [(passage.start, passage.stop)]
            assert chunk_sparsity(layer, own) == pytest.approx(float(routing_locality.chunk_sparsity(routing)))
        whole = torch.from_numpy(layer.expert_ids).clamp(max=layer.num_experts)
        routing = Routing(whole, torch.ones(whole.shape), torch.ones(len(whole), layer.num_experts))
        assert token_sparsity(layer) == pytest.approx(float(routing_locality.token_sparsity(routing)))


def test_passages_shorter_than_a_chunk_have_none(trace: RoutingTrace) -> None:
    assert chunk_sparsity(trace.layers[0], [(0, 7), (7, 14)]) == 0
    assert chunk_sparsity(trace.layers[0], [(0, 7), (7, 15)]) > 0


def layer_of(ids: list[list[int]], dropped: int = 0, free: int = 0) -> LayerTrace:
    expert_ids = np.asarray(ids)
    ones = np.ones(expert_ids.shape)
    return LayerTrace("l", 0, 4, expert_ids, ones, ones[:, 0], "scores", dropped, ["zero"] * free)


def test_what_varies() -> None:
    assert not varies(layer_of([[0, 1], [2, 3]]))
    assert not varies(layer_of([[0, 4], [2, 4]]))  # null slots, but as many for every token
    assert varies(layer_of([[0, 4], [2, 3]]))
    assert not varies(layer_of([[0, 4], [2, 3]], dropped=1))  # by a capacity limit
    assert varies(layer_of([[0, 4], [2, 3]], free=1))  # 4 is an expert, but computes nothing
    assert not varies(layer_of([[4, 4], [4, 4]]))


def test_of_one_kind_only() -> None:
    one = spending(np.array([1.0, 3.0]), np.array([0.0, 1.0]), np.array([0, 0]))
    assert one == {
        "mean": 2,
        "spread": 1,
        "free": 0.5,
        "by_kind": {next(iter(KINDS)): {"tokens": 2, "mean": 2, "spread": 1, "free": 0.5}},
    }


def known(null: np.ndarray, free: int = 0) -> RoutingTrace:  # type: ignore[type-arg]
    """The first layer's second slot is null where ``null`` says so, its first one a word."""
    trace = made_up_trace([(4, 2)] * 2, zero_computation=["zero"] * free, adaptive=True)
    for layer in trace.layers:
        layer.expert_ids = np.stack([np.zeros(trace.num_tokens), np.where(null, 4 + free, 1)], axis=1).astype(np.int64)
    return trace


def finding_of(trace: RoutingTrace) -> Finding | None:
    return next((each for each in find(analyze(trace)) if each.title == "Where it spends"), None)


def test_the_finding_names_kinds_and_layers() -> None:
    kinds = token_kinds(made_up_trace([(4, 2)] * 2))
    space = kinds == list(KINDS).index("space")
    trace = known(space)
    trace.layers[1].expert_ids[:, 1] = 1
    trace.layers[0].expert_ids[~space, 1] = 2
    found = finding_of(trace)
    assert found is not None
    mean = 2 - space.mean() / 2
    assert found.text.startswith(f"A token takes {mean:.1f} ± ")
    assert "least on line breaks and indentation (1.5)." in found.text
    assert found.text.endswith(f"number 1 spends most (2.0) and number 0 least ({2 - space.mean():.1f}).")


def test_no_kind_is_named_by_chance() -> None:
    even = np.arange(made_up_trace([(4, 2)] * 2).num_tokens) % 2 == 0
    found = finding_of(known(even))
    assert found is not None
    assert "It spends alike on every kind of token." in found.text
    assert finding_of(known(np.zeros_like(even))) is None  # it does not vary


def test_rare_kinds_are_passed_over() -> None:
    table = {"mean": 2.0, "by_kind": {"word": kind_of(900, 2.0), "name": kind_of(90, 2.5), "number": kind_of(15, 9.0)}}
    assert most_and_least(table, 1005) == (("name", 2.5), ("word", 2.0))
    table["by_kind"]["name"] = kind_of(90, 2.5, spread=4.0)
    assert most_and_least(table, 1005) is None


def kind_of(tokens: int, mean: float, spread: float = 0.5) -> dict[str, float]:
    return {"tokens": tokens, "mean": mean, "spread": spread, "free": 0.0}


def test_the_table(trace: RoutingTrace) -> None:
    report = analyze(trace)
    header, rows = spending_table(report)
    assert header == ["kind of token", "tokens", "experts", "±", "computing nothing"]
    assert {len(row) for row in rows} == {5}
    means = [float(row[2]) for row in rows[:-1]]
    assert means == sorted(means, reverse=True)
    whole = of_all(trace, token_kinds(trace))
    assert rows[-1] == [
        "all",
        str(trace.num_tokens),
        *(f"{whole[key]:.2f}" for key in ("mean", "spread", "free")),
    ]
    assert len(spending_table(analyze(made_up_trace()))[0]) == 4
