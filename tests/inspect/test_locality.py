"""Local routing consistency against its definitions, spelled out in loops."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from tests.inspect.traces import made_up_trace

from moesaic.inspect import locality
from moesaic.inspect.locality import LayerLocality


@pytest.fixture(params=[0, 1, 2])
def random(request: pytest.FixtureRequest) -> np.random.Generator:
    return np.random.default_rng(request.param)


def routes(random: np.random.Generator, tokens: int = 60, experts: int = 7, top_k: int = 2) -> np.ndarray:
    """Tokens that often take what the one before took; some take fewer experts."""
    used = np.zeros((tokens, experts), dtype=bool)
    chosen = random.permutation(experts)[:top_k]
    for t in range(tokens):
        if random.random() < 0.4:
            chosen = random.permutation(experts)[:top_k]
        used[t, chosen] = True
        if random.random() < 0.1:
            used[t, chosen[0]] = False
    return used


EDGES = [(0, 25), (25, 28), (28, 60)]


def best_f1(counts: list[int], m: int) -> tuple[float, float]:
    """The largest F1 score over every way to open or close each pair of expert and segment, and the size of it."""
    best = (0.0, 0.0)
    for opened in itertools.product((0, 1), repeat=len(counts)):
        true = sum(f for f, o in zip(counts, opened, strict=True) if o)
        false = sum(m - f for f, o in zip(counts, opened, strict=True) if o)
        missed = sum(f for f, o in zip(counts, opened, strict=True) if not o)
        score = 2 * true / (2 * true + false + missed) if true else 0.0
        if score > best[0] + 1e-12:
            best = (score, m * sum(opened) / (true + missed))
    return best


def test_no_segment_router_is_better(random: np.random.Generator) -> None:
    """All 2^n of them, of one expert, and of a group."""
    for m in (3, 4, 5):
        used, edges = routes(random, 10, 3, 1), [(0, 5), (5, 10)]
        counts = [
            [int(used[p : p + m, e].sum()) for start, stop in edges for p in range(start, stop - m + 1)]
            for e in range(3)
        ]
        histogram = locality.segment_histogram(used, edges, m)
        for e in range(3):
            assert histogram[e].tolist() == [counts[e].count(f) for f in range(m + 1)]
            assert locality.expert_routing(histogram)[e] == pytest.approx(best_f1(counts[e], m)[0])
        group = counts[0] + counts[1]
        found = locality.segment_routing(histogram[:2].sum(axis=0))
        assert found.performance == pytest.approx(best_f1(group, m)[0])


def test_the_size_is_that_of_the_best_router() -> None:
    # Two segments of two tokens: one taken by both, one by one of two experts' tokens.
    found = locality.segment_routing(np.array([4, 1, 3]))
    scores = {a: 2 * true / (2 * opened + 7) for a, true, opened in ((1, 7, 4), (2, 6, 3))}
    best = max(scores, key=lambda a: scores[a])
    assert found.performance == pytest.approx(scores[best])
    assert found.size == pytest.approx(2 * {1: 4, 2: 3}[best] / 7)


def test_segments_of_one_token_are_routed_exactly(random: np.random.Generator) -> None:
    found = locality.segment_routing(locality.segment_histogram(routes(random), EDGES, 1).sum(axis=0))
    assert (found.performance, found.size) == (1, 1)


def test_without_segments_or_experts_there_is_nothing() -> None:
    nobody = np.zeros((10, 3), dtype=bool)
    for m in (4, 64):
        found = locality.segment_routing(locality.segment_histogram(nobody, [(0, 10)], m).sum(axis=0))
        assert (found.performance, found.size) == (0, 0)
    assert locality.cache_hits(nobody, [(0, 10)], [1]).tolist() == [0]


def hits_of_one(used: np.ndarray, size: int, future: int) -> int:
    """One passage, one cache, one eviction at a time."""
    cache: list[int] = []
    last: dict[int, int] = {}
    hits = 0
    for t, row in enumerate(used):
        needed = [int(e) for e in np.flatnonzero(row)]
        room = size - len(cache)
        for e in needed:
            if e in cache:
                hits += 1
            elif room:
                hits += 1
                room -= 1
        cache += [e for e in needed if e not in cache]
        last |= dict.fromkeys(needed, t)
        while len(cache) > size:
            rest = [e for e in cache if e not in needed]
            soon = {e: int(used[t + 1 : t + 1 + future, e].sum()) for e in rest}
            cache.remove(min(rest, key=lambda e: (soon[e], last[e], e)))
    return hits


@pytest.mark.parametrize("future", [1, 4, 16])
def test_cache_hits(random: np.random.Generator, future: int) -> None:
    used = routes(random)
    sizes = [2, 3, 5, 7]
    expected = [sum(hits_of_one(used[a:b], size, future) for a, b in EDGES) for size in sizes]
    assert locality.cache_hits(used, EDGES, sizes, future).tolist() == expected


def test_a_cache_of_all_experts_always_hits(random: np.random.Generator) -> None:
    used = routes(random)
    assert locality.cache_hits(used, EDGES, [7]).tolist() == [used.sum()]


def test_sizes_of_caches() -> None:
    used = np.array([[1, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0]], dtype=bool)
    assert [locality.cache_size(used, ratio) for ratio in (0.5, 1, 2, 2.5, 9)] == [3, 3, 4, 5, 6]


def test_the_whole_is_the_sum_of_its_layers() -> None:
    trace = made_up_trace([(6, 2), (4, 1)], null_share=0.1)
    edges = [(passage.start, passage.stop) for passage in trace.passages]
    layers = [LayerLocality.of(layer, edges) for layer in trace.layers]
    report = locality.whole(layers)
    used = [locality.used(layer) for layer in trace.layers]
    for layer, one in zip(trace.layers, used, strict=True):
        for e in range(layer.num_experts):
            assert (one[:, e] == (layer.expert_ids == e).any(axis=1)).all()
    joined = np.concatenate(used, axis=1)
    for m, found in report["segments"].items():
        together = locality.segment_routing(locality.segment_histogram(joined, edges, int(m)).sum(axis=0))
        assert found == {"performance": together.performance, "size": together.size}
    for ratio, rate in report["caches"].items():
        hits = sum(
            hits_of_one(one[a:b], locality.cache_size(one, int(ratio)), locality.FUTURE)
            for one in used
            for a, b in edges
        )
        assert rate == pytest.approx(hits / joined.sum())
