"""By what the hidden neurons of a feed-forward are put together into experts.

T tokens · M tokens of a sample · F hidden neurons · P domains · E experts · D model width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from moesaic.convert.activations import FeedForward
from moesaic.convert.clustering import Ints, assign, balanced_kmeans
from moesaic.registry import Registry

MARKED = 0.1
"""Share of the neurons that counts as active for a token: those that contribute most."""
_SAMPLED = 8192
Criterion = Callable[["Neurons", int, int], Ints]
CRITERIA: Registry[Criterion] = Registry("criterion")
"""``(neurons, experts, seed)`` to ``[F]``: the expert of each neuron, all experts being of one size."""


@dataclass(frozen=True)
class Neurons:
    """What is known of a layer's hidden neurons, or of some of them.

    ``gate`` and ``up`` are their weights ``[F, D]``; ``marks`` ``[M, F]`` bool says for a sample of the tokens, whose
    domains are ``domain_ids`` ``[M]``, which neurons are active; ``rates`` ``[P, F]`` how often they are in each
    domain, over all tokens.
    """

    gate: Tensor
    up: Tensor
    marks: Tensor
    domain_ids: Tensor
    rates: Tensor

    def of(self, chosen: Ints) -> Neurons:
        """The same of the chosen neurons only."""
        index = torch.from_numpy(chosen)
        return Neurons(self.gate[index], self.up[index], self.marks[:, index], self.domain_ids, self.rates[:, index])


def observe(layer: FeedForward, domain_ids: Tensor, domains: int) -> Neurons:
    """Which neurons are active when: those whose ``|h| * norm of their column of down`` is among a token's largest
    tenth.

    CMoE's published code (Carved Mixture-of-Experts) marks the largest tenth of a token's hidden values, of inputs and
    weights of length 1; ours are weighed by what they add to the output, for the columns' lengths differ.

    Args:
        domain_ids: ``[T]`` int64, the domain of each token, below ``domains``.
    """
    length_F = layer.down.float().norm(dim=0)
    many = max(1, round(MARKED * len(length_F)))
    step = -(-len(layer.inputs) // _SAMPLED)
    counts_PF = torch.zeros(domains, len(length_F))
    sampled = []
    for rows in layer.chunks():
        active = (layer.hidden(rows).abs_() * length_F).topk(many, dim=1).indices
        marks_TF = torch.zeros(len(active), len(length_F), dtype=torch.bool).scatter_(1, active, True)
        counts_PF.index_add_(0, domain_ids[rows], marks_TF.float())
        sampled.append(marks_TF[(-rows.start) % step :: step])
    tokens_P1 = torch.bincount(domain_ids, minlength=domains).unsqueeze(1)
    return Neurons(layer.gate, layer.up, torch.cat(sampled), domain_ids[::step], counts_PF / tokens_P1.clamp(min=1))


def always_active(neurons: Neurons, count: int, criterion: str) -> Ints:
    """The ``count`` neurons for a shared expert: the ones that are active most often, where the criterion is
    ``domain`` in the domain where they are so least (as the residual of Read-ME's code: what all domains keep)."""
    rate_F = neurons.rates.amin(dim=0) if criterion == "domain" else neurons.marks.float().mean(dim=0)
    order = np.argsort(-rate_F.double().numpy(), kind="stable")[:count]
    return np.sort(order).astype(np.int64)


@CRITERIA.register("coactivation")
def by_coactivation(neurons: Neurons, experts: int, seed: int) -> Ints:
    """Neurons that are active for the same tokens: balanced k-means of their marks over the sample.

    MoEfication: Transformer Feed-forward Layers are Mixtures of Experts, section 3.2 partitions a graph of such
    co-activations; CMoE clusters the marks, as here.
    """
    return balanced_kmeans(neurons.marks.T.float(), experts, seed)


@CRITERIA.register("weight")
def by_weight(neurons: Neurons, experts: int, seed: int) -> Ints:
    """Neurons whose weights point the same way: balanced k-means of their rows, of length 1 each (MoEfication,
    section 3.2). There is one row there; ours are those of gate and up projection, side by side."""
    rows = [torch.nn.functional.normalize(matrix.float(), dim=1) for matrix in (neurons.gate, neurons.up)]
    return balanced_kmeans(torch.cat(rows, dim=1), experts, seed)


@CRITERIA.register("domain")
def by_domain(neurons: Neurons, experts: int, seed: int) -> Ints:
    """Experts of domains: each neuron goes to a domain in which it is active more often than elsewhere, then those of
    a domain to its experts by co-activation on that domain's tokens.

    After Read-ME: Refactorizing LLMs as Router-Decoupled Mixture of Experts with System Co-Design, whose published code
    makes one expert a domain, of the neurons with the largest mean activation there, so that experts overlap. Here
    every neuron is in one expert, for together they are to be the dense layer, and a domain may have several: all get
    equally many experts, or the first ones one more.
    """
    domains, count = neurons.rates.shape
    width = count // experts
    own = [experts // domains + (place < experts % domains) for place in range(domains)]
    share_PF = neurons.rates / neurons.rates.sum(dim=0).clamp(min=1e-9)
    domain_F = assign(-share_PF.T.double().numpy(), [number * width for number in own])
    labels, first = np.empty(count, dtype=np.int64), 0
    for place, number in enumerate(own):
        members = np.flatnonzero(domain_F == place)
        marks_MF = neurons.marks[neurons.domain_ids == place][:, torch.from_numpy(members)]
        labels[members] = first + balanced_kmeans(marks_MF.T.float(), number, seed)
        first += number
    return labels
