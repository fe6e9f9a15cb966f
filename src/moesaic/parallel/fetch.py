"""Weights on their way to the ranks that compute with them, and their gradients on the way back.

Hecate's sparse all-gather and sparse reduce-scatter (Hecate: Unlocking Efficient Sparse Model Training via Fully
Sharded Sparse Data Parallelism, section 4): only the experts that a rank has tokens for travel, and only to it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.autograd.grad_mode import _unsafe_preserve_version_counter

from moesaic.parallel.exchange import Leg
from moesaic.parallel.holding import Holding
from moesaic.parallel.parcels import Parcel, Parcels
from moesaic.parallel.topology import Topology

Tensors = dict[str, Tensor]
Part = tuple[int, int]
"""(expert, slice)."""


class WeightGather:
    """The weights that a step needs beside a rank's own, into tensors that live until :meth:`free`.

    Args:
        phases: what this rank sends and receives, see ``Schedule.gather``.
        own: what this rank owns, and its tensors.
        wanted: what this rank computes with beside; own slices among them are copied.
    """

    def __init__(
        self, phases: Sequence[Parcels], topology: Topology, own: Holding, tensors: Tensors, wanted: Sequence[Holding]
    ) -> None:
        self._phases, self._topology, self._own, self.holdings = phases, topology, own, wanted
        like = next(iter(tensors.values()))
        self.tensors = [holding.empty(like) for holding in wanted]
        self._bytes = [{name: each.untyped_storage().nbytes() for name, each in held.items()} for held in self.tensors]
        self._pieces: dict[Part, list[tuple[int, Tensor]]] = {}
        self._leg: Leg | None = None
        self._phase = 0

    def start(self, tensors: Tensors) -> None:
        """Begin the first phase with the rank's own ``tensors``; a collective call."""
        self._pieces, self._phase = defaultdict(list), 0
        for held, sizes in zip(self.tensors, self._bytes, strict=True):
            for name, each in held.items():
                each.untyped_storage().resize_(sizes[name])
        self._fill_own(tensors)
        if self._phases:
            self._leg = self._send(
                self._phases[0],
                lambda parcel: self._own.vector(tensors, parcel.expert, parcel.slice_)[parcel.first : parcel.last],
                next(iter(tensors.values())),
            )

    def advance(self) -> None:
        """Wait for the first phase where there is a second, and begin that."""
        phases = self._phases
        if len(phases) < 2 or self._phase or self._leg is None:
            return
        self._phase = 1
        rows = self._leg.wait()
        self._take(phases[0], rows)
        passed_on = {(*part, first): piece for part, pieces in self._pieces.items() for first, piece in pieces}
        self._leg = self._send(phases[1], lambda parcel: passed_on[parcel.expert, parcel.slice_, parcel.first], rows)

    def wait(self) -> list[Tensors]:
        """The tensors of each wanted holding, filled; call :meth:`advance` before."""
        if self._leg is not None:
            self._take(self._phases[-1], self._leg.wait())
        for part, pieces in self._pieces.items():
            pieces.sort(key=lambda piece: piece[0])
            vector = pieces[0][1] if len(pieces) == 1 else torch.cat([piece for _, piece in pieces])
            self._put(part, vector)
        self._pieces, self._leg = {}, None
        return self.tensors

    def free(self) -> None:
        """Give the memory back; what autograd has saved of the tensors is there again after the next gather."""
        for held in self.tensors:
            for each in held.values():
                each.untyped_storage().resize_(0)

    def _fill_own(self, tensors: Tensors) -> None:
        for expert in self._own.experts:
            part = (expert, self._own.slices[0])
            if any(part in holding for holding in self.holdings):
                self._put(part, self._own.vector(tensors, *part))

    def _put(self, part: Part, vector: Tensor) -> None:
        for holding, held in zip(self.holdings, self.tensors, strict=True):
            if part in holding:
                # Autograd may have saved these tensors: their values come back, they do not change. In inference mode
                # it saves nothing, and counts no versions.
                inference = torch.is_inference_mode_enabled()
                with nullcontext() if inference else _unsafe_preserve_version_counter(tuple(held.values())):
                    holding.put(held, *part, vector)

    def _send(self, parcels: Parcels, piece_of: Callable[[Parcel], Tensor], like: Tensor) -> Leg:
        return _send(self._topology, parcels, piece_of, like, "weights")

    def _take(self, parcels: Parcels, rows: Tensor) -> None:
        for parcel, piece in _arrived(self._topology.rank, parcels, rows):
            self._pieces[parcel.expert, parcel.slice_].append((parcel.first, piece))


class GradientReturn:
    """The gradients of gathered weights back to their owners, summed on the way where the weights were relayed.

    Args:
        phases: of the weights' gather.
        own: what this rank owns; ``own_grads`` are its gradients, in the dtype of sums, onto which everything is added.
        held: the gathered holdings with their gradients.
        dtype: in which gradients travel.
    """

    def __init__(
        self,
        phases: Sequence[Parcels],
        topology: Topology,
        own: Holding,
        own_grads: Tensors,
        held: Sequence[tuple[Holding, Tensors]],
        dtype: torch.dtype,
    ) -> None:
        self._topology, self._own, self._own_grads, self._dtype = topology, own, own_grads, dtype
        # The weights' way backwards: what received sends.
        self._phases = [phase.turned() for phase in reversed(phases)]
        self._sums: dict[Part, Tensor] = {}
        self._leg: Leg | None = None
        for holding, grads in held:
            self._collect(holding, grads)

    def start(self) -> None:
        """Begin the first phase; a collective call."""
        if self._phases:
            self._leg = self._send(0)

    def finish(self) -> None:
        """Wait for everything, and add it to the owner's gradients."""
        if self._leg is None:
            return
        if len(self._phases) == 2:
            for parcel, piece in _arrived(self._topology.rank, self._phases[0], self._leg.wait()):
                self._sums[parcel.expert, parcel.slice_][parcel.first : parcel.last] += piece
            self._leg = self._send(1)
        totals: dict[Part, Tensor] = {}
        for parcel, piece in _arrived(self._topology.rank, self._phases[-1], self._leg.wait()):
            part = (parcel.expert, parcel.slice_)
            if part not in totals:
                zeros = self._own.vector(self._own_grads, *part)
                totals[part] = torch.zeros_like(zeros, dtype=sum_dtype(zeros))
            totals[part][parcel.first : parcel.last] += piece
        for part, total in totals.items():
            self._own.add(self._own_grads, *part, total)

    def _collect(self, holding: Holding, grads: Mapping[str, Tensor]) -> None:
        for expert in holding.experts:
            for slice_ in holding.slices:
                part, vector = (expert, slice_), holding.vector(grads, expert, slice_)
                if part in self._own:
                    self._own.add(self._own_grads, *part, vector)
                elif part in self._sums:
                    self._sums[part] += vector
                else:
                    # A copy of its own: sums of others' are added to it.
                    self._sums[part] = vector.to(sum_dtype(vector), copy=True)

    def _send(self, phase: int) -> Leg:
        like = next(iter(self._own_grads.values())).new_empty(0, dtype=self._dtype)
        parcels = self._phases[phase]
        return _send(
            self._topology,
            parcels,
            lambda parcel: self._sums[parcel.expert, parcel.slice_][parcel.first : parcel.last].to(like.dtype),
            like,
            "gradients",
        )


def _send(topology: Topology, parcels: Parcels, piece_of: Callable[[Parcel], Tensor], like: Tensor, kind: str) -> Leg:
    rank = topology.rank
    sends, receives = [0] * topology.size, [0] * topology.size
    sent = parcels.sent_by(rank)
    for parcel in sent:
        sends[parcel.receiver] += parcel.last - parcel.first
    for parcel in parcels.received_by(rank):
        receives[parcel.sender] += parcel.last - parcel.first
    pieces = [piece_of(parcel) for parcel in sent]
    return Leg(topology.group, torch.cat(pieces) if pieces else like.new_empty(0), sends, receives, rank, kind)


def _arrived(rank: int, parcels: Parcels, rows: Tensor) -> list[tuple[Parcel, Tensor]]:
    mine = parcels.received_by(rank)
    return list(zip(mine, rows.split([parcel.last - parcel.first for parcel in mine]), strict=True)) if mine else []


def sum_dtype(tensor: Tensor) -> torch.dtype:
    """Of sums of many such tensors, which are rounded once, at the end."""
    return torch.promote_types(tensor.dtype, torch.float32)
