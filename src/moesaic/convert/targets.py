"""What a student learns from its teacher's distribution of the next token, and from which target.

T tokens · V entries of the vocabulary. A target is a new file or class here and one registration in ``TARGETS``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from moesaic.errors import ConfigError
from moesaic.registry import Registry

_SMALLEST = 1e-6
"""A loss, in nats, under which relative changes are rounding."""


class Target:
    """A loss between the logits of student and teacher, which may change while the student learns."""

    def losses(self, student_TV: Tensor, teacher_TV: Tensor) -> Tensor:
        """``[T]`` float32: the loss of each token, in nats. Logits ``[T, V]`` of any floating type; gradients go to the
        student's only."""
        raise NotImplementedError

    def after_step(self, loss: float, progress: float) -> None:
        """Told once after each optimizer step: the mean of its :meth:`losses`, and which share of the training is
        done, 0 to 1."""

    def state(self) -> dict[str, Any]:
        """What :meth:`load` takes to go on from here, as JSON can hold it."""
        return {}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state` gave."""


TARGETS: Registry[type[Target]] = Registry("loss")


@TARGETS.register("kl")
class ForwardKL(Target):
    """KL(teacher ‖ student): the student covers all that the teacher holds possible (Distilling the Knowledge in a
    Neural Network, section 2, at temperature 1)."""

    def losses(self, student_TV: Tensor, teacher_TV: Tensor) -> Tensor:
        return _kl(F.log_softmax(teacher_TV.detach().float(), dim=-1), F.log_softmax(student_TV.float(), dim=-1))


@TARGETS.register("reverse_kl")
class ReverseKL(Target):
    """KL(student ‖ teacher): the student keeps to what the teacher holds most probable (MiniLLM: Knowledge Distillation
    of Large Language Models, section 2.1; here on given text and by exact gradients, not on sampled text)."""

    def losses(self, student_TV: Tensor, teacher_TV: Tensor) -> Tensor:
        return _kl(F.log_softmax(student_TV.float(), dim=-1), F.log_softmax(teacher_TV.detach().float(), dim=-1))


@TARGETS.register("taid")
class TAID(Target):
    """KL to a distribution between student and teacher that moves to the teacher (TAID: Temporally Adaptive
    Interpolated Distillation for Efficient Knowledge Transfer in Language Models, equation 3 and algorithm 1).

    The target is ``softmax((1 - t) student + t teacher)`` of the logits, the student's without gradient. After a step
    with loss J, ``m = beta m + (1 - beta) (J_before - J) / J_before`` and ``t`` grows by
    ``alpha sigmoid(m) (1 - t)``, but not below the line from ``start`` to ``end``. As in the authors' code, the first
    step only notes its loss. Unlike there, the relative change is kept between -1 and 1, and a loss that rounding has
    made negative counts as 0: a student that is already its teacher has losses of next to nothing to divide by.

    Args:
        start, end: ``t`` at first and at last. alpha: the largest step of ``t`` towards 1. beta: of the momentum.
    """

    def __init__(self, start: float = 0.4, end: float = 1.0, alpha: float = 5e-4, beta: float = 0.99) -> None:
        if not 0 <= start < end <= 1:
            raise ConfigError(f"start is {start} and end is {end}: it must be 0 <= start < end <= 1")
        for name, value in (("alpha", alpha), ("beta", beta)):
            if not 0 <= value <= 1:
                raise ConfigError(f"{name} is {value}: it must be from 0 to 1")
        self.start, self.end, self.alpha, self.beta = start, end, alpha, beta
        self.t, self.momentum, self.before = start, 0.0, math.inf

    def losses(self, student_TV: Tensor, teacher_TV: Tensor) -> Tensor:
        between_TV = torch.lerp(student_TV.detach().float(), teacher_TV.detach().float(), self.t)
        return _kl(F.log_softmax(between_TV, dim=-1), F.log_softmax(student_TV.float(), dim=-1))

    def after_step(self, loss: float, progress: float) -> None:
        loss = max(0.0, loss)
        if math.isfinite(self.before):
            change = max(-1.0, min(1.0, (self.before - loss) / max(self.before, _SMALLEST)))
            self.momentum = self.beta * self.momentum + (1 - self.beta) * change
            step = self.alpha * (1 + math.tanh(self.momentum / 2)) / 2 * (1 - self.t)  # tanh: a sigmoid for any m
            line = self.start + (self.end - self.start) * progress
            self.t = min(self.end, max(line, self.t + step))
        self.before = loss

    def state(self) -> dict[str, Any]:
        before = self.before if math.isfinite(self.before) else None
        return {"t": self.t, "momentum": self.momentum, "before": before}

    def load(self, state: dict[str, Any]) -> None:
        self.t, self.momentum = float(state["t"]), float(state["momentum"])
        self.before = math.inf if state["before"] is None else float(state["before"])


def _kl(of_TV: Tensor, to_TV: Tensor) -> Tensor:
    """``[T]``: KL of two distributions, given by the logarithms of their probabilities."""
    return (of_TV.exp() * (of_TV - to_TV)).sum(dim=-1)
