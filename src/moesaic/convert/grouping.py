"""Which experts of a layer stay, and which go into them.

E experts · M experts that stay.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.cluster.hierarchy import cut_tree, linkage
from scipy.spatial.distance import squareform

FloatArray = npt.NDArray[np.float64]
Groups = list[list[int]]
"""M groups of experts, each led by the one that stays, in the order of the leaders' numbers."""


def best(scores_E: FloatArray, keep: int) -> Groups:
    """The ``keep`` experts with the highest scores, each alone; of equals the one with the lower number."""
    order = np.argsort(-scores_E, kind="stable")[:keep]
    return [[int(expert)] for expert in sorted(order)]


def join_nearest(leaders: Groups, distance_EE: FloatArray) -> Groups:
    """Every other expert joins the leader that it is nearest to.

    Merge, Then Compress: Demystify Efficient SMoE with Hints from Its Routing Policy, section 3.1: the dominant experts
    are those that are used most, the others are grouped around them by similarity (there of the router's logits).
    """
    chosen = [group[0] for group in leaders]
    groups = {leader: [leader] for leader in chosen}
    for expert in range(len(distance_EE)):
        if expert not in groups:
            nearest = int(np.argmin(distance_EE[expert, chosen]))
            groups[chosen[nearest]].append(expert)
    return [groups[leader] for leader in chosen]


def clusters(distance_EE: FloatArray, keep: int, scores_E: FloatArray) -> Groups:
    """``keep`` clusters of near experts, each led by its member with the highest score.

    Hierarchical clustering with average linkage, as in Retraining-Free Merging of Sparse Mixture-of-Experts via
    Hierarchical Clustering (HC-SMoE), section 3.2.
    """
    tree = linkage(squareform(distance_EE, checks=False), method="average")
    labels_E = cut_tree(tree, n_clusters=keep)[:, 0]
    groups = []
    for label in range(keep):
        members = [int(expert) for expert in np.flatnonzero(labels_E == label)]
        leader = max(members, key=lambda expert: (scores_E[expert], -expert))
        groups.append([leader, *(expert for expert in members if expert != leader)])
    return sorted(groups)


def distances(points_ED: FloatArray) -> FloatArray:
    """``[E, E]``: Euclidean distances of points."""
    squares_E = (points_ED**2).sum(axis=1)
    found: FloatArray = np.sqrt(np.maximum(squares_E[:, None] + squares_E - 2 * points_ED @ points_ED.T, 0))
    np.fill_diagonal(found, 0)
    return found
