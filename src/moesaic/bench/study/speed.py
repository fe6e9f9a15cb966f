"""How fast the trained models are, all in one process and taking turns."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from statistics import median
from typing import Any

import numpy as np
import torch

from moesaic.bench.study.runs import Task
from moesaic.data import Batches, validation_windows
from moesaic.hf.load import load_model
from moesaic.train.job import Training
from moesaic.train.loop import Trainer
from moesaic.train.precision import autocast, choose_device, choose_precision

ROUNDS = 15
_WARM = 3
_STILL = 1e-12  # a learning rate that leaves the trained weights, and so the routes, as they are


@dataclass
class Contender:
    """A trained model that can do one step of training, and one forward of validation text."""

    trainer: Trainer
    batches: Iterator[torch.Tensor]
    tokens: int

    def training(self) -> None:
        """One optimizer step."""
        self.trainer.model.train()
        self.trainer.train_step()

    @torch.no_grad()
    def forward(self) -> None:
        """One batch of as many tokens, without gradients."""
        model = self.trainer.model.eval()
        with autocast(self.trainer.device, self.trainer.precision):
            model(input_ids=next(self.batches), use_cache=False)


def measure_speed(
    tasks: Sequence[Task], rounds: int = ROUNDS, say: Callable[[str], None] = lambda line: None
) -> dict[str, dict[str, list[float]]]:
    """Tokens per second of each task's model, ``{name of the recipe: {"training" | "forward": one a round}}``.

    In every round each model does one step and one forward, in an order drawn anew, so that what disturbs one disturbs
    all. One thread, as they were trained.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        contenders = {task.entry.name: _contender(task) for task in tasks}
        rates: dict[str, dict[str, list[float]]] = {name: {"training": [], "forward": []} for name in contenders}
        order, draw = list(contenders), random.Random(0)
        for number in range(_WARM + rounds):
            draw.shuffle(order)
            for name in order:
                for kind, act in _acts(contenders[name]).items():
                    started = time.perf_counter()
                    act()
                    if number >= _WARM:
                        rates[name][kind].append(contenders[name].tokens / (time.perf_counter() - started))
            say(f"speed: round {number + 1} of {_WARM + rounds}")
    finally:
        torch.set_num_threads(threads)
    return rates


def middle(rates: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The median of each kind's rounds."""
    return {kind: median(values) for kind, values in rates.items()}


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float, float]:
    """Median and quartiles of one contender's rates over another's, round by round."""
    low, middle, high = np.percentile(np.asarray(ours) / np.asarray(theirs), [25, 50, 75])
    return float(middle), float(low), float(high)


def _acts(contender: Contender) -> dict[str, Callable[[], None]]:
    return {"training": contender.training, "forward": contender.forward}


def _contender(task: Task) -> Contender:
    recipe = task.recipe
    train = recipe.train.model_copy(update={"learning_rate": _STILL})
    data: Any = Training(recipe).read(None)
    device = choose_device(train.device)
    model, _ = load_model(task.folder / "model", dtype=torch.float32, device=device)
    length = recipe.data.sequence_length
    batches = Batches(
        data.train, sequence_length=length, batch_size=train.batch_size, seed=train.seed, mixture=recipe.data.mixture
    )
    precision = choose_precision(train.precision, device)
    trainer = Trainer(model, batches, train, device, precision)
    windows = validation_windows(data.validation, length, 4 * train.batch_size, batch_size=train.batch_size)
    full = [ids[:, :-1].to(device) for _, ids in windows if len(ids) == train.batch_size]
    return Contender(trainer, cycle(full), train.batch_size * length)
