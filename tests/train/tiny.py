"""A model, a corpus and a run that take a fraction of a second; what the tests of this folder share."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from moesaic.data import Batches, TokenData, prepare
from moesaic.train.display import Display
from moesaic.train.loop import Trainer
from moesaic.train.metrics import StepMetrics, read_metrics
from moesaic.train.model import build_model
from moesaic.train.recipe import Recipe
from moesaic.train.recipe_file import override

CPU = torch.device("cpu")
LONG_AGO = 1_600_000_000  # an old file's time is enough for the cache to know it again

SETTINGS = [
    *["model.d_model=32", "model.num_layers=2", "model.num_heads=2", "model.num_kv_heads=1", "model.d_ff=24"],
    *["model.num_experts=4", "model.max_length=64", "data.vocab_size=300", "data.sequence_length=16"],
    *["data.validation_fraction=0.2", "train.steps=12", "train.batch_size=4", "train.warmup_steps=3"],
    *["train.learning_rate=0.01", "train.save_every=4", "train.eval_tokens=128", "train.precision=fp32"],
]


def write_corpus(folder: Path) -> list[str]:
    """Sentences and sums, ten files each; returns what ``data.sources`` takes."""
    draw = random.Random(0)
    words = "the cat sat on a mat while it rained and some dog looked at the red moon".split()  # noqa: SIM905
    for number in range(10):
        sentences = " ".join(draw.choice(words) for _ in range(400))
        sums = "\n".join(
            f"{a} + {b} = {a + b}" for a, b in ((draw.randrange(50), draw.randrange(50)) for _ in range(60))
        )
        for domain, text in (("words", sentences), ("sums", sums)):
            (folder / domain).mkdir(exist_ok=True)
            path = folder / domain / f"{number}.txt"
            path.write_text(text)
            os.utime(path, (LONG_AGO, LONG_AGO))
    return [f"words={folder / 'words'}", f"sums={folder / 'sums'}"]


def recipe(sources: Sequence[str], *overrides: str) -> Recipe:
    return override(Recipe(name="tiny"), [f"data.sources={list(sources)}", *SETTINGS, *overrides])


def data_of(recipe: Recipe) -> TokenData:
    data = recipe.data
    return prepare(data.sources, vocab_size=data.vocab_size, validation_fraction=data.validation_fraction)


def trainer_of(recipe: Recipe) -> Trainer:
    """A trainer as the run makes it."""
    data, train = data_of(recipe), recipe.train
    batches = Batches(
        data.train, sequence_length=recipe.data.sequence_length, batch_size=train.batch_size, seed=train.seed
    )
    model = build_model(recipe, data.vocab_size, data.tokenizer, CPU)
    return Trainer(model, batches, train, CPU, "fp32")


def losses(folder: Path) -> dict[int, tuple[float, float, float]]:
    """Step to (loss, balancing loss, gradient norm), as a run logged them."""
    lines = [line for line in read_metrics(folder / "metrics.jsonl") if line["kind"] == "step"]
    assert len({line["step"] for line in lines}) == len(lines), "a step was logged twice"
    return {line["step"]: (line["loss"], line["aux_loss"], line["grad_norm"]) for line in lines}


class AtStep(Display):
    """Does something when a step has been done, and keeps what it was told to say."""

    def __init__(self, step: int = -1, action: Callable[[], Any] = lambda: None) -> None:
        self.at, self.action = step, action
        self.said: list[str] = []

    def say(self, line: str) -> None:
        self.said.append(line)

    def step(self, metrics: StepMetrics) -> None:
        if metrics.step == self.at:
            self.action()


def send(number: signal.Signals) -> Callable[[], None]:
    """A signal to this thread, so that Python runs its handler before the next line; one to the process may come to
    any of its threads, a moment later, and two of them then count as one."""
    return lambda: signal.raise_signal(number)
