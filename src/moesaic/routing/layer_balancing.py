"""The balancers of one router at work: their coefficients, and the slots that they count over ranks and forwards."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moesaic.routing.balancing import acts_after_step, create_balancer, has_loss
from moesaic.routing.router import Router
from moesaic.routing.routing import Routing


class LayerBalancing(nn.Module):
    """The balancers of one router.

    Its buffer ``slot_counts`` (``[E]`` int64) are the slots since the last optimizer step, where a balancer needs them:
    of all ranks where one goes by the batch, or after :func:`moesaic.parallelize`, else of this process. They are zero
    between steps, hence not in checkpoints. ``step`` (int64 scalar) are the optimizer steps done; it is there, and in
    checkpoints, where a coefficient varies.

    Attributes:
        losses: of the last forward, by balancer, before their coefficients: for reading, cut off from the graph.

    Args:
        balancing: as in :class:`moesaic.MoEConfig`.
        num_experts: columns E of the router.
    """

    slot_counts: Tensor
    step: Tensor

    def __init__(self, balancing: Mapping[str, Any], num_experts: int) -> None:
        super().__init__()
        self._parts = {name: create_balancer(name, entry) for name, entry in balancing.items()}
        balancers = [balancer for balancer, _ in self._parts.values()]
        self.loss_names = [name for name, (balancer, _) in self._parts.items() if has_loss(balancer)]
        self.over_batch = any(balancer.over_batch for balancer in balancers)
        self._acts = any(map(acts_after_step, balancers))
        self._varies = any(planned.varies for _, planned in self._parts.values())
        self.register_buffer("slot_counts", torch.zeros(num_experts, dtype=torch.int64), persistent=False)
        if self._varies:
            self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.losses: dict[str, Tensor] = {}
        self._counting = False  # in a forward that only counts
        self._ahead = False  # slot_counts is of the whole batch already
        self._shared = False  # the last counts were of all ranks

    def reset_parameters(self) -> None:
        """As it was before the first step."""
        nn.init.zeros_(self.slot_counts)
        if self._varies:
            nn.init.zeros_(self.step)

    def loss(self, asked: Routing, counts_E: Tensor | None = None) -> Tensor:
        """Σ coefficient · loss of a forward's routing: a float32 scalar, 0 where there is none. Counts its slots.

        Args:
            asked: before a capacity dropped slots: a balancer must see what the router wants.
            counts_E: ``[E]`` int64, slots that the tokens of all ranks asked for, where that is known.
        """
        total = asked.scores.new_zeros(())
        if not self._parts:
            return total
        self._shared = counts_E is not None
        counts_E = asked.counts() if counts_E is None else counts_E
        self._count(counts_E)
        if self._counting:
            return total
        # Cloned, for a balancer may keep it for its backward, and the next forward adds to it.
        batch_E = self.slot_counts.clone() if self.over_batch and self.training else counts_E
        self.losses = {}
        with _kept() if self.over_batch else contextlib.nullcontext():
            for name, (balancer, _) in self._parts.items():
                loss = balancer.loss(asked, batch_E if balancer.over_batch else counts_E)
                if loss is not None:
                    total = total + self.coefficient(name) * loss
                    self.losses[name] = loss.detach()
        return total

    def _count(self, counts_E: Tensor) -> None:
        skipped = not self.over_batch if self._counting else (not self.training or self._ahead or recomputing())
        if skipped:
            return
        if self.over_batch and not self._shared:
            # At once: then all ranks hold the same, and DistributedDataParallel may hand its buffers around.
            counts_E = over_ranks(counts_E)
        if self.over_batch or self._acts:
            self.slot_counts += counts_E

    def coefficient(self, name: str) -> float | Tensor:
        """A balancer's coefficient in the step that is under way; a float32 scalar tensor where it varies."""
        _, planned = self._parts[name]
        return planned.at(self.step) if planned.varies else planned.coefficient

    def after_step(self, router: Router) -> None:
        """Let the balancers that work without a loss act, and begin the next step."""
        if self._acts:
            whole = self.over_batch or self._shared
            counts_E = self.slot_counts if whole else over_ranks(self.slot_counts)
            for name, (balancer, _) in self._parts.items():
                balancer.update(router, counts_E, self.coefficient(name))
        self.slot_counts.zero_()
        self._ahead = False
        if self._varies:
            self.step += 1

    def begin_counting(self) -> None:
        """From here on forwards are counted only, anew; where no balancer goes by the batch, not even that."""
        if self.over_batch:
            self.slot_counts.zero_()
        self._counting, self._ahead = True, False

    def end_counting(self, whole: bool) -> None:
        """The end of that.

        Args:
            whole: whether all forwards of the batch have been counted, so that what comes goes by it.
        """
        self._counting, self._ahead = False, whole and self.over_batch
        if self.over_batch and not whole:
            self.slot_counts.zero_()

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={planned.coefficient}" for name, (_, planned) in self._parts.items())


@contextlib.contextmanager
def counting(model: nn.Module) -> Iterator[None]:
    """A context for forwards that only count, so that losses over the batch are exact with gradient accumulation::

        with moesaic.routing.counting(model):
            for part in parts:
                model(part)
        for part in parts:
            ...  # forward, loss, backward

    Inside, there are no gradients. Afterwards, until :func:`moesaic.update_balancing`, balancers such as
    ``global_load_balancing`` go by the slots of all these forwards, on all ranks; random numbers are drawn as if the
    context had not been, so that dropout and noise choose the same experts again. It costs a forward without its
    backward for each part; without such a balancer, nothing needs it. What other balancers count stays as it is. Of
    several ranks all do it together.
    """
    layers = [module for module in model.modules() if isinstance(module, LayerBalancing)]
    devices = {tensor.device for tensor in model.parameters() if tensor.device.type not in ("cpu", "meta")}
    kind = next(iter(devices)).type if devices else "cuda"
    whole = False
    for layer in layers:
        layer.begin_counting()
    try:
        numbers = [device.index or 0 for device in devices]
        with torch.random.fork_rng(numbers, device_type=kind), torch.no_grad():
            yield
        whole = True
    finally:
        for layer in layers:
            layer.end_counting(whole)


def over_ranks(counts_E: Tensor) -> Tensor:
    """``[E]``: the sum over the ranks of the default process group; the counts themselves where there is none."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return counts_E
    total_E = counts_E.clone()
    dist.all_reduce(total_E)
    return total_E


def _kept() -> contextlib.AbstractContextManager[object]:
    """What a loss saves for its backward is kept as it is, also in a region that activation checkpointing recomputes.

    The counts of the batch have grown where other forwards came between; the region, computed again, would put those in
    the place of what its own forward knew. What is kept is small: some ``[T, E]`` of a layer.

    Not so in compiled code, nor with ``use_reentrant=True``, whose first forward has no graph that could keep anything:
    with several forwards before one backward those take the gradient by the later counts. :func:`counting` makes both
    exact.
    """
    if torch.compiler.is_compiling():  # compiled code keeps or recomputes what it likes, without running any of this
        return contextlib.nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(_itself, _itself)


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def recomputing() -> bool:
    """Whether this forward is done again for a backward that is under way (activation checkpointing)."""
    # Compiled code recomputes without running any of this.
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
