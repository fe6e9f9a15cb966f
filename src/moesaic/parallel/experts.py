"""The experts of one layer over many ranks: tell each other the counts, choose a plan, carry it out.

T tokens · D model width · E experts · K slots per token · W ranks. Follow a token: :meth:`ParallelExperts.__call__`
here, ``tell`` in ``counts.py``, ``Chooser.choose`` in ``choice/chooser.py``, ``Call`` in ``execute.py``.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from moesaic.autotune.setting import is_tuning_on
from moesaic.experts import Choice
from moesaic.parallel.choice.chooser import Chooser
from moesaic.parallel.choice.decisions import Decision, replaying
from moesaic.parallel.counts import Message, message_words, number_of, tell
from moesaic.parallel.execute import Call, Execute
from moesaic.parallel.fields import ExpertForm
from moesaic.parallel.holding import Holding
from moesaic.parallel.layout import ExpertLayout, chunk
from moesaic.parallel.liveness.watch import Watch
from moesaic.parallel.plan import Wish
from moesaic.parallel.schedule import Schedule
from moesaic.parallel.selection import blocks_wanted
from moesaic.parallel.setting import current_wish
from moesaic.parallel.topology import Topology
from moesaic.parallel.workload import Workload

# Timings that wait to be told: calls whose backward pass never runs must not pile up.
_KEPT = 64


@dataclass
class _Timing:
    """Seconds of one decision on this rank, and when its passes began (:func:`time.monotonic_ns`); ``backward`` is None
    until it has run."""

    number: int
    forward: float
    backward: float | None
    forward_start: int = 0
    backward_start: int = 0


class ParallelExperts:
    """What a parallelized experts module computes with.

    Args:
        form: of the experts' tensors. layout, topology: whose part is where.
        chooser: decides; layers of the same shape may share one.
        wish: what is fixed of the plans; :class:`use_strategy` goes before it.
        name: of the module, for errors.

    Attributes:
        last_decision: how the last call was carried out, and why.
        last_choice: the backend that computed this rank's part of it; None where it had nothing to compute.
        counts_E, asked_E: ``[E]`` int64, slots of each expert in the last call over all ranks, as they were computed,
            and before capacity dropped any. own_counts_E: of this rank's tokens alone.
    """

    last_decision: Decision | None = None
    last_choice: Choice | None = None
    counts_E: Tensor
    asked_E: Tensor
    own_counts_E: Tensor

    def __init__(
        self,
        form: ExpertForm,
        layout: ExpertLayout,
        topology: Topology,
        chooser: Chooser,
        wish: Wish | None = None,
        name: str = "experts",
    ) -> None:
        self.form, self.layout, self.topology, self.chooser = form, layout, topology, chooser
        self.wish, self.name = wish or Wish(), name
        block, slice_ = layout.place(topology.rank)
        self._own = Holding(form, layout, layout.experts_of_block(block), range(slice_, slice_ + 1))
        self._slice_elements = tuple(
            sum(field.elements(len(chunk(field.shape[field.axis], layout.slices, index))) for field in form.fields)
            for index in range(layout.slices)
        )
        self._block_of_id = torch.tensor([*layout.block_of_expert.tolist(), layout.blocks])
        self._identity = f"{name} {layout} {self._slice_elements}"
        topology.letter.fit(message_words(layout))
        self._timings: deque[_Timing] = deque(maxlen=_KEPT)
        self._watch = Watch.of(topology.group)
        # Not as a decorator: that would import the compiler, which takes its time, with this file.
        self._run_eagerly: Any = torch.compiler.disable(self._run)

    def __call__(
        self,
        x_TD: Tensor,
        ids_TK: Tensor,
        weights_TK: Tensor,
        tensors: dict[str, Tensor],
        asked_E: Tensor | None = None,
        stored: Sequence[Tensor] = (),
    ) -> Tensor:
        """``[T, D]``: for each of this rank's tokens the weighted sum of its experts' outputs; a collective call.

        Args:
            x_TD: floating point, on every rank any number of tokens, also none.
            ids_TK: int64; E and above are null slots.
            weights_TK: routing weights.
            tensors: this rank's part of the experts, canonical, by field name.
            asked_E: ``[E]`` slots before capacity dropped some; those of ``ids_TK`` by default.
            stored: the parameters behind ``tensors``, where these are no copies: that they change before the backward
                pass is an error then.

        Raises:
            ParallelError: where ranks do not do the same, or one of them fails.
        """
        y_TD: Tensor = self._run_eagerly(x_TD, ids_TK, weights_TK, tensors, asked_E, stored)
        return y_TD

    def _run(
        self,
        x_TD: Tensor,
        ids_TK: Tensor,
        weights_TK: Tensor,
        tensors: dict[str, Tensor],
        asked_E: Tensor | None,
        stored: Sequence[Tensor],
    ) -> Tensor:
        num_experts = self.layout.num_experts
        ids_TK = ids_TK.clamp(max=num_experts)
        learns = any(each.requires_grad for each in tensors.values())
        grad = torch.is_grad_enabled() and (learns or x_TD.requires_grad or weights_TK.requires_grad)
        workload = self._tell(x_TD, ids_TK, grad, learns, asked_E)
        decision = self.chooser.choose(workload, current_wish() or self.wish)
        self.last_decision = decision
        start = time.monotonic_ns()
        call = Call(
            Schedule(decision.plan, workload),
            self.topology,
            self._own,
            ids_TK,
            grad=workload.grad,
            learns=learns,
            watch=self._watch,
            layer=self.name,
            stored=stored,
        )
        try:
            with torch.autocast(x_TD.device.type, enabled=False):
                y_TD: Tensor = Execute.apply(call, x_TD, weights_TK, tuple(tensors), *tensors.values())  # type: ignore[no-untyped-call]
        finally:  # activation checkpointing leaves its second forward pass by an error, when the last tensor is saved
            if call.forward_end:
                self._note(decision.number, start, call, workload.grad)
        self.last_choice = call.choice
        return y_TD

    def _tell(self, x_TD: Tensor, ids_TK: Tensor, grad: bool, learns: bool, asked_E: Tensor | None) -> Workload:
        num_experts, blocks = self.layout.num_experts, self.layout.blocks
        self.own_counts_E = torch.bincount(ids_TK.flatten(), minlength=num_experts + 1)[:num_experts]
        wanted_TK = blocks_wanted(ids_TK, self._block_of_id.to(ids_TK.device))
        timing = next((each for each in self._timings if each.backward is not None), _Timing(0, 0.0, 0.0))
        message = Message(
            counts_E=self.own_counts_E,
            asked_E=asked_E,
            rows_B=torch.bincount(wanted_TK.flatten(), minlength=blocks + 1)[:blocks],
            tokens=x_TD.shape[0],
            grad=grad,
            learns=grad and learns,
            layer=_number_of_layer(self._identity, ids_TK.shape[1], x_TD.dtype),
            wish=_number_of_wish(
                current_wish() or self.wish,
                is_tuning_on() and not torch.are_deterministic_algorithms_enabled(),
                replaying(),
            ),
            state=self.chooser.checksum(),
            timed=timing.number,
            forward=timing.forward,
            backward=timing.backward or 0.0,
            forward_start=timing.forward_start,
            backward_start=timing.backward_start,
        )
        with self._watch.collective("counts exchange", layer=self.name):
            told = tell(message, self.layout, self.topology, self.name)
        if told.timed:
            while self._timings.popleft() is not timing:  # those before it had no backward pass
                pass
            self.chooser.report(told.timed, told.forward_W, told.backward_W)
        self.counts_E, self.asked_E = (
            torch.from_numpy(each.sum(0)).to(ids_TK.device) for each in (told.counts_WE, told.asked_WE)
        )
        return Workload(
            layout=self.layout,
            counts_WE=told.counts_WE,
            rows_WB=told.rows_WB,
            tokens_W=told.tokens_W,
            d_model=x_TD.shape[1],
            top_k=ids_TK.shape[1],
            dtype=x_TD.dtype,
            slice_elements=self._slice_elements,
            grad=told.grad,
        )

    def _note(self, number: int, start: int, call: Call, grad: bool) -> None:
        """Keep what the call took until it can be told; with a backward pass, when that has run too."""
        if self.topology.device != "cpu":
            return  # the host does not see how long it took
        timing = _Timing(number, (call.forward_end - start) / 1e9, None if grad else 0.0, start)
        self._timings.append(timing)
        if grad:

            def done(start: int, seconds: float) -> None:
                timing.backward_start, timing.backward = start, seconds

            call.on_backward = done


@lru_cache(maxsize=4096)
def _number_of_layer(identity: str, top_k: int, dtype: torch.dtype) -> int:
    return number_of(f"{identity} {top_k} {dtype}")


@lru_cache(maxsize=256)
def _number_of_wish(wish: Wish, learning: bool, replayed: int) -> int:
    """Of all that a user may say about how steps are carried out, which must be the same on all ranks."""
    return number_of(f"{wish} {learning} {replayed}")
