"""Tensors of some experts and some slices of each, on one rank.

n experts · F expert hidden width · D model width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from moesaic.experts import ExpertWeights
from moesaic.parallel.fields import ExpertForm, Field
from moesaic.parallel.layout import ExpertLayout, chunk


class Holding:
    """Which experts, and which slices of them, tensors ``[n, ...]`` by field name hold.

    Args:
        experts: their numbers, the order of the tensors' first axis.
        slices: of the layout, one after the other.
    """

    def __init__(self, form: ExpertForm, layout: ExpertLayout, experts: Sequence[int], slices: range) -> None:
        self.form, self.layout, self.experts, self.slices = form, layout, experts, slices
        self._row = {expert: row for row, expert in enumerate(experts)}
        self._spans = {field.name: self._span(field, slices) for field in form.fields}

    def __contains__(self, part: tuple[int, int]) -> bool:
        expert, slice_ = part
        return expert in self._row and slice_ in self.slices

    def empty(self, like: Tensor) -> dict[str, Tensor]:
        """Tensors for it, with any values."""
        return {
            field.name: like.new_empty(len(self.experts), *field.sliced(len(self._spans[field.name])))
            for field in self.form.fields
        }

    def vector(self, tensors: Mapping[str, Tensor], expert: int, slice_: int) -> Tensor:
        """One slice of one expert, all its fields in a row."""
        parts = [self._view(field, tensors, expert, slice_).reshape(-1) for field in self.form.fields]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def put(self, tensors: Mapping[str, Tensor], expert: int, slice_: int, vector: Tensor) -> None:
        """The other way round: a vector into the tensors."""
        for view, part in self._parts(tensors, expert, slice_, vector):
            view.copy_(part.view(view.shape))

    def add(self, tensors: Mapping[str, Tensor], expert: int, slice_: int, vector: Tensor) -> None:
        """As :meth:`put`, onto what is there."""
        for view, part in self._parts(tensors, expert, slice_, vector):
            view.add_(part.view(view.shape))

    def weights(self, tensors: Mapping[str, Tensor]) -> ExpertWeights:
        """For a backend: partial sums of the experts' outputs where the holding has not all slices."""
        bias = tensors.get("down_bias")
        if bias is None or len(self.slices) == self.layout.slices:
            return self.form.weights(tensors)
        span = self._spans["down_bias"]
        d_model = next(field.shape[field.axis] for field in self.form.fields if field.name == "down_bias")
        # Every slice adds its own columns of the bias, so that the sum over the slices adds each once.
        return self.form.weights({**tensors, "down_bias": functional.pad(bias, (span.start, d_model - span.stop))})

    def _span(self, field: Field, slices: range) -> range:
        length, parts = field.shape[field.axis], self.layout.slices
        return range(chunk(length, parts, slices[0]).start, chunk(length, parts, slices[-1]).stop)

    def _view(self, field: Field, tensors: Mapping[str, Tensor], expert: int, slice_: int) -> Tensor:
        row = tensors[field.name][self._row[expert]]
        if len(self.slices) == 1:
            return row
        span = self._span(field, range(slice_, slice_ + 1))
        return row.narrow(field.axis, span.start - self._spans[field.name].start, len(span))

    def _parts(
        self, tensors: Mapping[str, Tensor], expert: int, slice_: int, vector: Tensor
    ) -> list[tuple[Tensor, Tensor]]:
        views = [self._view(field, tensors, expert, slice_) for field in self.form.fields]
        parts = vector.split([view.numel() for view in views])
        return list(zip(views, parts, strict=True))
