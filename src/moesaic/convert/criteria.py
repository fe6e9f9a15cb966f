"""By what the hidden neurons of a feed-forward are put together into experts.

T tokens · M tokens of a sample · F hidden neurons · P domains · E experts · D model width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from moesaic.convert.activations import FeedForward, check_finite
from moesaic.convert.clustering import Ints, assign, balanced_kmeans
from moesaic.convert.routers import Gate, GateFit, largest
from moesaic.registry import Registry

MARKED = 0.1
"""Share of the neurons that counts as active for a token: those that contribute most."""
_SAMPLED = 8192
_ROUNDS = 12
_ROWS = 1024
Criterion = Callable[["Neurons", int, int, int], Ints]
CRITERIA: Registry[Criterion] = Registry("criterion")
"""``(neurons, experts, top_k, seed)`` to ``[F]``: the expert of each neuron, all experts being of one size."""


@dataclass(frozen=True)
class Neurons:
    """What is known of a layer's hidden neurons, or of some of them.

    ``gate`` and ``up`` are their weights ``[F, D]``. For a sample of the tokens, whose domains are ``domain_ids``
    ``[M]``: ``marks`` ``[M, F]`` bool says which neurons are active, ``shares`` ``[M, F]`` which share of the squares
    of all neurons' outputs is theirs, ``features`` ``[M, D]`` is what the router reads, and ``wanted`` ``[M, E]``, or
    None, how much the experts of the layers before are wanted that take the same routes. ``rates`` ``[P, F]`` is how
    often neurons are active in each domain, over all tokens.
    """

    gate: Tensor
    up: Tensor
    marks: Tensor
    shares: Tensor
    features: Tensor
    domain_ids: Tensor
    rates: Tensor
    wanted: Tensor | None = None

    def of(self, chosen: Ints) -> Neurons:
        """The same of the chosen neurons only."""
        if len(chosen) == self.marks.shape[1]:
            return self
        index = torch.from_numpy(chosen)
        per_neuron = {"marks": self.marks[:, index], "shares": self.shares[:, index], "rates": self.rates[:, index]}
        return replace(self, gate=self.gate[index], up=self.up[index], **per_neuron)


def observe(
    layer: FeedForward,
    domain_ids: Tensor,
    domains: int,
    features: Tensor | None = None,
    wanted: Tensor | None = None,
) -> Neurons:
    """Which neurons are active when: those whose ``|h| * norm of their column of down`` is among a token's largest
    tenth.

    CMoE's published code (Carved Mixture-of-Experts) marks the largest tenth of a token's hidden values, of inputs and
    weights of length 1; ours are weighed by what they add to the output, for the columns' lengths differ.

    Args:
        domain_ids: ``[T]`` int64, the domain of each token, below ``domains``.
        features: ``[T, D]``, what the router reads; by default what enters the feed-forward.
        wanted: ``[T, E]``, see :class:`Neurons`.
    """
    length_F = layer.down.float().norm(dim=0)
    many = max(1, round(MARKED * len(length_F)))
    step = -(-len(layer.inputs) // _SAMPLED)
    counts_PF = torch.zeros(domains, len(length_F))
    sampled = len(range(0, len(layer.inputs), step))
    marks = torch.empty(sampled, len(length_F), dtype=torch.bool)
    shares = torch.empty(sampled, len(length_F))
    done = 0
    for rows in layer.chunks():
        output_TF = layer.hidden(rows).abs_().mul_(length_F)
        lengths_T = torch.linalg.vector_norm(output_TF, dim=1)  # with the squares that are taken below
        check_finite(lengths_T, layer.layer, "the square of the neurons' output", output_TF.dtype)
        active = output_TF.topk(many, dim=1).indices
        marks_TF = torch.zeros(output_TF.shape, dtype=torch.bool).scatter_(1, active, True)
        counts_PF.index_add_(0, domain_ids[rows], marks_TF.float())
        sample = slice((-rows.start) % step, None, step)
        squares_MF = output_TF[sample].square()
        here = slice(done, done := done + len(squares_MF))
        marks[here] = marks_TF[sample]
        shares[here] = squares_MF.div_(squares_MF.sum(dim=1, keepdim=True).clamp(min=1e-30))
        del output_TF, active, marks_TF, squares_MF  # before the next ones are computed
    tokens_P1 = torch.bincount(domain_ids, minlength=domains).unsqueeze(1)
    return Neurons(
        layer.gate,
        layer.up,
        marks,
        shares,
        (layer.inputs if features is None else features)[::step],
        domain_ids[::step],
        counts_PF / tokens_P1.clamp(min=1),
        None if wanted is None else wanted[::step],
    )


def always_active(neurons: Neurons, count: int, criterion: str) -> Ints:
    """The ``count`` neurons for a shared expert: the ones that are active most often, where the criterion is
    ``domain`` in the domain where they are so least (as the residual of Read-ME's code: what all domains keep)."""
    rate_F = neurons.rates.amin(dim=0) if criterion == "domain" else neurons.marks.float().mean(dim=0)
    order = np.argsort(-rate_F.double().numpy(), kind="stable")[:count]
    return np.sort(order).astype(np.int64)


@CRITERIA.register("routed")
def by_routing(neurons: Neurons, experts: int, top_k: int, seed: int) -> Ints:
    """Neurons to the experts that a linear router can find for the tokens that need them.

    Ours: neurons begin in the order of their mean share, the largest in the first expert. Then in turns a gate is
    fitted to the experts with the largest shares of a token, as a split model's is in the end, and each neuron goes,
    by the best balanced assignment, where its shares are on: to the experts that this gate chooses for the tokens for
    which the neuron counts. At most 12 turns; of all of them those experts stay that keep most. Neurons that are
    always needed come together in experts that are nearly always on, and no expert is made of tokens that the router
    cannot tell apart: on SmolLM2 that keeps more than clusters by co-activation.
    """
    count = neurons.shares.shape[1]
    labels = np.empty(count, dtype=np.int64)
    labels[np.argsort(-neurons.shares.mean(dim=0).double().numpy(), kind="stable")] = (
        np.arange(count) * experts // count
    )
    best, most, fit = labels, -1.0, GateFit(neurons.features)
    if neurons.wanted is not None:
        labels = _to_where_on(neurons, fit.gate(neurons.wanted, top_k), experts, top_k)
    for _ in range(_ROUNDS):
        shares_ME = neurons.shares @ torch.nn.functional.one_hot(torch.from_numpy(labels), experts).float()
        wanted_ME = shares_ME if neurons.wanted is None else experts * shares_ME + neurons.wanted
        gate = fit.gate(wanted_ME, top_k)
        kept = float((shares_ME * largest(gate.logits(neurons.features), top_k)).sum())
        if kept <= most:
            break
        best, most = labels, kept
        labels = _to_where_on(neurons, gate, experts, top_k)
    return best


def _to_where_on(neurons: Neurons, gate: Gate, experts: int, top_k: int) -> Ints:
    on_ME = largest(gate.logits(neurons.features), top_k)
    return assign(-(neurons.shares.T @ on_ME).double().numpy(), [neurons.shares.shape[1] // experts] * experts)


@CRITERIA.register("coactivation")
def by_coactivation(neurons: Neurons, experts: int, top_k: int, seed: int) -> Ints:
    """Neurons that are active for the same tokens: balanced k-means of their marks over the sample.

    MoEfication: Transformer Feed-forward Layers are Mixtures of Experts, section 3.2 partitions a graph of such
    co-activations; CMoE clusters the marks, as here.
    """
    return balanced_kmeans(neurons.marks.T.float(), experts, seed)


@CRITERIA.register("weight")
def by_weight(neurons: Neurons, experts: int, top_k: int, seed: int) -> Ints:
    """Neurons whose weights point the same way: balanced k-means of their rows, of length 1 each (MoEfication,
    section 3.2). There is one row there; ours are those of gate and up projection, side by side."""
    count, width = neurons.gate.shape
    rows_FM = torch.empty(count, 2 * width)
    for half, matrix in ((slice(0, width), neurons.gate), (slice(width, None), neurons.up)):
        for some_FD, own in zip(matrix.split(_ROWS), rows_FM[:, half].split(_ROWS), strict=True):
            own.copy_(torch.nn.functional.normalize(some_FD.float(), dim=1))
    return balanced_kmeans(rows_FM, experts, seed)


@CRITERIA.register("domain")
def by_domain(neurons: Neurons, experts: int, top_k: int, seed: int) -> Ints:
    """Experts of domains: each neuron goes to a domain in which it is active more often than elsewhere, then those of
    a domain to its experts by co-activation on that domain's tokens.

    After Read-ME: Refactorizing LLMs as Router-Decoupled Mixture of Experts with System Co-Design, whose published code
    makes one expert a domain, of the neurons with the largest mean activation there, so that experts overlap. Here
    every neuron is in one expert, for together they are to be the dense layer, and a domain may have several: all get
    equally many experts, or the first ones one more.
    """
    domains, count = neurons.rates.shape
    width = count // experts
    own = experts_of_domains(experts, domains)
    share_PF = neurons.rates / neurons.rates.sum(dim=0).clamp(min=1e-9)
    domain_F = assign(-share_PF.T.double().numpy(), [number * width for number in own])
    labels, first = np.empty(count, dtype=np.int64), 0
    for place, number in enumerate(own):
        members = np.flatnonzero(domain_F == place)
        marks_MF = neurons.marks[neurons.domain_ids == place][:, torch.from_numpy(members)]
        labels[members] = first + balanced_kmeans(marks_MF.T.float(), number, seed)
        first += number
    return labels


def experts_of_domains(experts: int, domains: int) -> list[int]:
    """How many experts each domain has by the criterion domain, in the order of their names."""
    return [experts // domains + (place < experts % domains) for place in range(domains)]
