"""Neurons to experts of equal size: the assignment is the cheapest there is, the clusters are what they should be."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from moesaic.convert.clustering import assign, balanced_kmeans
from moesaic.errors import ConfigError


def cheapest(cost: np.ndarray, sizes: list[int]) -> float:
    """By trying all assignments."""
    places = [column for column, size in enumerate(sizes) for _ in range(size)]
    return min(
        sum(cost[row, column] for row, column in enumerate(order)) for order in set(itertools.permutations(places))
    )


@pytest.mark.parametrize("sizes", [[2, 2, 2], [3, 3], [1, 2, 3], [6], [0, 4, 2], [1] * 6, [4, 0, 0, 2]])
@pytest.mark.parametrize("kind", ["normal", "ties", "alike"])
def test_no_assignment_is_cheaper(sizes: list[int], kind: str) -> None:
    random = np.random.default_rng(0)
    for _ in range(4):
        shape = (sum(sizes), len(sizes))
        cost = random.normal(size=shape) if kind == "normal" else random.integers(0, 3, size=shape).astype(np.float64)
        cost = np.zeros(shape) if kind == "alike" else cost
        labels = assign(cost, sizes)
        assert np.bincount(labels, minlength=len(sizes)).tolist() == sizes
        assert cost[np.arange(len(labels)), labels].sum() == pytest.approx(cheapest(cost, sizes), abs=1e-9)


def test_larger_ones_are_those_of_scipy() -> None:
    optimize = pytest.importorskip("scipy.optimize")
    random = np.random.default_rng(1)
    for rows, columns in ((24, 4), (40, 8), (60, 5), (96, 16)):
        cost = random.normal(size=(rows, columns)) + random.normal(size=columns)
        sizes = [rows // columns] * columns
        repeated = np.repeat(cost, sizes, axis=1)
        best = repeated[optimize.linear_sum_assignment(repeated)].sum()
        assert cost[np.arange(rows), assign(cost, sizes)].sum() == pytest.approx(best, abs=1e-9)


def test_sizes_that_do_not_fit() -> None:
    for sizes in ([2, 2], [2, 2, 1, 0], [7, -1]):
        with pytest.raises(ConfigError, match="5 neurons cannot be cut into clusters of"):
            assign(np.zeros((5, 2 if len(sizes) == 2 else 3)), sizes)
    with pytest.raises(ConfigError, match="7 neurons cannot be cut into 3 clusters of one size"):
        balanced_kmeans(torch.zeros(7, 2), 3)


def test_clusters_that_are_there_are_found() -> None:
    generator = torch.Generator().manual_seed(0)
    for seed in range(5):
        order = torch.randperm(60, generator=generator)
        truth = (torch.arange(60) // 10)[order]
        directions = torch.nn.functional.normalize(torch.randn(6, 16, generator=generator), dim=1)
        lengths = torch.rand(60, 1, generator=generator) + 0.5  # of no effect
        features = (directions[truth] + 0.05 * torch.randn(60, 16, generator=generator)) * lengths
        labels = torch.from_numpy(balanced_kmeans(features, 6, seed))
        assert all(len(set(truth[labels == cluster].tolist())) == 1 for cluster in range(6))


def test_always_balanced_and_the_same_for_a_seed() -> None:
    generator = torch.Generator().manual_seed(0)
    for features in (torch.randn(48, 5, generator=generator), torch.zeros(48, 5), torch.ones(48, 5)):
        labels = balanced_kmeans(features, 8, seed=3)
        assert np.bincount(labels).tolist() == [6] * 8
        assert np.array_equal(labels, balanced_kmeans(features, 8, seed=3))
    assert balanced_kmeans(torch.randn(5, 2), 1).tolist() == [0] * 5
    assert sorted(balanced_kmeans(torch.randn(5, 2), 5).tolist()) == list(range(5))
