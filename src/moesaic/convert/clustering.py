"""Neurons of a feed-forward to experts of equal size: balanced k-means, and the exact assignment inside it.

F hidden neurons · E experts · M features of a neuron.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moesaic.errors import ConfigError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
_ROUNDS = 30
_ROWS_AT_ONCE = 256
_LEAST_GAIN = 1e-9


def balanced_kmeans(features_FM: Tensor, clusters: int, seed: int = 0) -> Ints:
    """``[F]`` the cluster of each row, all clusters being of one size.

    Lloyd's iterations whose assignment step is :func:`assign`, on rows of length 1, as MoEfication: Transformer
    Feed-forward Layers are Mixtures of Experts, section 3.2 has it (parameter clustering), until no row moves or 30
    times; first centres as k-means++ draws them.

    Args:
        features_FM: any floats; rows of zeros are near to nothing.

    Raises:
        ConfigError: where ``clusters`` does not divide F.
    """
    rows = features_FM.shape[0]
    if clusters < 1 or rows % clusters:
        raise ConfigError(f"{rows} neurons cannot be cut into {clusters} clusters of one size")
    x_FM = torch.nn.functional.normalize(features_FM.float(), dim=1)
    centers_EM = x_FM[_first_centers(x_FM, clusters, seed)]
    labels = np.full(rows, -1, dtype=np.int64)
    for _ in range(_ROUNDS):
        cost_FE = centers_EM.square().sum(dim=1) - 2 * x_FM @ centers_EM.T
        before, labels = labels, assign(cost_FE.double().numpy(), [rows // clusters] * clusters)
        if np.array_equal(before, labels):
            break
        sums_EM = torch.zeros_like(centers_EM).index_add_(0, torch.from_numpy(labels), x_FM)
        centers_EM = sums_EM / (rows // clusters)
    return labels


def _first_centers(x_FM: Tensor, clusters: int, seed: int) -> Ints:
    """Rows that are far from each other: each with a probability that grows with its squared distance."""
    random = np.random.default_rng(seed)
    chosen = [int(random.integers(x_FM.shape[0]))]
    distance_F = np.full(x_FM.shape[0], np.inf)
    while len(chosen) < clusters:
        center_M = x_FM[chosen[-1]]
        away_F = torch.cat([(some_FM - center_M).square_().sum(dim=1) for some_FM in x_FM.split(_ROWS_AT_ONCE)])
        distance_F = np.minimum(distance_F, away_F.double().numpy())
        distance_F[chosen] = 0
        total = distance_F.sum()
        left = np.setdiff1d(np.arange(len(distance_F)), chosen)
        if total > 0:
            chosen.append(int(random.choice(len(distance_F), p=distance_F / total)))
        else:  # all rows are alike
            chosen.append(int(left[0]))
    return np.asarray(chosen, dtype=np.int64)


def assign(cost_FE: Floats, sizes: Sequence[int]) -> Ints:
    """``[F]``: a column for each row, column e for ``sizes[e]`` rows, at the least total cost.

    Rows choose first greedily, those with the most to lose before the others; then rows are exchanged in cycles over
    the columns as long as a cycle lowers the cost. A transport without such a cycle is an optimal one (Klein, A Primal
    Method for Minimal Cost Flows with Applications to the Assignment and Transportation Problems).

    Raises:
        ConfigError: where the sizes do not sum to F.
    """
    if sum(sizes) != cost_FE.shape[0] or len(sizes) != cost_FE.shape[1] or min(sizes, default=0) < 0:
        raise ConfigError(f"{cost_FE.shape[0]} neurons cannot be cut into clusters of {list(sizes)}")
    labels = _greedy(cost_FE, sizes)
    least = _LEAST_GAIN * max(1.0, float(np.abs(cost_FE).max(initial=0.0)))
    while _swap_pairs(cost_FE, labels, least):
        pass
    while _turn_cycle(cost_FE, labels, least):
        pass
    return labels


def _greedy(cost_FE: Floats, sizes: Sequence[int]) -> Ints:
    rows, columns = cost_FE.shape
    left = np.asarray(sizes).copy()
    preference_FE = np.argsort(cost_FE, axis=1, kind="stable")
    regret_F = np.ptp(np.partition(cost_FE, 1, axis=1)[:, :2], axis=1) if columns > 1 else np.zeros(rows)
    labels = np.empty(rows, dtype=np.int64)
    for row in np.argsort(-regret_F, kind="stable"):
        column = next(c for c in preference_FE[row] if left[c])
        labels[row] = column
        left[column] -= 1
    return labels


def _swap_pairs(cost_FE: Floats, labels: Ints, least: float) -> bool:
    """Exchange rows between every two columns where that pays; whether any did."""
    any_swapped = False
    for a in range(cost_FE.shape[1]):
        for b in range(a + 1, cost_FE.shape[1]):
            in_a, in_b = np.flatnonzero(labels == a), np.flatnonzero(labels == b)
            gain_a = cost_FE[in_a, a] - cost_FE[in_a, b]
            gain_b = cost_FE[in_b, b] - cost_FE[in_b, a]
            best_a, best_b = np.argsort(-gain_a, kind="stable"), np.argsort(-gain_b, kind="stable")
            most = min(len(in_a), len(in_b))
            pays = gain_a[best_a[:most]] + gain_b[best_b[:most]] > least
            if count := int(pays.sum()):  # both are sorted: those that pay are the first ones
                labels[in_a[best_a[:count]]] = b
                labels[in_b[best_b[:count]]] = a
                any_swapped = True
    return any_swapped


def _turn_cycle(cost_FE: Floats, labels: Ints, least: float) -> bool:
    """Move one row along each step of a cycle of columns that lowers the cost; whether there was one."""
    columns = cost_FE.shape[1]
    step_EE = np.full((columns, columns), np.inf)
    mover_EE = np.zeros((columns, columns), dtype=np.int64)
    for a in range(columns):
        rows = np.flatnonzero(labels == a)
        if len(rows):
            extra = cost_FE[rows] - cost_FE[rows, a][:, None]
            best = extra.argmin(axis=0)
            step_EE[a], mover_EE[a] = extra[best, np.arange(columns)], rows[best]
    np.fill_diagonal(step_EE, np.inf)
    cycle = _negative_cycle(step_EE, least)
    if not cycle:
        return False
    movers = [mover_EE[a, b] for a, b in zip(cycle, [*cycle[1:], cycle[0]], strict=True)]
    labels[movers] = [*cycle[1:], cycle[0]]
    return True


def _negative_cycle(step_EE: Floats, least: float) -> list[int]:
    """The nodes of a cycle whose steps sum to less than ``-least``, by Bellman and Ford; empty where there is none."""
    nodes = len(step_EE)
    distance, before = np.zeros(nodes), np.full(nodes, -1)
    for _ in range(nodes):
        through = distance[:, None] + step_EE
        best = through.argmin(axis=0)
        shorter = through[best, np.arange(nodes)] < distance - least / (2 * nodes)
        if not shorter.any():
            return []
        before[shorter] = best[shorter]
        distance = np.where(shorter, through[best, np.arange(nodes)], distance)
    node = int(np.flatnonzero(shorter)[0])
    for _ in range(nodes):  # certainly inside the cycle then
        node = int(before[node])
    cycle = [node]
    while (node := int(before[node])) != cycle[0]:
        cycle.append(node)
    cycle.reverse()
    total = sum(step_EE[a, b] for a, b in zip(cycle, [*cycle[1:], cycle[0]], strict=True))
    return cycle if total < -least / 2 else []
