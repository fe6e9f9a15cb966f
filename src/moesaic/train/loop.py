"""One optimizer step: batch, forward, backward, clip, update, balance."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from transformers import PreTrainedModel

from moesaic.data import Batches
from moesaic.errors import TrainingError
from moesaic.layer import moe_layers, update_balancing
from moesaic.routing import counting
from moesaic.train.checkpoint import Checkpoint, restore, training_state
from moesaic.train.loss import token_losses
from moesaic.train.metrics import BalanceMeter, RoutingMeter, StepMetrics
from moesaic.train.optimizer import build_optimizer, clip, learning_rate, local_gradients
from moesaic.train.precision import autocast
from moesaic.train.recipe import TrainSettings
from moesaic.train.world import World


class NonFiniteError(TrainingError):
    """A loss or gradient is infinite or NaN; the weights have not been changed by it."""


class Trainer:
    """A model, its optimizer, and how far they are.

    The data of a step is a function of its number, and so is the learning rate: :meth:`state` has nothing else to keep.
    Of several ranks each takes its share of a batch's sequences; what a step tells is of the whole batch, the same on
    all.

    Args:
        model: on ``device``. What is trained are its parameters that require a gradient, in float32. Balancing is for
            routers that learn: where they are frozen, its losses are not added, and nothing else of it acts.
        batches: gives ``[batch_size, S + 1]`` token ids for a step.
        precision: ``"fp32"`` or ``"bf16"`` (autocast).
        world: the ranks that ``model`` has been parallelized over, at most as many as a part of a batch has sequences.

    Attributes:
        heard: what the ranks told one another in the last step, see :meth:`train_step`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        batches: Batches,
        settings: TrainSettings,
        device: torch.device,
        precision: str,
        world: World | None = None,
    ) -> None:
        self.world = world or World()
        self.model, self.batches, self.settings = model.train(), batches, settings
        self.device, self.precision = device, precision
        self.optimizer = build_optimizer(model, settings)
        routers = [parameter for layer in moe_layers(model) for parameter in layer.router.parameters()]
        self._balances = any(parameter.requires_grad for parameter in routers)
        self.step = 0
        self.tokens = 0
        self.seconds = 0.0
        self.heard: list[float] = []
        self._meter, self._balance = RoutingMeter(model), BalanceMeter(model if self._balances else nn.Module())
        if settings.gradient_checkpointing:
            # The first name is transformers' since 5.20 or so, which deprecates the second.
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        self._forward: Any = torch.compile(model) if settings.compile else model

    def train_step(self, tell: Sequence[float] = ()) -> StepMetrics:
        """Do the next step.

        Args:
            tell: numbers that each rank has for the others: :attr:`heard` is then their sums over the ranks.

        Raises:
            NonFiniteError: where the loss or the gradient is not finite; names the step and the batch.
        """
        started = time.perf_counter()
        rate = learning_rate(self.step, self.settings)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        ids = self.batches.batch(self.step)
        losses = self._backward(ids)
        gradients = local_gradients(self.model.parameters())
        (loss, aux_loss, *balancing), norm, slots = self._of_all_ranks(losses, get_total_norm(gradients), tell)
        if not all(map(math.isfinite, (loss, aux_loss, float(norm)))):
            self.optimizer.zero_grad()
            raise self._not_finite(loss, aux_loss, float(norm))
        clip(gradients, norm, self.settings.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self._balances:
            update_balancing(self.model)
        self.step += 1
        self.tokens += ids.shape[0] * (ids.shape[1] - 1)
        imbalance, worst, dropped = self._meter.figures(slots)
        seconds = time.perf_counter() - started
        self.seconds += seconds
        return StepMetrics(
            step=self.step,
            loss=loss,
            aux_loss=aux_loss,
            balancing=dict(zip(self._balance.names, balancing, strict=True)),
            learning_rate=rate,
            grad_norm=float(norm),
            imbalance=imbalance,
            worst_imbalance=worst,
            dropped=dropped,
            tokens=self.tokens,
            tokens_per_second=ids.shape[0] * (ids.shape[1] - 1) / seconds,
        )

    def progress(self) -> dict[str, Any]:
        return {"step": self.step, "tokens": self.tokens, "seconds": self.seconds}

    def state(self) -> dict[str, Any]:
        """All that the next step depends on; the tensors are the model's and the optimizer's own."""
        return training_state(self.model, self.optimizer, self.progress(), self.world)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go back to a checkpoint; raises :class:`CheckpointError` where it does not fit."""
        progress: Mapping[str, Any] = restore(checkpoint, self.model, self.optimizer, self.world)
        self.step, self.tokens, self.seconds = progress["step"], progress["tokens"], progress["seconds"]

    def _backward(self, ids: Tensor) -> Tensor:
        """Gradients of a batch ``[B, S + 1]``; returns this rank's part of the mean cross entropy, the sum of the
        balancing losses, and each of them: the sums over the ranks are the batch's.
        """
        parts = ids.chunk(self.settings.accumulation)
        mine = [part[self.world.share(len(part))] for part in parts]
        self._count(mine)
        losses = torch.zeros(2 + len(self._balance.names), device=self.device)
        for part, own in zip(parts, mine, strict=True):
            share = len(own) / len(part)
            loss, aux_loss = self._losses(own.to(self.device))
            each = self._balance.read(self.device)
            # Gradients are averaged over the ranks, whatever each one's share is.
            ((loss + aux_loss) * (share * self.world.size) / len(parts)).backward()
            losses += torch.cat([torch.stack([loss.detach(), aux_loss.detach()]), each]) * share / len(parts)
            self._meter.add()
        return losses

    def _count(self, parts: Sequence[Tensor]) -> None:
        """Where balancing over the batch is exact, tell it what all parts are going to ask for."""
        # One part is all that there is: its forward knows the slots of all ranks by itself.
        if not (self.settings.exact_balancing and self._balance.over_batch and len(parts) > 1):
            return
        with counting(self.model), autocast(self.device, self.precision):
            for part in parts:
                self._forward(input_ids=part[:, :-1].to(self.device), use_cache=False, logits_to_keep=1)

    def _of_all_ranks(
        self, losses: Tensor, norm: Tensor, tell: Sequence[float]
    ) -> tuple[list[float], Tensor, list[float]]:
        """Losses, norm of the gradient before clipping, and the meter's numbers, of all ranks together; sets
        :attr:`heard`.

        One exchange serves it all, and one transfer from the device comes before it.
        """
        *own_losses, own_norm = torch.cat([losses, norm.reshape(1).to(losses)]).tolist()
        slots = self._meter.take()
        if self.world.size == 1:
            self.heard = list(tell)
            return own_losses, norm, slots
        total = self.world.sums([*own_losses, own_norm**2, *slots, *tell])
        first_told, at = len(total) - len(tell), len(own_losses)
        self.heard = total[first_told:]
        return total[:at], torch.tensor(math.sqrt(total[at]), device=self.device), total[at + 1 : first_told]

    def _losses(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cross entropy and balancing losses of a part of a batch: two float32 scalars."""
        with autocast(self.device, self.precision):
            output = self._forward(input_ids=ids[:, :-1], use_cache=False)
        loss = token_losses(output.logits, ids[:, 1:]).mean()
        aux_loss = output.aux_loss if self._balances else None
        return loss, torch.zeros_like(loss) if aux_loss is None else aux_loss

    def _not_finite(self, loss: float, aux_loss: float, norm: float) -> NonFiniteError:
        domains = Counter(self.batches.domains(self.step))
        rows = ", ".join(f"{count} of {name}" for name, count in sorted(domains.items()))
        return NonFiniteError(
            f"step {self.step + 1} is not finite (loss {loss}, balancing loss {aux_loss}, gradient norm {norm}) "
            f"on batch {self.step} (sequences: {rows}); the weights were not changed by it"
        )


@contextlib.contextmanager
def repeatable(threads: int) -> Iterator[None]:
    """PyTorch's deterministic algorithms, and ``threads`` CPU threads unless that is 0; as it was before at the end."""
    fill: Any = torch.utils.deterministic
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        fill.fill_uninitialized_memory,
        torch.get_num_threads(),
    )
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS may differ from run to run
    torch.use_deterministic_algorithms(True, warn_only=True)
    fill.fill_uninitialized_memory = False  # costs time, and we read no uninitialized memory
    if threads:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        fill.fill_uninitialized_memory = before[2]
        torch.set_num_threads(before[3])
