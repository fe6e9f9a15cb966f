"""The counts exchange: the one small message by which all ranks come to know the same of a step.

W ranks · E experts · B blocks of experts · T tokens · K slots per token.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from moesaic.errors import ParallelError
from moesaic.parallel.layout import ExpertLayout
from moesaic.parallel.sent import count
from moesaic.parallel.topology import Topology
from moesaic.parallel.workload import IntArray

# PyTorch has renamed it.
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
# Up to so many ranks on CPUs each sends to all at once: Gloo's all-gather hands on from one to the next, which took
# over twice as long with 4 and 8 ranks.
_AT_ONCE = 64
# What a rank says beside its counts, in this order: words of 32 bits, of 64, and 32-bit floating-point seconds.
_WORDS, _SECONDS = ("tokens", "grad", "timed"), ("forward", "backward")
_LONG_WORDS = ("layer", "wish", "state", "forward_start", "backward_start")


@dataclass(frozen=True)
class Told:
    """What all ranks have told each other.

    Attributes:
        counts_WE: slots as they will be computed. asked_WE: before capacity dropped any.
        rows_WB, tokens_W: see :class:`Workload`.
        grad: whether a backward pass will follow.
        timed: number of the latest decision that all ranks have timed, or 0.
        forward_W, backward_W: its seconds, see :func:`_spans`.
    """

    counts_WE: IntArray
    asked_WE: IntArray
    rows_WB: IntArray
    tokens_W: IntArray
    grad: bool
    timed: int
    forward_W: tuple[float, ...]
    backward_W: tuple[float, ...]


@dataclass(frozen=True)
class Message:
    """What this rank has to tell.

    Attributes:
        counts_E, asked_E, rows_B: int64; asked_E is None where no capacity drops slots, alike on all ranks.
        layer, wish, state: numbers that must be the same on all ranks: of the layer and its sizes, of what the user
            wishes for, and of what decisions depend on.
        timed: a decision, 0 where there is none. forward, backward: its seconds; forward_start, backward_start: when
            the passes began, nanoseconds of this machine's monotonic clock.
    """

    counts_E: Tensor
    asked_E: Tensor | None
    rows_B: Tensor
    tokens: int
    grad: bool
    layer: int
    wish: int
    state: int
    timed: int
    forward: float
    backward: float
    forward_start: int = 0
    backward_start: int = 0


def message_bytes(layout: ExpertLayout) -> int:
    """The size of what a rank tells of a step in which no capacity drops slots."""
    return 4 * (layout.num_experts + layout.blocks + len(_WORDS) + 2 * len(_LONG_WORDS) + len(_SECONDS))


def tell(message: Message, layout: ExpertLayout, topology: Topology, name: str) -> Told:
    """Exchange messages; a collective call.

    Raises:
        ParallelError: where the ranks are not at the same layer, wish for different strategies, differ in whether they
            compute gradients, or have come to different decisions: which ranks, and in what.
    """
    own = _packed(message)
    all_W = own.new_empty(topology.size * own.numel())
    count("counts", (topology.size - 1) * own.nbytes)
    if topology.device == "cpu" and topology.size <= _AT_ONCE:
        dist.all_to_all_single(all_W, own.repeat(topology.size), group=topology.group)
    else:
        _all_gather(all_W, own, group=topology.group)
    told = all_W.view(topology.size, -1).cpu().numpy()
    experts = layout.num_experts
    sizes = (experts, 0 if message.asked_E is None else experts, layout.blocks, len(_WORDS), 2 * len(_LONG_WORDS))
    counts_WE, asked_WE, rows_WB, words, long_words, seconds = np.split(told, np.cumsum(sizes), axis=1)
    by_word = dict(zip(_WORDS, words.T.astype(np.int64), strict=True))
    by_word |= dict(zip(_LONG_WORDS, np.ascontiguousarray(long_words).view(np.int64).T, strict=True))
    _check(by_word, topology, name)
    forward_W, backward_W = np.ascontiguousarray(seconds).view(np.float32).T.tolist()
    same = bool((by_word["timed"] == by_word["timed"][0]).all())
    return Told(
        counts_WE=counts_WE.astype(np.int64),
        asked_WE=(counts_WE if message.asked_E is None else asked_WE).astype(np.int64),
        rows_WB=rows_WB.astype(np.int64),
        tokens_W=by_word["tokens"],
        grad=bool(by_word["grad"][0]),
        timed=int(by_word["timed"][0]) if same else 0,
        forward_W=_spans(by_word["forward_start"], forward_W, topology.machines),
        backward_W=_spans(by_word["backward_start"], backward_W, topology.machines),
    )


def _packed(message: Message) -> Tensor:
    """The message as int32: every rank gets it of every other one, so it should be small."""
    words = torch.tensor([message.tokens, int(message.grad), message.timed], dtype=torch.int32)
    numbers = [message.layer, message.wish, message.state, message.forward_start, message.backward_start]
    long_words = torch.tensor(numbers, dtype=torch.int64)
    seconds = torch.tensor([message.forward, message.backward], dtype=torch.float32)
    beside = torch.cat([words, long_words.view(torch.int32), seconds.view(torch.int32)])
    counts = [each for each in (message.counts_E, message.asked_E, message.rows_B) if each is not None]
    return torch.cat([*(each.int() for each in counts), beside.to(message.counts_E.device)])


def _spans(start_W: IntArray, seconds_W: list[float], machines: tuple[int, ...]) -> tuple[float, ...]:
    """Seconds from when the first rank of a machine began to when its last one was done, for each of its ranks.

    Ranks that share cores take turns: each may have been quick, and all of them together slow. Where clocks cannot be
    compared (time namespaces), the slowest rank's own time.
    """
    spans = list(seconds_W)
    for machine in set(machines):
        members = [rank for rank, here in enumerate(machines) if here == machine and seconds_W[rank] > 0.0]
        if members:
            longest = max(seconds_W[rank] for rank in members)
            began = min(int(start_W[rank]) for rank in members)
            span = max(int(start_W[rank]) - began + 1e9 * seconds_W[rank] for rank in members) / 1e9
            for rank in members:
                spans[rank] = span if span <= len(members) * longest else longest
    return tuple(spans)


def number_of(text: str) -> int:
    """A number that stands for a text in messages."""
    return zlib.crc32(text.encode())


def _check(by_word: dict[str, IntArray], topology: Topology, name: str) -> None:
    told = {
        "layer": "are at another layer, or one of other sizes",
        "grad": "differ in whether they compute gradients (torch.no_grad, requires_grad)",
        "wish": "wish for another strategy (use_strategy must be called alike everywhere)",
        "state": "have come to other decisions, which is a defect of moesaic",
    }
    for word, reason in told.items():
        values_W = by_word[word]
        others = np.flatnonzero(values_W != values_W[0])
        if len(others):
            ranks = ", ".join(str(topology.global_ranks[rank]) for rank in others)
            raise ParallelError(
                f"the ranks do not agree in {name}: {ranks} {reason} than rank {topology.global_ranks[0]}"
            )
