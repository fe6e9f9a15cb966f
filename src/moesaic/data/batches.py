"""Tokens -> batches, as a pure function of (seed, step): to resume is to ask for the next step."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from moesaic.errors import ConfigError, DataError, did_you_mean

PERIOD = 4096
"""Rows after which the mixture repeats exactly; shares are rounded to 1/4096."""


class Batches:
    """Batches of training windows, by step.

    A window is ``sequence_length + 1`` tokens; it shares one token with the next, so that within an epoch
    every token is predicted at most once. Each domain goes through its windows epoch by epoch, in an order
    shuffled anew for each; the windows of an epoch start at an offset of its own, so that no token is always
    at a border.

    ``tokens`` maps a domain to its ids [n]. ``mixture`` maps domains to shares of the rows, in any unit
    (default: proportional to the tokens); domains that it does not name are left out. ``batch(step)`` depends
    on the seed, the step and the tokens only: not on earlier calls, nor on any library's random stream.

    Raises :class:`DataError` where a domain is shorter than one window, :class:`ConfigError` for a mixture
    with an unknown domain or unusable shares, and for a size under 1.
    """

    def __init__(
        self,
        tokens: Mapping[str, npt.NDArray[Any]],
        *,
        sequence_length: int,
        batch_size: int,
        seed: int,
        mixture: Mapping[str, float] | None = None,
    ) -> None:
        if batch_size < 1:
            raise ConfigError(f"batch_size is {batch_size}; allowed: 1 or more")
        shares = _shares(tokens, mixture)
        self.sequence_length = sequence_length
        self.batch_size = batch_size
        self.seed = seed
        self._streams = [_Stream(name, tokens[name], sequence_length, seed) for name in shares]
        self._quotas = _rounded(list(shares.values()), PERIOD)
        self.mixture = {name: int(rows) / PERIOD for name, rows in zip(shares, self._quotas, strict=True)}
        # Blocks are asked for one after the other; a cache of the object's own goes away with it.
        self._block = lru_cache(maxsize=2)(self._plan_block)

    def batch(self, step: int) -> torch.LongTensor:
        """Token ids of one step, int64 [batch_size, sequence_length + 1]."""
        rows = [self._streams[stream].window(number) for stream, number in self._rows(step)]
        return torch.from_numpy(np.stack(rows).astype(np.int64))  # type: ignore[return-value]

    def domains(self, step: int) -> list[str]:
        """The domain of each row of ``batch(step)``."""
        return [self._streams[stream].name for stream, _ in self._rows(step)]

    def _rows(self, step: int) -> list[tuple[int, int]]:
        """(stream, number of the window within the stream's endless sequence) of each row of a step."""
        if step < 0:
            raise ConfigError(f"step is {step}; allowed: 0 or more")
        first = step * self.batch_size
        rows = []
        for row in range(first, first + self.batch_size):
            block, place = divmod(row, PERIOD)
            streams, ranks = self._block(block)
            stream = int(streams[place])
            rows.append((stream, block * int(self._quotas[stream]) + int(ranks[place])))
        return rows

    def _plan_block(self, block: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Stream, and rank among the stream's rows, of each of the PERIOD rows of a block.

        Each stream's rows are spread evenly and then shifted at random within their share of the block: a
        batch is closer to the mixture than one of independent draws would be.
        """
        streams = np.repeat(np.arange(len(self._quotas)), self._quotas)
        ranks = np.concatenate([np.arange(quota) for quota in self._quotas])
        jitter = _random(PERIOD, f"{self.seed}/mixture/{block}").astype(np.float64) / 2**64
        order = np.argsort((ranks + jitter) / self._quotas[streams], kind="stable")
        return streams[order], _rank_within(streams[order])


class _Stream:
    """The windows of one domain, one epoch after the other without end."""

    def __init__(self, name: str, tokens: npt.NDArray[Any], sequence_length: int, seed: int) -> None:
        self.name, self.tokens, self.length, self.seed = name, tokens, sequence_length, seed
        self.windows = count_windows(name, tokens, sequence_length)
        self._epoch = lru_cache(maxsize=2)(self._plan_epoch)

    def window(self, number: int) -> npt.NDArray[Any]:
        epoch, place = divmod(number, self.windows)
        offset, order = self._epoch(epoch)
        start = offset + int(order[place]) * self.length
        return self.tokens[start : start + self.length + 1]

    def _plan_epoch(self, epoch: int) -> tuple[int, npt.NDArray[np.intp]]:
        key = f"{self.seed}/{self.name}/{epoch}"
        spare = len(self.tokens) - 1 - self.windows * self.length
        offset = int(_random(1, f"{key}/offset")[0] % np.uint64(spare + 1))
        return offset, np.argsort(_random(self.windows, f"{key}/order"), kind="stable")


def count_windows(name: str, tokens: npt.NDArray[Any], sequence_length: int) -> int:
    """Windows of ``sequence_length + 1`` tokens that share one token with the next; at least one."""
    if sequence_length < 1:
        raise ConfigError(f"sequence_length is {sequence_length}; allowed: 1 or more")
    windows = (len(tokens) - 1) // sequence_length
    if windows < 1:
        raise DataError(
            f"domain {name!r} has {len(tokens)} tokens; one sequence of {sequence_length} needs "
            f"{sequence_length + 1}: give more text or a shorter sequence"
        )
    return windows


def validation_windows(
    tokens: Mapping[str, npt.NDArray[Any]],
    sequence_length: int,
    limit: int | None = None,
    *,
    batch_size: int = 8,
) -> Iterator[tuple[str, torch.LongTensor]]:
    """(domain, token ids [B, sequence_length + 1]) of all windows, domain by domain, in a fixed order.

    B is ``batch_size``, and less in a domain's last batch. Within a domain every token but the first and the
    last few is predicted exactly once. ``limit`` is the largest number of windows per domain: fewer than
    there are stand evenly spread over the domain.

    Raises (at the call, before the first batch) :class:`DataError` where a domain is shorter than one window.
    """
    if batch_size < 1 or (limit is not None and limit < 1):
        raise ConfigError(f"batch_size is {batch_size} and limit is {limit}; allowed: 1 or more")
    if not tokens:
        raise DataError("there are no validation tokens: the validation split is empty")
    starts = {}
    for name, ids in tokens.items():
        windows = count_windows(name, ids, sequence_length)
        wanted = min(windows, limit or windows)
        starts[name] = [number * windows // wanted * sequence_length for number in range(wanted)]
    return _cut_windows(tokens, sequence_length, batch_size, starts)


def _cut_windows(
    tokens: Mapping[str, npt.NDArray[Any]],
    sequence_length: int,
    batch_size: int,
    starts: Mapping[str, list[int]],
) -> Iterator[tuple[str, torch.LongTensor]]:
    for name, places in starts.items():
        for first in range(0, len(places), batch_size):
            rows = [tokens[name][at : at + sequence_length + 1] for at in places[first : first + batch_size]]
            yield name, torch.from_numpy(np.stack(rows).astype(np.int64))  # type: ignore[misc]


def _shares(tokens: Mapping[str, npt.NDArray[Any]], mixture: Mapping[str, float] | None) -> dict[str, float]:
    """The share of each domain that takes part, by name, adding up to 1."""
    if not tokens:
        raise DataError("there are no tokens to make batches of")
    if mixture is None:
        mixture = {name: float(len(ids)) for name, ids in tokens.items()}
    for name, share in mixture.items():
        if name not in tokens:
            raise ConfigError(f"unknown domain {name!r} in the mixture: {did_you_mean(name, tokens)}")
        if not (math.isfinite(share) and share >= 0):
            raise ConfigError(f"the share of domain {name!r} in the mixture is {share}; allowed: 0 or more")
    total = sum(mixture.values())
    if total <= 0:
        raise ConfigError("all shares of the mixture are 0; at least one must be larger")
    # Sorted, so that the order in which domains are named does not change the batches.
    return {name: mixture[name] / total for name in sorted(mixture) if mixture[name] > 0}


def _rounded(shares: list[float], total: int) -> npt.NDArray[np.int64]:
    """Integers in proportion to ``shares`` that add up to ``total``, each at least 1 (largest remainders)."""
    exact = np.array(shares) * (total - len(shares))
    rounded: npt.NDArray[np.int64] = np.floor(exact).astype(np.int64)
    largest_remainders = np.argsort(rounded - exact, kind="stable")
    rounded[largest_remainders[: total - len(shares) - int(rounded.sum())]] += 1
    rounded += 1
    return rounded


def _rank_within(streams: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """For each place, how often its value stands before it."""
    ranks = np.empty_like(streams)
    for stream in np.unique(streams):
        places = streams == stream
        ranks[places] = np.arange(places.sum())
    return ranks


def _random(count: int, key: str) -> npt.NDArray[np.uint64]:
    """``count`` distinct 64-bit numbers for a key (SplitMix64): their order is a random permutation.

    Written out because NumPy may change its generators' streams from version to version, which would change
    the batches of a run that is resumed. Source: "Fast Splittable Pseudorandom Number Generators", figure 17.
    """
    start = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")
    z = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(start)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
