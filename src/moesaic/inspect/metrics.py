"""What a routing trace says, in numbers: plain numpy, one function a metric, each with its formula.

N tokens · D domains · E experts · K slots per token. An id ``>= E`` in ``expert_ids`` is a slot without an expert and
is never counted. A fraction of nothing is 0, so that every number is finite.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moesaic.inspect.trace import FloatArray, IntArray


def slot_counts(expert_ids: IntArray, groups: IntArray, num_experts: int, num_groups: int) -> IntArray:
    """``[num_groups, E]``: c(g, e) = slots of expert e among the tokens of group g.

    Args:
        expert_ids: ``[N, K]``. groups: ``[N]``, what each token belongs to (a domain, a token id).
    """
    real = expert_ids < num_experts
    cells = (groups[:, None] * num_experts + expert_ids)[real]
    return np.bincount(cells, minlength=num_groups * num_experts).reshape(num_groups, num_experts)


def load(counts: IntArray) -> FloatArray:
    """f(e) = c(e) / Σ c over the last axis: an expert's share of the slots."""
    return _normalize(counts)


def imbalance(load_E: FloatArray) -> float:
    """max f / mean f: how much more the busiest expert does than an even share; 1 when even, 0 without any slot."""
    return _ratio(load_E.max(), load_E.mean())


def variation(load_E: FloatArray) -> float:
    """Coefficient of variation: standard deviation of f (over all E, not E − 1) / mean f; 0 when even."""
    return _ratio(load_E.std(), load_E.mean())


def idle_experts(load_E: FloatArray) -> list[int]:
    """The experts that got no slot at all."""
    return [int(e) for e in np.flatnonzero(load_E == 0)]


def group_means(values_N: FloatArray, groups: IntArray, num_groups: int) -> FloatArray:
    """``[num_groups]``: mean of the values of the tokens of a group."""
    sums = np.bincount(groups, weights=values_N, minlength=num_groups)
    return _divide(sums, np.bincount(groups, minlength=num_groups))


def domain_mix(load_DE: FloatArray) -> FloatArray:
    """``[D, E]``: q(d | e) = f(e | d) / Σ_d f(e | d), an expert's domains as if all domains were equally long."""
    return _divide(load_DE, load_DE.sum(axis=0))


def specialization(load_DE: FloatArray) -> FloatArray:
    """``[E]``: KL(q(· | e) ‖ uniform) / log D, from 0 (an equal share of every domain) to 1 (one domain only).

    0 for an expert without slots, and where there is one domain.
    """
    mix = domain_mix(load_DE)
    num_domains = len(load_DE)
    if num_domains < 2:
        return np.zeros(load_DE.shape[1])
    divergence = _xlogy(mix, mix * num_domains).sum(axis=0)
    return np.asarray(np.clip(divergence / np.log(num_domains), 0, 1))


def domain_information(load_DE: FloatArray) -> float:
    """I(expert; domain) / log D with equally probable domains: how far a slot's expert gives away its domain, 0 to 1.

    Equal to the Jensen-Shannon divergence between the domains' loads, and to the mean of :func:`specialization`
    weighted by the experts' mean load.
    """
    weights = load_DE.mean(axis=0)
    return float(np.clip((weights * specialization(load_DE)).sum(), 0, 1))


def transition_counts(ids_from: IntArray, ids_to: IntArray, num_from: int, num_to: int) -> IntArray:
    """``[E, E']``: C(i, j) = Σ over tokens of (slots of expert i in one layer) · (slots of expert j in the other)."""
    real = (ids_from < num_from)[:, :, None] & (ids_to < num_to)[:, None, :]
    cells = (ids_from[:, :, None] * num_to + ids_to[:, None, :])[real]
    return np.bincount(cells, minlength=num_from * num_to).reshape(num_from, num_to)


def transition_probabilities(counts: IntArray) -> FloatArray:
    """``[E, E']``: P(j | i) = C(i, j) / Σ_j C(i, j); a row of zeros for an expert without slots."""
    return _normalize(counts)


def transition_information(counts: IntArray) -> float:
    """I(i; j) / H(j) of the joint distribution C / ΣC: how far one layer's expert gives away the next one's, 0 to 1."""
    joint = counts / max(1, counts.sum())
    rows, columns = joint.sum(axis=1), joint.sum(axis=0)
    information = _xlogy(joint, _divide(joint, np.outer(rows, columns))).sum()
    return float(np.clip(_ratio(information, -_xlogy(columns, columns).sum()), 0, 1))


@dataclass(frozen=True)
class Affinity:
    """``share``: of the slots of one layer, those that go to experts which its token's expert in the layer before has
    the most affinity to. ``chance``: the same if these were the layer's busiest experts for everybody."""

    share: float
    chance: float


def affinity(counts: IntArray, followers: int) -> Affinity:
    """Σ_i Σ_{j in F(i)} C(i, j) / ΣC with F(i) the ``followers`` experts j with the largest P(j | i).

    P(j | i) (:func:`transition_probabilities`) is the inter-layer expert affinity of Exploiting Inter-Layer Expert
    Affinity for Accelerating Mixture-of-Experts Model Inference (ExFlow), section 4; one number of it is how often one
    finds what a token takes next where one looks for it in the nearest experts only. With as many followers as slots a
    token, share and chance are 1 where routes are fixed.
    """
    total = int(counts.sum())
    if not total:
        return Affinity(0.0, 0.0)
    nearest, busiest = np.sort(counts, axis=1)[:, -followers:], np.sort(counts.sum(axis=0))[-followers:]
    return Affinity(float(nearest.sum() / total), float(busiest.sum() / total))


def off_diagonal_mean(values: FloatArray) -> float:
    """Mean of the entries ``[E, E]`` of different experts; 0 where there is one."""
    others = len(values) * (len(values) - 1)
    return _ratio(values.sum() - np.trace(values), others)


@dataclass(frozen=True)
class Consistency:
    """``share``: how often a token goes to the expert that its id goes to most often. ``chance``: the same share if
    every token went to the layer's busiest expert. ``tokens``: how many tokens were looked at."""

    share: float
    chance: float
    tokens: int


def token_consistency(token_ids: IntArray, top_expert: IntArray, num_experts: int, min_count: int = 8) -> Consistency:
    """Σ_t max_e c(t, e) / Σ_t c(t) over the token ids t that occur at least ``min_count`` times.

    c(t, e) counts the occurrences of t with top expert e (``top_expert`` ``[N]``). Near 1 the token alone decides,
    near ``chance`` its context does. Rarer ids are left out: one that occurs once always agrees with itself.
    """
    ids, positions = np.unique(token_ids, return_inverse=True)
    counts = slot_counts(top_expert[:, None], positions, num_experts, len(ids))
    counts = counts[counts.sum(axis=1) >= min_count]
    if not counts.size:
        return Consistency(0.0, 0.0, 0)
    total = int(counts.sum())
    return Consistency(float(counts.max(axis=1).sum() / total), float(counts.sum(axis=0).max() / total), total)


@dataclass(frozen=True)
class TopToken:
    """A token id, how many of an expert's slots it has, and its ``lift`` over its share of all slots."""

    token: int
    count: int
    lift: float


def top_tokens(
    token_ids: IntArray, expert_ids: IntArray, num_experts: int, limit: int, min_count: int = 4
) -> list[list[TopToken]]:
    """For each expert the tokens that set it apart: at most ``limit``, by p · log(lift), the largest first.

    With p(t | e) the share of token t in the slots of expert e, and p(t) its share in all slots of the layer,
    lift = p(t | e) / p(t). The order is that of the terms of KL(p(· | e) ‖ p): lift alone would put what occurred
    once or twice first. Tokens with a lift of 1 or less, or fewer than ``min_count`` slots, are left out.
    """
    ids, positions = np.unique(token_ids, return_inverse=True)
    counts = slot_counts(expert_ids, positions, num_experts, len(ids))
    share = _divide(counts, counts.sum(axis=0))
    base = counts.sum(axis=1, keepdims=True) / max(1, counts.sum())
    lift = _divide(share, base)
    gain = np.where((counts >= min_count) & (lift > 1), _xlogy(share, lift), 0)
    result = []
    for e in range(num_experts):
        best = np.argsort(-gain[:, e], kind="stable")[:limit]
        kept = [t for t in best if gain[t, e] > 0]
        result.append([TopToken(int(ids[t]), int(counts[t, e]), float(lift[t, e])) for t in kept])
    return result


def _normalize(counts: IntArray) -> FloatArray:
    return _divide(counts, counts.sum(axis=-1, keepdims=True))


def _divide(a: FloatArray | IntArray, b: FloatArray | IntArray) -> FloatArray:
    """a / b, and 0 where b is 0."""
    a, b = np.broadcast_arrays(np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64))
    return np.divide(a, b, out=np.zeros(a.shape), where=b != 0)


def _ratio(a: float, b: float) -> float:
    return float(a / b) if b else 0.0


def _xlogy(x: FloatArray, y: FloatArray) -> FloatArray:
    """x · log y, and 0 where x is 0."""
    return x * np.log(y, out=np.zeros(np.broadcast_shapes(x.shape, y.shape)), where=x > 0)
