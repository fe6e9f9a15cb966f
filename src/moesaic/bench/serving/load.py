"""What is asked of a server: prompts of random tokens and how many tokens to answer each with, fixed by a seed."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Job:
    """One request of a load: it ends after ``new_tokens``, whatever tokens they are.

    Attributes:
        adapter: the name of one; None: the base model.
    """

    prompt_ids: tuple[int, ...]
    new_tokens: int
    adapter: str | None = None


def mixed(
    vocab_size: int,
    count: int = 32,
    prompts: tuple[int, int] = (16, 512),
    outputs: tuple[int, int] = (32, 128),
    seed: int = 0,
) -> list[Job]:
    """``count`` requests with nothing in common; lengths are uniform between both bounds, which count."""
    dice = random.Random(seed)
    return [Job(_tokens(dice, dice.randint(*prompts), vocab_size), dice.randint(*outputs)) for _ in range(count)]


def grouped(
    vocab_size: int,
    groups: int = 8,
    each: int = 8,
    prompt: int = 512,
    shared: float = 0.9,
    new_tokens: int = 8,
    seed: int = 0,
) -> list[Job]:
    """Groups of requests whose prompts begin with the same ``shared`` part, in random order."""
    dice = random.Random(seed)
    common = round(prompt * shared)
    jobs = []
    for _ in range(groups):
        prefix = _tokens(dice, common, vocab_size)
        jobs += [Job(prefix + _tokens(dice, prompt - common, vocab_size), new_tokens) for _ in range(each)]
    dice.shuffle(jobs)
    return jobs


def spread(jobs: Sequence[Job], adapters: Sequence[str]) -> list[Job]:
    """The same requests, each to the next of ``adapters``."""
    return [replace(job, adapter=adapters[i % len(adapters)]) for i, job in enumerate(jobs)]


def _tokens(dice: random.Random, count: int, vocab_size: int) -> tuple[int, ...]:
    # Not 0, which ends a text.
    return tuple(dice.randrange(1, vocab_size) for _ in range(count))
