"""The tensors of an expert in the form in which they are sharded and travel: with the hidden width as one axis.

D model width · F expert hidden width · n experts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from moesaic.experts import ExpertWeights


@dataclass(frozen=True)
class Field:
    """One tensor of a whole expert in its canonical shape.

    Attributes:
        name: of the tensor in :class:`ExpertWeights`: up, down, up_bias, down_bias.
        shape: canonical: a gate and an up projection that are concatenated (or interleaved) stand on an axis of their
            own, as in ``(2, F, D)`` for ``up`` ``[E, 2F, D]``.
        axis: the one that is split over slices: the hidden width; for ``down_bias`` the model width, of which every
            slice adds a part.
        joined: the first of two adjacent axes that a backend sees as one (the pair of gate and up, and F), or None.
    """

    name: str
    shape: tuple[int, ...]
    axis: int
    joined: int | None = None

    def sliced(self, width: int) -> tuple[int, ...]:
        """The shape with ``width`` in the place of the split axis."""
        return (*self.shape[: self.axis], width, *self.shape[self.axis + 1 :])

    def elements(self, width: int | None = None) -> int:
        """Elements of one expert, or of a slice of it."""
        return math.prod(self.shape if width is None else self.sliced(width))

    def canonical(self, stored: Tensor) -> Tensor:
        """A view of experts' tensors ``[n, ...]`` as a module stores them, with their whole width."""
        first = self.joined
        return stored if first is None else stored.unflatten(first + 1, self.shape[first : first + 2])

    def stored(self, canonical: Tensor) -> Tensor:
        """The other way round: a view where they are contiguous."""
        return canonical if self.joined is None else canonical.flatten(self.joined + 1, self.joined + 2)


@dataclass(frozen=True)
class ExpertForm:
    """How the tensors of a layer's experts are laid out, and what they are in the hands of a backend.

    Attributes:
        template: everything about the experts but their tensors, which are empty.
        fields: their tensors.
    """

    template: ExpertWeights
    fields: Sequence[Field]

    @property
    def d_model(self) -> int:
        (down,) = [field for field in self.fields if field.name == "down"]
        return down.shape[1 - down.axis]

    def weights(self, tensors: Mapping[str, Tensor]) -> ExpertWeights:
        """Canonical tensors ``[n, ...]`` by field name, of any n experts and any part of the hidden width, for a
        backend. No copy where they are contiguous."""
        given: dict[str, Any] = {}
        for field in self.fields:
            given[field.name] = field.stored(tensors[field.name])
        return replace(self.template, **given)
