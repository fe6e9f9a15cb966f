"""Neighbouring tokens that use the same experts: two losses that bring it about, two numbers that show it (BlockFFN).

T tokens · E experts · B sequences · S tokens each · L tokens a chunk. Where a routing does not know the length of its
sequences, its tokens are taken as one.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moesaic.errors import ConfigError
from moesaic.routing.balancing import BALANCERS, Balancer
from moesaic.routing.relu import ReLURouter
from moesaic.routing.router import Router
from moesaic.routing.routing import Routing


@BALANCERS.register("activation_locality")
class ActivationLocality(Balancer):
    """The experts of a token are those of the token before it (BlockFFN, its activation locality loss).

    ``BCE(σ(α a), σ(α b))``, averaged over the experts and over all pairs of a token (with logits a) and the next one in
    its sequence (with logits b): a steep sigmoid stands for "is active". Both tokens get a gradient, as in the authors'
    code. Padding is in no pair.

    Args:
        steepness: α; the authors' code has 100.
    """

    def __init__(self, *, steepness: float = 100.0) -> None:
        if steepness <= 0:
            raise ConfigError(f"steepness is {steepness}: it must be above 0")
        self.steepness = steepness

    def loss(self, routing: Routing, counts_E: Tensor) -> Tensor:
        assert routing.logits is not None
        logits_BSE = by_sequence(routing.logits * self.steepness, routing)
        here_BS = by_sequence(is_token(routing), routing)
        loss_BSE = nn.functional.binary_cross_entropy_with_logits(
            logits_BSE[:, :-1], logits_BSE[:, 1:].sigmoid(), reduction="none"
        )
        return mean_where(loss_BSE.mean(dim=-1), here_BS[:, :-1] & here_BS[:, 1:])

    @staticmethod
    def check(router: type[Router]) -> None:
        if not issubclass(router, ReLURouter):
            raise ConfigError(
                "the balancer 'activation_locality' needs a router whose experts are active where their logit is "
                f"positive ('relu'); {router.__name__} is none"
            )


@BALANCERS.register("chunk_sparsity")
class ChunkSparsity(Balancer):
    """The tokens of a chunk together use few experts (BlockFFN, its chunk sparsification loss).

    With the scores as the probabilities that an expert is active, ``1 - Π (1 - p)`` over the L tokens of a chunk is the
    probability that it is active at all: the loss is its mean over experts and chunks. Chunks do not cross sequences,
    and the last one of a sequence may be shorter; padding is active nowhere, and chunks of padding alone do not count.
    The paper lets the coefficient adapt to the loss; here it follows its schedule.

    Args:
        chunk_length: L. The authors train with 64 and report 8.
    """

    def __init__(self, *, chunk_length: int = 8) -> None:
        if chunk_length < 1:
            raise ConfigError(f"chunk_length is {chunk_length}: it must be at least 1")
        self.chunk_length = chunk_length

    def loss(self, routing: Routing, counts_E: Tensor) -> Tensor:
        here_T = is_token(routing)
        p_TE = torch.where(here_T.unsqueeze(-1), routing.scores, 0.0)
        # Not ln(1 - p): that is without bounds where one token is sure.
        idle_BSE = by_sequence(torch.log1p(p_TE * (1e-5 - 1)), routing)
        idle_BNLE = by_chunk(idle_BSE, self.chunk_length)
        here_BNL = by_chunk(by_sequence(here_T, routing), self.chunk_length)
        return mean_where(1 - idle_BNLE.sum(dim=2).exp().mean(dim=-1), here_BNL.any(dim=-1))


def token_sparsity(routing: Routing, token_mask: Tensor | None = None) -> Tensor:
    """Float32 scalar: the share of the FFN experts that a token leaves alone, its mean over the tokens.

    Args:
        token_mask: ``[T]`` or ``[B, S]`` boolean, False for tokens that do not count; those of ``routing.token_mask``
            by default. NaN where none counts.
    """
    active_TE = active_experts(routing)
    return 1 - _mean_or_nan(active_TE, _mask(routing, token_mask))


def chunk_sparsity(routing: Routing, chunk_length: int = 8, token_mask: Tensor | None = None) -> Tensor:
    """Float32 scalar: the share of the FFN experts that all tokens of a chunk leave alone, its mean over the chunks.

    Args:
        chunk_length: tokens of one sequence that follow each other. Chunks that are shorter do not count.
        token_mask: as in :func:`token_sparsity`; chunks with a token that does not count do not count either. NaN where
            there is no whole chunk.
    """
    whole = (routing.sequence_length or routing.expert_ids.shape[0]) // chunk_length * chunk_length
    active_BSE = by_sequence(active_experts(routing), routing)[:, :whole]
    here_BS = by_sequence(_mask(routing, token_mask), routing)[:, :whole]
    active_BNE = by_chunk(active_BSE, chunk_length).any(dim=2)
    return 1 - _mean_or_nan(active_BNE, by_chunk(here_BS, chunk_length).all(dim=2))


def active_experts(routing: Routing) -> Tensor:
    """``[T, E]`` boolean: which FFN experts a token uses."""
    shape = (routing.expert_ids.shape[0], routing.num_experts + 1)
    active = torch.zeros(shape, dtype=torch.bool, device=routing.expert_ids.device)
    return active.scatter_(1, routing.expert_ids, True)[:, : routing.num_ffn or routing.num_experts]


def is_token(routing: Routing) -> Tensor:
    """``[T]`` boolean: False for padding; all True where no layer has told which tokens are (a token may well have
    taken no expert)."""
    return _mask(routing, routing.token_mask)


def by_sequence(values: Tensor, routing: Routing) -> Tensor:
    """``[T, ...]`` to ``[B, S, ...]``."""
    length = routing.sequence_length or values.shape[0]
    return values.view(values.shape[0] // max(length, 1), length, *values.shape[1:])


def by_chunk(values: Tensor, chunk_length: int) -> Tensor:
    """``[B, S, ...]`` to ``[B, N, L, ...]``; the last chunk is filled up with zeros."""
    missing = -values.shape[1] % chunk_length
    filler = values.new_zeros(values.shape[0], missing, *values.shape[2:])
    num_chunks = (values.shape[1] + missing) // chunk_length  # by hand: of nothing, -1 cannot be told
    return torch.cat([values, filler], dim=1).view(values.shape[0], num_chunks, chunk_length, *values.shape[2:])


def mean_where(values: Tensor, counts: Tensor) -> Tensor:
    """Mean of the values where the boolean ``counts`` is True; 0 where it is nowhere."""
    return torch.where(counts, values, 0.0).sum() / counts.sum().clamp(min=1)


def _mean_or_nan(active: Tensor, counts: Tensor) -> Tensor:
    used = (active & counts.unsqueeze(-1)).sum()
    return used.float() / (counts.sum() * active.shape[-1])


def _mask(routing: Routing, token_mask: Tensor | None) -> Tensor:
    num_tokens, device = routing.expert_ids.shape[0], routing.expert_ids.device
    if token_mask is None:
        token_mask = routing.token_mask
    if token_mask is None:
        return torch.ones(num_tokens, dtype=torch.bool, device=device)
    return token_mask.reshape(num_tokens).to(device, torch.bool)
