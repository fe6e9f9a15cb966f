"""Each metric against its definition, spelled out in loops."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest

from moesaic.inspect import metrics
from moesaic.inspect.trace import IntArray

TOKENS, EXPERTS, NEXT, SLOTS, DOMAINS = 300, 6, 5, 3, 4


@pytest.fixture(params=[0, 1, 2])
def random(request: pytest.FixtureRequest) -> np.random.Generator:
    return np.random.default_rng(request.param)


def slots(random: np.random.Generator, num_experts: int = EXPERTS, top_k: int = SLOTS) -> IntArray:
    """Different experts for each token, some slots empty, expert 0 rare."""
    ids = np.array([random.permutation(num_experts)[:top_k] for _ in range(TOKENS)], dtype=np.int64)
    ids[(ids == 0) & (random.random(ids.shape) < 0.8)] = num_experts
    ids[random.random(ids.shape) < 0.1] = num_experts
    return ids


def test_slot_counts_and_load(random: np.random.Generator) -> None:
    ids, domains = slots(random), random.integers(0, DOMAINS, TOKENS)
    counts = metrics.slot_counts(ids, domains, EXPERTS, DOMAINS)
    load = metrics.load(counts)
    for d in range(DOMAINS):
        own = [int(e) for row, domain in zip(ids, domains, strict=True) if domain == d for e in row if e < EXPERTS]
        for e in range(EXPERTS):
            assert counts[d, e] == own.count(e)
            assert load[d, e] == pytest.approx(own.count(e) / len(own))


def test_load_of_nothing_is_zero() -> None:
    assert metrics.load(np.zeros((2, 3), dtype=np.int64)).tolist() == [[0, 0, 0], [0, 0, 0]]


def test_imbalance_variation_and_idle_experts(random: np.random.Generator) -> None:
    load = metrics.load(random.integers(0, 9, EXPERTS) * np.array([0, 1, 1, 1, 1, 1]))
    mean = sum(load) / EXPERTS
    deviation = math.sqrt(sum((f - mean) ** 2 for f in load) / EXPERTS)
    assert metrics.imbalance(load) == pytest.approx(max(load) / mean)
    assert metrics.variation(load) == pytest.approx(deviation / mean)
    assert metrics.idle_experts(load) == [e for e in range(EXPERTS) if load[e] == 0]
    assert 0 in metrics.idle_experts(load)


def test_an_even_load_is_balanced_and_no_load_is_no_error() -> None:
    assert metrics.imbalance(np.full(4, 0.25)) == 1
    assert metrics.variation(np.full(4, 0.25)) == 0
    assert metrics.imbalance(np.zeros(4)) == metrics.variation(np.zeros(4)) == 0


def test_group_means(random: np.random.Generator) -> None:
    values, groups = random.random(TOKENS), random.integers(0, DOMAINS - 1, TOKENS)
    means = metrics.group_means(values, groups, DOMAINS)
    for g in range(DOMAINS - 1):
        own = [v for v, group in zip(values, groups, strict=True) if group == g]
        assert means[g] == pytest.approx(sum(own) / len(own))
    assert means[DOMAINS - 1] == 0  # nobody is in it


def test_domain_mix_and_specialization(random: np.random.Generator) -> None:
    load = metrics.load(random.integers(0, 20, (DOMAINS, EXPERTS)) * np.array([0, 1, 1, 1, 1, 1]))
    mix, special = metrics.domain_mix(load), metrics.specialization(load)
    for e in range(EXPERTS):
        total = sum(load[d, e] for d in range(DOMAINS))
        parts = [load[d, e] / total if total else 0 for d in range(DOMAINS)]
        entropy = -sum(q * math.log(q) for q in parts if q)
        assert mix[:, e] == pytest.approx(parts)
        assert special[e] == pytest.approx(1 - entropy / math.log(DOMAINS) if total else 0)


def test_specialization_at_its_ends() -> None:
    assert metrics.specialization(np.array([[1.0, 0.5], [0.0, 0.5]])) == pytest.approx([1, 0])
    assert metrics.specialization(np.array([[0.3, 0.7]])).tolist() == [0, 0]  # one domain: nothing to prefer


def test_domain_information_is_the_mutual_information(random: np.random.Generator) -> None:
    load = metrics.load(random.integers(0, 20, (DOMAINS, EXPERTS)))
    information = 0.0
    for d in range(DOMAINS):
        for e in range(EXPERTS):
            joint, marginal = load[d, e] / DOMAINS, sum(load[:, e]) / DOMAINS
            information += joint * math.log(joint / (marginal / DOMAINS)) if joint else 0
    assert metrics.domain_information(load) == pytest.approx(information / math.log(DOMAINS))


def test_transitions(random: np.random.Generator) -> None:
    here, there = slots(random), slots(random, NEXT, 2)
    counts = metrics.transition_counts(here, there, EXPERTS, NEXT)
    brute = Counter((int(i), int(j)) for a, b in zip(here, there, strict=True) for i in a for j in b)
    probabilities = metrics.transition_probabilities(counts)
    for i in range(EXPERTS):
        total = sum(brute[i, j] for j in range(NEXT))
        for j in range(NEXT):
            assert counts[i, j] == brute[i, j]
            assert probabilities[i, j] == pytest.approx(brute[i, j] / total)


def test_transition_information(random: np.random.Generator) -> None:
    counts = random.integers(0, 30, (EXPERTS, NEXT))
    total = counts.sum()
    rows, columns = counts.sum(axis=1) / total, counts.sum(axis=0) / total
    information = sum(
        counts[i, j] / total * math.log(counts[i, j] / total / rows[i] / columns[j])
        for i in range(EXPERTS)
        for j in range(NEXT)
        if counts[i, j]
    )
    entropy = -sum(p * math.log(p) for p in columns if p)
    assert metrics.transition_information(counts) == pytest.approx(information / entropy)


def test_transition_information_at_its_ends() -> None:
    assert metrics.transition_information(np.eye(4, dtype=np.int64) * 7) == pytest.approx(1)
    assert metrics.transition_information(np.ones((4, 4), dtype=np.int64)) == pytest.approx(0, abs=1e-12)
    assert metrics.transition_information(np.zeros((4, 4), dtype=np.int64)) == 0


def test_affinity(random: np.random.Generator) -> None:
    """What a token takes next, looked for in the two experts that followed each of its experts most."""
    here, there = slots(random), slots(random, NEXT, 2)
    found = metrics.affinity(metrics.transition_counts(here, there, EXPERTS, NEXT), followers=2)
    steps = [(int(i), int(j)) for a, b in zip(here, there, strict=True) for i in a for j in b]
    steps = [(i, j) for i, j in steps if i < EXPERTS and j < NEXT]
    follows = {i: {j for j, _ in Counter(j for k, j in steps if k == i).most_common(2)} for i in range(EXPERTS)}
    busiest = {j for j, _ in Counter(j for _, j in steps).most_common(2)}
    assert found.share == pytest.approx(sum(j in follows[i] for i, j in steps) / len(steps))
    assert found.chance == pytest.approx(sum(j in busiest for _, j in steps) / len(steps))


def test_affinity_at_its_ends() -> None:
    fixed = metrics.affinity(np.eye(4, dtype=np.int64) * 7, 1)
    assert (fixed.share, fixed.chance) == (1, 0.25)
    nothing = metrics.affinity(np.zeros((4, 4), dtype=np.int64), 1)
    assert (nothing.share, nothing.chance) == (0, 0)


def test_off_diagonal_mean(random: np.random.Generator) -> None:
    values = random.random((5, 5))
    assert metrics.off_diagonal_mean(values) == pytest.approx(
        np.mean([values[i, j] for i in range(5) for j in range(5) if i != j])
    )
    assert metrics.off_diagonal_mean(np.ones((1, 1))) == 0


def test_token_consistency(random: np.random.Generator) -> None:
    tokens, top = random.integers(0, 40, TOKENS), random.integers(0, EXPERTS + 1, TOKENS)
    found = metrics.token_consistency(tokens, top, EXPERTS, min_count=6)
    routed = [(int(t), int(e)) for t, e in zip(tokens, top, strict=True) if e < EXPERTS]
    common = {t for t, n in Counter(t for t, _ in routed).items() if n >= 6}
    kept = [(t, e) for t, e in routed if t in common]
    usual = sum(max(Counter(e for t, e in kept if t == token).values()) for token in common)
    busiest = max(Counter(e for _, e in kept).values())
    assert found.tokens == len(kept)
    assert found.share == pytest.approx(usual / len(kept))
    assert found.chance == pytest.approx(busiest / len(kept))


def test_token_consistency_of_rare_tokens_only() -> None:
    found = metrics.token_consistency(np.arange(20), np.zeros(20, dtype=np.int64), 2)
    assert (found.share, found.chance, found.tokens) == (0, 0, 0)


def test_top_tokens(random: np.random.Generator) -> None:
    ids, tokens = slots(random), random.integers(100, 112, TOKENS)
    of_expert: dict[int, Counter[int]] = {e: Counter() for e in range(EXPERTS)}
    for token, row in zip(tokens, ids, strict=True):
        for e in row:
            if e < EXPERTS:
                of_expert[int(e)][int(token)] += 1
    everything = sum(of_expert.values(), Counter())
    for e, tops in enumerate(metrics.top_tokens(tokens, ids, EXPERTS, limit=4, min_count=2)):
        total = sum(of_expert[e].values())
        expected = []
        for token, count in of_expert[e].items():
            lift = (count / total) / (everything[token] / sum(everything.values()))
            if count >= 2 and lift > 1:
                expected.append((count / total * math.log(lift), token, count, lift))
        expected = sorted(expected, key=lambda row: (-row[0], row[1]))[:4]
        assert [(top.token, top.count) for top in tops] == [(token, count) for _, token, count, _ in expected]
        assert [top.lift for top in tops] == pytest.approx([lift for *_, lift in expected])


def test_an_idle_expert_has_no_top_tokens() -> None:
    tops = metrics.top_tokens(np.zeros(9, dtype=np.int64), np.zeros((9, 1), dtype=np.int64), 2, limit=3)
    assert tops == [[], []]  # expert 0 takes everything: no token stands out
