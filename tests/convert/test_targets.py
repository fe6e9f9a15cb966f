"""What a student learns: against loops in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from moesaic.convert.targets import TAID, TARGETS, ForwardKL, ReverseKL
from moesaic.errors import ConfigError


def kl(of: list[float], to: list[float]) -> float:
    return sum(p * (math.log(p) - math.log(q)) for p, q in zip(of, to, strict=True))


def softmax(logits: list[float]) -> list[float]:
    top = max(logits)
    raised = [math.exp(value - top) for value in logits]
    return [value / sum(raised) for value in raised]


def logits(seed: int) -> Tensor:
    return torch.randn(5, 11, generator=torch.Generator().manual_seed(seed)) * 3


def test_kl_both_ways() -> None:
    student, teacher = logits(0), logits(1)
    for target, swapped in ((ForwardKL(), False), (ReverseKL(), True)):
        losses = target.losses(student, teacher)
        for row in range(5):
            ours, theirs = softmax(student[row].double().tolist()), softmax(teacher[row].double().tolist())
            expected = kl(ours, theirs) if swapped else kl(theirs, ours)
            assert losses[row].item() == pytest.approx(expected, rel=1e-4)


def test_taid_target_is_between() -> None:
    student, teacher = logits(2), logits(3)
    target = TAID(start=0.25)
    losses = target.losses(student, teacher)
    for row in range(5):
        ours, theirs = student[row].double().tolist(), teacher[row].double().tolist()
        between = softmax([0.75 * a + 0.25 * b for a, b in zip(ours, theirs, strict=True)])
        assert losses[row].item() == pytest.approx(kl(between, softmax(ours)), rel=1e-4)
    target.t = 1.0
    torch.testing.assert_close(target.losses(student, teacher), ForwardKL().losses(student, teacher))


@pytest.mark.parametrize("name", TARGETS.names())
def test_gradients_go_to_the_student_only_and_vanish_where_both_agree(name: str) -> None:
    target = TARGETS.get(name)()
    student, teacher = logits(4).requires_grad_(), logits(5).requires_grad_()
    target.losses(student, teacher).sum().backward()
    assert teacher.grad is None and student.grad is not None and student.grad.abs().max() > 0.01
    same = teacher.detach().clone().requires_grad_()
    target.losses(same, teacher).sum().backward()
    assert same.grad is not None and same.grad.abs().max() < 1e-6


def test_taid_gradient_does_not_go_through_its_target() -> None:
    """With p_t held fixed, the gradient of KL(p_t || q) in the logits is q - p_t."""
    student, teacher = logits(6).requires_grad_(), logits(7)
    TAID(start=0.5).losses(student, teacher).sum().backward()
    between = torch.softmax(0.5 * student.detach() + 0.5 * teacher, -1)
    torch.testing.assert_close(student.grad, torch.softmax(student.detach(), -1) - between)


def test_taid_schedule() -> None:
    """Algorithm 1 by hand."""
    target = TAID(start=0.2, end=0.9, alpha=0.1, beta=0.5)
    target.after_step(4.0, 0.1)
    assert target.t == 0.2  # the first step only notes its loss
    t, momentum, before = 0.2, 0.0, 4.0
    for loss, progress in ((3.0, 0.2), (3.5, 0.3), (1.0, 0.35), (1.0, 1.0)):
        target.after_step(loss, progress)
        momentum = 0.5 * momentum + 0.5 * (before - loss) / before
        step = 0.1 * (1 / (1 + math.exp(-momentum))) * (1 - t)
        t, before = min(0.9, max(0.2 + 0.7 * progress, t + step)), loss
        assert target.t == pytest.approx(t)
    assert target.t == pytest.approx(0.9)


@pytest.mark.parametrize("losses", [(0.0, 1e-6), (-1e-15, 1e-6), (1e-12, 5.0, 0.0), (5.0, 0.0, -1e-7, 3.0)])
def test_taid_with_losses_of_nothing(losses: tuple[float, ...]) -> None:
    target = TAID()
    for step, loss in enumerate(losses):
        target.after_step(loss, step / 10)
        assert target.start <= target.t <= target.end and abs(target.momentum) <= 1


def test_taid_goes_on() -> None:
    first, second = TAID(), TAID()
    second.load(first.state())  # before any step
    for loss in (3.0, 2.5):
        first.after_step(loss, 0.1)
    second.load(first.state())
    for target in (first, second):
        target.after_step(2.0, 0.2)
    assert first.state() == second.state()


def test_refusals() -> None:
    with pytest.raises(ConfigError, match=r"start is 0\.9 and end is 0\.5"):
        TAID(start=0.9, end=0.5)
    with pytest.raises(ConfigError, match="alpha is 2"):
        TAID(alpha=2)
    with pytest.raises(ConfigError, match="unknown loss 'kll': did you mean 'kl'"):
        TARGETS.get("kll")
