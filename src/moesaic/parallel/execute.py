"""One call of one layer on one rank: a plan carried out, forward and backward.

T tokens · D model width · K slots per token · N rows on their way · R rows that have arrived.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from moesaic.dispatch import Dispatch
from moesaic.experts import Choice, compute_and_tell
from moesaic.parallel.exchange import EXCHANGES, Nothing, Pending
from moesaic.parallel.fetch import GradientReturn, Tensors, WeightGather, sum_dtype
from moesaic.parallel.holding import Holding
from moesaic.parallel.liveness.watch import Watch
from moesaic.parallel.packing import pack, unpack
from moesaic.parallel.schedule import Schedule
from moesaic.parallel.selection import NOBODY, Selection
from moesaic.parallel.topology import Topology


@dataclass
class _Computed:
    """One computation of experts and what it hangs on in autograd's inner graph."""

    x: Tensor
    weights: Tensor
    tensors: Tensors
    y: Tensor

    def gradients(self, grad_y: Tensor, with_tensors: bool) -> tuple[Tensor, Tensor, Tensors]:
        """Of features, routing weights, and (or none) the experts' tensors."""
        leaves = list(self.tensors.values()) if with_tensors else []
        grads = torch.autograd.grad(self.y, [self.x, self.weights, *leaves], grad_y)
        return grads[0], grads[1], dict(zip(self.tensors if with_tensors else (), grads[2:], strict=True))


class Call:
    """The plan of one step on its way through :meth:`forward` and, where ``grad``, :meth:`backward`.

    Args:
        own: what this rank owns.
        ids_TK: ``[T, K]`` int64, null slots being E.
        grad: keep what the backward pass needs.
        learns: whether any of the experts' tensors requires a gradient.
        layer: its name, for errors.
        stored: the parameters behind the tensors, where these are no copies.

    Attributes:
        keeps, layer, stored: ``grad`` and the arguments.
        choice: the backend that computed last, or None.
        forward_end: when the forward pass was done (:func:`time.monotonic_ns`); 0 before.
        on_backward: is told when the backward pass began (:func:`time.monotonic_ns`), and its seconds.
    """

    choice: Choice | None = None
    on_backward: Callable[[int, float], None] | None = None
    forward_end: int = 0

    def __init__(
        self,
        schedule: Schedule,
        topology: Topology,
        own: Holding,
        ids_TK: Tensor,
        *,
        grad: bool,
        learns: bool,
        watch: Watch,
        layer: str,
        stored: Sequence[Tensor] = (),
    ) -> None:
        self._topology, self._own = topology, own
        self.keeps, self._learns, self._watch = grad, learns, watch
        self.layer, self.stored = layer, stored
        # What is kept until the backward pass grows with the ranks and not with their square.
        rank = topology.rank
        self._workload, self._members = schedule.workload.without_counts(), schedule.members
        self._selection = Selection(schedule, rank, ids_TK)
        self._exchange = EXCHANGES.get(schedule.plan.exchange)
        self._sizes = self._exchange.sizes(topology, schedule.rows) if schedule.moves_rows else None
        self._phases = schedule.gather(rank)
        self._hot = schedule.fetches(np.array([rank]), slice(None))[0].nonzero()[0].tolist()
        self._ids_TK = ids_TK
        self._computed: list[_Computed | None] = []
        self._fetched: _Computed | None = None
        self._gather: WeightGather | None = None

    def forward(self, x_TD: Tensor, weights_TK: Tensor, tensors: Tensors) -> Tensor:
        """``[T, D]``: for every token the weighted sum of its experts' outputs; a collective call."""
        selection = self._selection
        arriving = self._send_tokens(0, x_TD, weights_TK)
        self._start_gather(tensors)

        def send(chunk: int) -> Pending:
            return arriving if chunk == 0 else self._send_tokens(chunk, x_TD, weights_TK)

        def compute(chunk: int, rows_RC: Tensor) -> Tensor:
            x_RD, weights_RK, ids_RK = unpack(self._workload, rows_RC)
            return self._compute_own(x_RD, weights_RK, ids_RK, tensors)

        returning = self._pipeline("tokens exchange", send, compute, "results")
        y_TD = self._compute_fetched(x_TD, weights_TK)
        collected_TD = selection.collect(self._arrived("results exchange", returning))
        if self._gather is not None:
            self._gather.free()
        return collected_TD if y_TD is None else collected_TD + y_TD

    def backward(self, grad_TD: Tensor, tensors: Tensors) -> tuple[Tensor, Tensor, Tensors]:
        """Gradients of the features ``[T, D]``, the routing weights ``[T, K]`` and this rank's own tensors, the last
        averaged over the ranks; a collective call."""
        grad_TD = grad_TD.contiguous()
        arriving = self._send_gradients(0, grad_TD)
        if self._gather is not None:
            self._gather.start(tensors)
        own_grads: Tensors = {}
        shared_grads: Tensors = {}

        def send(chunk: int) -> Pending:
            return arriving if chunk == 0 else self._send_gradients(chunk, grad_TD)

        def compute(chunk: int, grad_RD: Tensor) -> Tensor:
            computed = self._computed[chunk]
            if computed is None:
                rows_RK = grad_RD.new_zeros(grad_RD.shape[0], self._workload.top_k)
                return pack(self._workload, torch.zeros_like(grad_RD), rows_RK)
            grad_x_RD, grad_weights_RK, grads = computed.gradients(grad_RD, self._learns)
            _accumulate(shared_grads if self._members > 1 else own_grads, grads)
            self._computed[chunk] = None
            return pack(self._workload, grad_x_RD, grad_weights_RK)

        returning = self._pipeline("gradients exchange", send, compute, "results")
        fetched = self._differentiate_fetched(grad_TD)
        if self._learns and not own_grads:
            own_grads = {name: torch.zeros_like(each) for name, each in tensors.items()}
        own_grads = self._return_gradients(own_grads, shared_grads, fetched[2] if fetched else {})
        rows = [unpack(self._workload, each)[:2] for each in self._arrived("gradients' way back", returning)]
        grad_x_TD = self._selection.collect([x_ND for x_ND, _ in rows])
        grad_weights_TK = self._selection.collect([weights_NK for _, weights_NK in rows])
        if fetched is not None:
            grad_x_TD, grad_weights_TK = grad_x_TD + fetched[0], grad_weights_TK + fetched[1]
        size = self._topology.size
        means = {name: each.div_(size).to(tensors[name].dtype) for name, each in own_grads.items()}
        return grad_x_TD, grad_weights_TK, means

    # Tokens

    def _send_tokens(self, chunk: int, x_TD: Tensor, weights_TK: Tensor) -> Pending:
        tokens_N = self._selection.tokens(chunk)
        rows_NC = pack(self._workload, x_TD[tokens_N], weights_TK[tokens_N], self._selection.ids(chunk))
        return self._begin(rows_NC, chunk, "tokens")

    def _send_gradients(self, chunk: int, grad_TD: Tensor) -> Pending:
        return self._begin(grad_TD[self._selection.tokens(chunk)], chunk, "tokens")

    def _begin(self, rows: Tensor, chunk: int, kind: str) -> Pending:
        if self._sizes is None:
            return Nothing(rows)
        sizes = (self._sizes if kind == "tokens" else self._sizes.turned()).chunk(chunk, self._selection.chunks)
        return self._exchange.start(self._topology, rows, sizes, kind)

    def _pipeline(
        self, name: str, send: Callable[[int], Pending], compute: Callable[[int, Tensor], Tensor], back: str
    ) -> list[Pending]:
        """While one chunk is computed, the next one arrives and the one before returns (Tutel, section 3.5)."""
        chunks = self._selection.chunks
        returning: list[Pending] = []
        arriving = send(0)
        for chunk in range(chunks):
            with self._waiting(name):
                rows = arriving.wait()
                if chunk + 1 < chunks:
                    arriving = send(chunk + 1)
                    arriving.advance()
                if returning:
                    returning[-1].advance()
            if not chunk:
                self._finish_gather_before_use()
            returning.append(self._begin(compute(chunk, rows), chunk, back))
        return returning

    def _arrived(self, name: str, pending: list[Pending]) -> list[Tensor]:
        with self._waiting(name):
            return [each.wait() for each in pending]

    # Experts

    def _compute_own(self, x_RD: Tensor, weights_RK: Tensor, ids_RK: Tensor, tensors: Tensors) -> Tensor:
        if not x_RD.shape[0]:
            self._computed.append(None)
            return x_RD
        holding, held = self._own, tensors
        if self._members > 1:
            assert self._gather is not None
            holding, held = self._gather.holdings[-1], self._gather.tensors[-1]
        return self._compute(holding, held, x_RD, weights_RK, ids_RK, self._computed.append)

    def _compute_fetched(self, x_TD: Tensor, weights_TK: Tensor) -> Tensor | None:
        """The tokens of this rank whose experts' weights have come to it; None where there are none."""
        if self._gather is None or not self._hot:
            self._finish_gather()
            return None
        self._finish_gather()
        hot = self._gather.holdings[0]
        place_of_id = torch.full((self._workload.layout.num_experts + 1,), NOBODY)
        place_of_id[list(hot.experts)] = torch.arange(len(hot.experts))
        ids_TK = place_of_id.to(self._ids_TK.device)[self._ids_TK]

        def keep(computed: _Computed) -> None:
            self._fetched = computed

        return self._compute(hot, self._gather.tensors[0], x_TD, weights_TK, ids_TK, keep)

    def _compute(
        self,
        holding: Holding,
        tensors: Tensors,
        x: Tensor,
        weights: Tensor,
        ids: Tensor,
        keep: Callable[[_Computed], None],
    ) -> Tensor:
        num_experts = len(holding.experts)
        if not self.keeps:
            y, self.choice = compute_and_tell(
                x, Dispatch.from_slots(ids, weights, num_experts), holding.weights(tensors)
            )
            return y
        with torch.enable_grad(), saved_tensors_hooks(_detached, _same):
            x, weights = x.detach().requires_grad_(), weights.detach().requires_grad_()
            leaves = {name: each.detach().requires_grad_(self._learns) for name, each in tensors.items()}
            dispatch = Dispatch.from_slots(ids, weights, num_experts)
            y, self.choice = compute_and_tell(x, dispatch, holding.weights(leaves))
        keep(_Computed(x, weights, leaves, y))
        return y.detach()

    def _differentiate_fetched(self, grad_TD: Tensor) -> tuple[Tensor, Tensor, Tensors] | None:
        self._finish_gather()
        if self._fetched is None:
            return None
        computed, self._fetched = self._fetched, None
        return computed.gradients(grad_TD, self._learns)

    # Weights

    def _start_gather(self, tensors: Tensors) -> None:
        """Begin to fetch what this rank, or another, computes with beside its own."""
        rank, members = self._topology.rank, self._members
        if not self._phases and members == 1:
            return
        layout, form = self._workload.layout, self._own.form
        holdings = [Holding(form, layout, self._hot, range(layout.slices))]
        if members > 1:
            first = rank % layout.slices // members * members
            holdings.append(Holding(form, layout, layout.experts_of(rank), range(first, first + members)))
        self._gather = WeightGather(self._phases, self._topology, self._own, tensors, holdings)
        self._gather.start(tensors)

    def _finish_gather_before_use(self) -> None:
        """At the first chunk: its experts' other slices must be there; else the weights' second leg may begin."""
        if self._gather is None:
            return
        if self._members > 1:
            self._finish_gather()
        else:
            with self._waiting("weights gather"):
                self._gather.advance()

    def _finish_gather(self) -> None:
        if self._gather is not None:
            with self._waiting("weights gather"):
                self._gather.advance()
                self._gather.wait()

    def _return_gradients(self, own_grads: Tensors, shared_grads: Tensors, hot_grads: Tensors) -> Tensors:
        """This rank's own gradients, with what the others have for them."""
        if self._gather is None:
            return own_grads
        if self._learns:
            own_grads = {name: each.to(sum_dtype(each)) for name, each in own_grads.items()}
            grads = [hot_grads, shared_grads]
            held = [(holding, each) for holding, each in zip(self._gather.holdings, grads, strict=False) if each]
            back = GradientReturn(self._phases, self._topology, self._own, own_grads, held, self._workload.dtype)
            with self._waiting("weight gradients' return"):
                back.start()
                back.finish()
        self._gather.free()
        return own_grads

    @contextmanager
    def _waiting(self, name: str) -> Iterator[None]:
        with self._watch.collective(name, layer=self.layer):
            yield


class _Kept(np.ndarray[Any, Any]):
    """What a call keeps for its backward pass, alive as long as a tensor over this memory, which holds its number.

    Autograd gets that tensor to save. Activation checkpointing lets it go, and gives the backward pass the one that it
    has recomputed instead: so the first call's state goes with the tensor, and that of the recomputed one is found.
    """

    call: Call | None
    own: Tensors
    versions: tuple[int, ...]

    by_number: ClassVar[WeakValueDictionary[int, _Kept]] = WeakValueDictionary()
    _numbers: ClassVar[Iterator[int]] = itertools.count()

    @classmethod
    def of(cls, call: Call, own: Tensors) -> Tensor:
        number = next(cls._numbers)
        kept = cls.by_number[number] = np.full(1, number, dtype=np.int64).view(cls)
        kept.call, kept.own, kept.versions = call, own, _versions(own, call.stored)
        return torch.from_numpy(kept)


class Execute(torch.autograd.Function):
    """A :class:`Call` as one node of autograd's graph, so that the order of its collectives is the same everywhere."""

    @staticmethod
    def forward(ctx: Any, call: Call, x_TD: Tensor, weights_TK: Tensor, names: tuple[str, ...], *own: Tensor) -> Tensor:
        ctx.names = names
        # Not saved for backward by autograd, which would copy or offload what is there anyway: their memory is theirs.
        tensors = {name: each.detach() for name, each in zip(names, own, strict=True)}
        y_TD = call.forward(x_TD.detach(), weights_TK.detach(), tensors)
        call.forward_end = time.monotonic_ns()
        if call.keeps:
            ctx.save_for_backward(_Kept.of(call, tensors))
        return y_TD

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Any, ...]:
        (number,) = ctx.saved_tensors
        kept = _Kept.by_number.get(int(number))
        if kept is None:
            raise RuntimeError(
                "what a parallel layer keeps for its backward pass is gone: hooks on saved tensors must not copy them, "
                "as save_on_cpu(pin_memory=True) does"
            )
        if kept.call is None:
            raise RuntimeError("a parallel layer's backward pass runs once: call forward again instead")
        call, kept.call = kept.call, None
        if _versions(kept.own, call.stored) != kept.versions:
            raise RuntimeError(
                f"the experts' weights of layer {call.layer} have been modified by an inplace operation between its "
                "forward and its backward pass: their gradients would be of other weights"
            )
        start = time.monotonic_ns()
        grad_x_TD, grad_weights_TK, grads = call.backward(grad_TD, kept.own)
        if call.on_backward is not None:
            call.on_backward(start, (time.monotonic_ns() - start) / 1e9)
        wanted = ctx.needs_input_grad[4:]
        own = [grads.get(name) if needed else None for name, needed in zip(ctx.names, wanted, strict=True)]
        return None, grad_x_TD, grad_weights_TK, None, *own


def _versions(own: Tensors, stored: Sequence[Tensor]) -> tuple[int, ...]:
    # What an optimizer does to a DTensor is counted by that, not by its local tensor, and the other way round.
    return tuple(each._version for each in (*own.values(), *stored))


def _accumulate(total: Tensors, grads: Tensors) -> None:
    for name, grad in grads.items():
        # A sum of many in half precision would lose what is small beside it.
        total[name] = total[name].to(sum_dtype(grad)).add_(grad) if name in total else grad


def _detached(tensor: Tensor) -> Tensor:
    # A hook of our own inside of activation checkpointing: its recomputed forward is another call, which may be planned
    # otherwise. Detached, because an output that is saved would keep its own graph alive.
    return tensor.detach()


def _same(tensor: Tensor) -> Tensor:
    return tensor
