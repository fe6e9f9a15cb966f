"""The counts exchange: the one small message by which all ranks come to know the same of a step.

W ranks · E experts · B blocks of experts · T tokens · K slots per token.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from moesaic.errors import ParallelError
from moesaic.parallel.layout import ExpertLayout
from moesaic.parallel.liveness.suspects import listed
from moesaic.parallel.sent import count
from moesaic.parallel.topology import Topology
from moesaic.parallel.workload import IntArray

# PyTorch has renamed it.
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
# Up to so many ranks on CPUs each sends to all at once: Gloo's all-gather hands on from one to the next, which took
# over twice as long with 4 and 8 ranks.
_AT_ONCE = 64
# What a rank says beside its counts. The first five must be alike on all ranks.
_HEADER = np.dtype(
    [
        ("layer", "i8"),
        ("wish", "i8"),
        ("state", "i8"),
        ("grad", "i4"),
        ("asked", "i4"),
        ("forward_start", "i8"),
        ("backward_start", "i8"),
        ("tokens", "i4"),
        ("timed", "i4"),
        ("forward", "f4"),
        ("backward", "f4"),
    ]
)
_WORDS = _HEADER.itemsize // 4  # of 32 bits, as all else in a message
_ALIKE = {
    "layer": "are at another layer, or one of other sizes or precision, than",
    "grad": "differ in whether they compute gradients, and of what (torch.no_grad, requires_grad), from",
    "asked": "differ in whether a capacity may drop slots from",
    "wish": "wish for another strategy (use_strategy, replay, use_tuning, torch.use_deterministic_algorithms must be "
    "called alike everywhere) than",
    "state": "have come to other decisions, which is a defect of moesaic, than",
}
_AGREED = sum(_HEADER[word].itemsize for word in _ALIKE) // 4


@dataclass(frozen=True)
class Told:
    """What all ranks have told each other.

    Attributes:
        counts_WE: slots as they will be computed. asked_WE: before capacity dropped any; of more columns than E where
            the router may choose others beside these experts.
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
        counts_E, asked_E, rows_B: int64; asked_E is None where no capacity drops slots and there are no columns beside
            these experts.
        grad: whether a backward pass will follow. learns: whether it gives gradients of the experts.
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
    learns: bool
    layer: int
    wish: int
    state: int
    timed: int
    forward: float
    backward: float
    forward_start: int = 0
    backward_start: int = 0


def message_words(layout: ExpertLayout, *, asked: int = 0) -> int:
    """Words of 32 bits that a message takes; ``asked``: columns of the slots before capacity."""
    return _WORDS + layout.num_experts + layout.blocks + asked


def message_bytes(layout: ExpertLayout) -> int:
    """The size of what a rank tells of a step in which no capacity drops slots."""
    return 4 * message_words(layout)


def tell(message: Message, layout: ExpertLayout, topology: Topology, name: str) -> Told:
    """Exchange messages; a collective call.

    All messages over a topology have the same length, that of the longest one so far, so that ranks which are at
    different layers find that out instead of being ended by a transport that gets more than it waits for.

    Raises:
        ParallelError: where the ranks are not at the same layer, wish for different strategies, differ in what they
            compute gradients of, or have come to different decisions: which ranks, and in what.
    """
    experts, blocks, asked_E = layout.num_experts, layout.blocks, message.asked_E
    topology.letter.fit(message_words(layout))  # done by ParallelExperts, but for topologies made by hand
    told = _all_told(_packed(message, topology.letter.words), topology)
    header_W = np.ascontiguousarray(told[:, :_WORDS]).view(_HEADER)[:, 0]
    if (told[:, :_AGREED] != told[0, :_AGREED]).any():
        raise ParallelError(_disagreement(header_W, topology, name))
    counts_WE, rows_WB = (told[:, _WORDS:][:, part] for part in (slice(experts), slice(experts, experts + blocks)))
    asked_WE = counts_WE if asked_E is None else told[:, _WORDS + experts + blocks :][:, : len(asked_E)]
    if asked_E is not None and topology.letter.fit(message_words(layout, asked=len(asked_E))):
        asked_WE = _all_told(asked_E.int(), topology)  # this once: from now on there is room for it
    timed_W = header_W["timed"]
    same = bool((timed_W == timed_W[0]).all())
    return Told(
        counts_WE=counts_WE.astype(np.int64),
        asked_WE=asked_WE.astype(np.int64),
        rows_WB=rows_WB.astype(np.int64),
        tokens_W=header_W["tokens"].astype(np.int64),
        grad=bool(header_W["grad"][0] & 1),
        timed=int(timed_W[0]) if same else 0,
        forward_W=_spans(header_W["forward_start"], header_W["forward"].tolist(), topology.machines),
        backward_W=_spans(header_W["backward_start"], header_W["backward"].tolist(), topology.machines),
    )


def _all_told(own: Tensor, topology: Topology) -> npt.NDArray[np.int32]:
    """``[W, words]``: what each rank says."""
    all_W = own.new_empty(topology.size * own.numel())
    count("counts", (topology.size - 1) * own.nbytes)
    if topology.device == "cpu" and topology.size <= _AT_ONCE:
        dist.all_to_all_single(all_W, own.repeat(topology.size), group=topology.group)
    else:
        _all_gather(all_W, own, group=topology.group)
    told: npt.NDArray[np.int32] = all_W.view(topology.size, -1).cpu().numpy()
    return told


def _packed(message: Message, words: int) -> Tensor:
    """The message as int32: every rank gets it of every other one, so it should be small."""
    beside = {
        **{word: getattr(message, word) for word in _HEADER.names or () if word not in ("grad", "asked")},
        "grad": message.grad + 2 * message.learns,
        "asked": 0 if message.asked_E is None else len(message.asked_E),
    }
    header = np.array([tuple(beside[word] for word in _HEADER.names or ())], dtype=_HEADER)
    own = message.counts_E.new_zeros(words, dtype=torch.int32)
    own[:_WORDS] = torch.from_numpy(header.view(np.int32))
    first = _WORDS
    for counts in (message.counts_E, message.rows_B, message.asked_E):
        if counts is not None and first + len(counts) <= words:
            own[first : first + len(counts)] = counts
            first += len(counts)
    return own


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


def _disagreement(header_W: npt.NDArray[np.void], topology: Topology, name: str) -> str:
    for word, reason in _ALIKE.items():
        others = np.flatnonzero(header_W[word] != header_W[word][0])
        if len(others):
            ranks = listed([str(topology.global_ranks[rank]) for rank in others], ", ")
            return f"the ranks do not agree in {name}: {ranks} {reason} rank {topology.global_ranks[0]}"
    return f"the ranks do not agree in {name}"
