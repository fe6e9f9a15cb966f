"""Validation: loss and perplexity of a causal language model, domain by domain."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt
import torch
from torch import nn

from moesaic.data import TokenData, validation_windows
from moesaic.errors import ConfigError
from moesaic.train.loss import token_losses
from moesaic.train.precision import autocast
from moesaic.train.world import World


@dataclass(frozen=True)
class DomainResult:
    """What a model makes of one domain.

    Attributes:
        loss: mean cross entropy in nats per token.
        perplexity: ``exp(loss)``.
        tokens: how many were predicted.
        bits_per_byte: the loss per byte of text, which models with different tokenizers share; None where the number of
            bytes is not known. Taken from the domain's mean number of bytes per token.
    """

    loss: float
    perplexity: float
    tokens: int
    bits_per_byte: float | None = None


@torch.no_grad()
def evaluate(
    model: nn.Module,
    tokens: Mapping[str, npt.NDArray[Any]],
    *,
    sequence_length: int,
    batch_size: int = 8,
    max_tokens: int | None = None,
    precision: str = "fp32",
    bytes_per_token: Mapping[str, float] | None = None,
    world: World | None = None,
) -> dict[str, DomainResult]:
    """Loss per domain over windows of ``sequence_length`` predicted tokens, without padding; deterministic.

    The model is left in the mode (training or not) in which it came. What fills no window at a domain's end does not
    count.

    Args:
        model: any transformers causal language model.
        tokens: domain to token ids ``[n]``.
        max_tokens: predict about so many per domain, in windows spread over it; None for all.
        precision: ``"fp32"`` (as the weights are) or ``"bf16"`` (autocast); the loss is float32 in both.
        bytes_per_token: of each domain, for ``bits_per_byte``.
        world: the ranks that the model is parallelized over: each takes its share of every batch, and all get the
            same result.

    Raises:
        DataError: where a domain is shorter than one window.
        ConfigError: for an unknown precision, a size out of range, or windows longer than the model has positions.
    """
    windows = windows_for(
        (model,), tokens, sequence_length=sequence_length, batch_size=batch_size, max_tokens=max_tokens
    )
    device = next(model.parameters()).device
    world = world or World()
    sums: dict[str, float] = dict.fromkeys(tokens, 0.0)
    counts: dict[str, int] = dict.fromkeys(tokens, 0)
    was_training = model.training
    model.eval()
    try:
        with autocast(device, precision):
            for domain, ids in windows:
                mine = world.share(len(ids))
                # All ranks run the model together: who has no sequence left runs one that does not count.
                ids_on_device = ids[mine if mine.start < mine.stop else slice(1)].to(device)
                logits = model(input_ids=ids_on_device[:, :-1], use_cache=False).logits
                losses = token_losses(logits, ids_on_device[:, 1:])[: mine.stop - mine.start]
                sums[domain] += float(losses.double().sum())
                counts[domain] += losses.numel()
    finally:
        model.train(was_training)
    totals = world.sums([*sums.values(), *counts.values()])
    found = zip(tokens, totals, totals[len(sums) :], strict=False)
    return {name: result_of(total, int(count), (bytes_per_token or {}).get(name)) for name, total, count in found}


def windows_for(
    models: Sequence[nn.Module],
    tokens: Mapping[str, npt.NDArray[Any]],
    *,
    sequence_length: int,
    batch_size: int,
    max_tokens: int | None,
) -> Iterator[tuple[str, torch.LongTensor]]:
    """The windows that :func:`evaluate` runs, where all ``models`` can run them; raises as it does."""
    for name, value in (("max_tokens", max_tokens), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise ConfigError(f"{name} is {value}: it must be at least 1")
    positions = min((told for told in map(model_positions, models) if told is not None), default=None)
    if positions is not None and sequence_length > positions:
        raise ConfigError(
            f"sequence_length is {sequence_length}: it must be at most {positions}, the tokens that the model has "
            "positions for"
        )
    limit = max(1, max_tokens // sequence_length) if max_tokens and sequence_length > 0 else None
    return validation_windows(tokens, sequence_length, limit, batch_size=batch_size)


def result_of(total: float, count: int, bytes_per_token: float | None) -> DomainResult:
    """The result of ``count`` tokens whose losses add up to ``total`` nats."""
    loss = total / count
    perplexity = math.exp(loss) if loss < 700 else math.inf  # exp overflows from 710 on
    return DomainResult(loss, perplexity, count, loss / math.log(2) / bytes_per_token if bytes_per_token else None)


def bytes_per_token(data: TokenData, sides: Sequence[str] = ("validation",)) -> dict[str, float]:
    """Mean number of UTF-8 bytes that one token stands for, by domain."""
    means = {}
    for domain in {name for side in sides for name in data.counts[side]}:
        counts = [data.counts[side][domain] for side in sides if domain in data.counts[side]]
        means[domain] = sum(count.bytes for count in counts) / sum(count.tokens for count in counts)
    return means


def model_positions(model: Any) -> int | None:
    """The longest sequence that a model, or a configuration's, has positions for; None where that does not say."""
    config: Any = getattr(model, "config", model)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    told = [getattr(text, name, None) for name in ("max_position_embeddings", "n_positions")]
    return next((value for value in told if isinstance(value, int) and value > 0), None)
