"""The training loop of distillation: batches, steps, and a state that can be saved between any two of them.

T tokens · D model width · V entries of the vocabulary · B passages · S their length.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from moesaic.convert.mixture import ExcessLossMixture
from moesaic.convert.seeds import generator
from moesaic.convert.targets import Target
from moesaic.convert.writing import save_atomically
from moesaic.data import Batches
from moesaic.errors import CheckpointError, TrainingError
from moesaic.layer import moe_layers, update_balancing
from moesaic.train.precision import autocast

WARMUP_STEPS = 10
_CLIP = 1.0
_ROWS = 256
"""Tokens whose logits are in memory at a time."""
_FROZEN = ("model.embed_tokens.weight", "lm_head.weight")
_FFN = (".mlp.", "norm.")


@dataclass(frozen=True)
class Told:
    """One step: its number from 1 on, its loss and excess loss (student's cross entropy minus the teacher's) in nats,
    tokens and seconds so far, of all starts."""

    step: int
    loss: float
    excess: float
    tokens: int
    seconds: float


class Lessons:
    """A student that learns from its teacher on passages drawn by a mixture of domains.

    The embedding and the head stay as they are: the teacher's. Logits are made for some tokens at a time, so that a
    large vocabulary needs no more memory than the model. AdamW without decay, gradients clipped at norm 1; the rate
    rises over the first ten steps and falls linearly to 0 at the end of the budget.

    Args:
        student: a :class:`moesaic.MoesaicForCausalLM`, float32. teacher: any causal model with the same vocabulary.
        target: what is learned.
        mixture: over the domains of ``tokens``.
        tokens: token ids by domain, as ``TokenData.train``.
        sequence_length: S. batch_size: passages a step.
        learning_rate: the highest. seed: of the passages' order, and of what a router draws.
        labels: the text's own next token has this part in the loss, 0 to 1.
        train: ``"all"``, or ``"ffn"`` for experts, routers and norms only.
        budget_tokens, budget_seconds: when it is over; one of both.
        precision: ``"fp32"`` or ``"bf16"``, of the products.
    """

    def __init__(
        self,
        student: Any,
        teacher: Any,
        target: Target,
        mixture: ExcessLossMixture,
        tokens: Mapping[str, Any],
        *,
        sequence_length: int,
        batch_size: int,
        learning_rate: float,
        seed: int,
        budget_tokens: int | None = None,
        budget_seconds: float | None = None,
        labels: float = 0.0,
        train: str = "all",
        precision: str = "fp32",
    ) -> None:
        self.student, self.teacher, self.target, self.mixture = student, teacher, target, mixture
        self.precision, self.labels, self.batch_size = precision, labels, batch_size
        self.learning_rate, self.budget_tokens, self.budget_seconds = learning_rate, budget_tokens, budget_seconds
        self.seed = seed
        self._streams = {
            name: Batches({name: ids}, sequence_length=sequence_length, batch_size=1, seed=seed)
            for name, ids in tokens.items()
        }
        self.text_tokens = sum(len(ids) for ids in tokens.values())
        self.step = self.tokens = 0
        self._seconds, self._began = 0.0, time.monotonic()
        self.finished = False
        self.places = dict.fromkeys(self._streams, 0)
        self.trained = {}
        for name, parameter in student.named_parameters():
            wanted = name not in _FROZEN and (train == "all" or any(part in name for part in _FFN))
            parameter.requires_grad_(wanted)
            if wanted:
                self.trained[name] = parameter
        self.optimizer = torch.optim.AdamW(
            self.trained.values(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True
        )
        self._heads = tuple(self._head(model) for model in (student, teacher))
        self._balances = any(layer.config.balancing for layer in moe_layers(student))

    @property
    def seconds(self) -> float:
        """Spent so far, those of earlier starts too; no more after :meth:`finish`."""
        if self.finished:
            return self._seconds
        return self._seconds + time.monotonic() - self._began

    @property
    def progress(self) -> float:
        """Which share of the budget is spent, 0 to 1; 1 after :meth:`finish`."""
        if self.finished:
            return 1.0
        if self.budget_tokens is not None:
            return min(1.0, self.tokens / self.budget_tokens)
        return min(1.0, self.seconds / self.budget_seconds) if self.budget_seconds else 1.0

    def finish(self) -> None:
        """Learning is over: what is saved and loaded from now on stays over, whatever the clock says."""
        self._seconds, self.finished = self.seconds, True

    def take(self) -> Told:
        """One step.

        Raises:
            TrainingError: where the loss or its gradient is not finite; no weight has changed then.
        """
        self.student.train()
        progress = self.progress
        warmed = min(1.0, (self.step + 1) / WARMUP_STEPS)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate * warmed * (1 - progress)
        domains = self.mixture.draw(self.batch_size)
        ids_BT = self.passages(domains)
        # A router may draw numbers: of each step its own, so that one that is gone on with draws the same.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(generator(self.seed, "step", self.step).initial_seed())
            loss, own_loss, excess_B = self._backward(ids_BT)
        norm = float(torch.nn.utils.clip_grad_norm_(self.trained.values(), _CLIP))
        for name, value in (("loss", loss), ("gradient's norm", norm)):
            if not math.isfinite(value):
                raise TrainingError(f"the {name} of step {self.step + 1} is {value}: try a lower learning rate")
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        update_balancing(self.student)
        self.step += 1
        self.tokens += ids_BT[:, 1:].numel()
        if self.labels < 1:
            self.target.after_step(own_loss, self.progress)
        own = {name: [x for x, domain in zip(excess_B, domains, strict=True) if domain == name] for name in domains}
        self.mixture.after_step({name: sum(values) / len(values) for name, values in own.items()})
        return Told(self.step, loss, sum(excess_B) / len(excess_B), self.tokens, self.seconds)

    def passages(self, domains: list[str]) -> Tensor:
        """``[B, S + 1]``: the next passage of each of these domains."""
        rows: list[Tensor] = []
        for name in domains:
            rows.append(self._streams[name].batch(self.places[name]))
            self.places[name] += 1
        return torch.cat(rows).to(next(self.student.parameters()).device)

    def _backward(self, ids_BT: Tensor) -> tuple[float, float, list[float]]:
        """Gradients of the mean loss; the loss, the target's own part of it at full weight, and each passage's mean
        excess loss."""
        inputs_BS, next_T = ids_BT[:, :-1], ids_BT[:, 1:].flatten()
        with autocast(ids_BT.device, self.precision):
            with torch.no_grad():
                theirs_TD = self.teacher.model(input_ids=inputs_BS, use_cache=False).last_hidden_state.flatten(0, 1)
            ours_TD = self.student.model(input_ids=inputs_BS, use_cache=False).last_hidden_state.flatten(0, 1)
            cut_TD = ours_TD.detach().requires_grad_()
            total, own, excess = 0.0, 0.0, []
            for start in range(0, len(cut_TD), _ROWS):
                rows = slice(start, start + _ROWS)
                student_TV = F.linear(cut_TD[rows].to(self._heads[0].dtype), self._heads[0])
                with torch.no_grad():
                    teacher_TV = F.linear(theirs_TD[rows].to(self._heads[1].dtype), self._heads[1])
                loss, target, excess_T = self._loss(student_TV, teacher_TV, next_T[rows])
                (loss / len(cut_TD)).backward()
                total += loss.item() / len(cut_TD)
                own += target.item() / len(cut_TD)
                excess.append(excess_T)
        heads: list[tuple[Tensor, Tensor | None]] = [(ours_TD, cut_TD.grad)]
        if self._balances:
            balance = torch.stack([layer.aux_loss for layer in moe_layers(self.student)]).sum()
            if balance.requires_grad:  # a balancer may act after the step only
                heads.append((balance, None))
        torch.autograd.backward([head for head, _ in heads], [gradient for _, gradient in heads])
        return total, own, torch.cat(excess).view(len(ids_BT), -1).mean(dim=1).tolist()

    def _loss(self, student_TV: Tensor, teacher_TV: Tensor, next_T: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The sum of the tokens' losses, that of the target's own, and ``[T]``: what the student's cross entropy
        exceeds the teacher's by."""
        ours_T = F.cross_entropy(student_TV.float(), next_T, reduction="none")
        with torch.no_grad():
            theirs_T = F.cross_entropy(teacher_TV.float(), next_T, reduction="none")
        loss = target = ours_T.new_zeros(())
        if self.labels < 1:
            target = self.target.losses(student_TV, teacher_TV).sum()
            loss = loss + (1 - self.labels) * target
        if self.labels > 0:
            loss = loss + self.labels * ours_T.sum()
        return loss, target.detach(), ours_T.detach() - theirs_T

    def _head(self, model: Any) -> Tensor:
        """The output matrix, ``[V, D]``, in the precision in which it is used."""
        weight: Tensor = model.get_output_embeddings().weight.detach()
        return weight.bfloat16() if self.precision == "bf16" else weight.float()

    def save(self, path: Path) -> None:
        """All that the next step depends on, in one file."""
        tensors = {f"model.{name}": parameter.detach() for name, parameter in self.trained.items()}
        for name, buffer in self.student.named_buffers():
            tensors[f"buffer.{name}"] = buffer.clone()  # one may be another one's
        for name, parameter in self.trained.items():
            for part, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{part}.{name}"] = value
        note = {
            "step": self.step,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "finished": self.finished,
            "places": self.places,
            "target": self.target.state(),
            "mixture": self.mixture.state(),
        }
        tensors["note"] = torch.from_numpy(np.frombuffer(json.dumps(note).encode(), dtype=np.uint8).copy())
        save_atomically(tensors, path)

    def load(self, path: Path) -> None:
        """Go on from what :meth:`save` wrote.

        Raises:
            CheckpointError: for a file that is damaged or of another model.
        """
        try:
            tensors = load_file(path)
            note = json.loads(tensors.pop("note").numpy().tobytes())
            with torch.no_grad():
                for name, parameter in self.trained.items():
                    parameter.copy_(tensors[f"model.{name}"])
                for name, buffer in self.student.named_buffers():
                    buffer.copy_(tensors[f"buffer.{name}"])
            for name, parameter in self.trained.items():
                parts = ("step", "exp_avg", "exp_avg_sq")
                if f"optimizer.step.{name}" in tensors:
                    self.optimizer.state[parameter] = {part: tensors[f"optimizer.{part}.{name}"] for part in parts}
            self.step, self.tokens = int(note["step"]), int(note["tokens"])
            self._seconds, self._began = float(note["seconds"]), time.monotonic()
            self.finished = bool(note.get("finished", False))
            self.places = {name: int(note["places"][name]) for name in self._streams}
            self.target.load(note["target"])
            self.mixture.load(note["mixture"])
        except Exception as error:  # safetensors, json and shapes each fail in a way of their own
            said = " ".join(str(error).split())[:200]
            raise CheckpointError(f"{str(path)!r} cannot be gone on from: {said}") from error
