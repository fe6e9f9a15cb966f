"""What merging does to quality, in miniature: two fine-tuned models of one small base, merged in every way."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.utils import logging

from moesaic.bench.part import Part
from moesaic.convert import MergeSettings, UpcycleSettings, merge, upcycle
from moesaic.data import load_corpus
from moesaic.data.split import split_corpus

Texts = Mapping[str, tuple[Tensor, Tensor]]
"""Of each domain the bytes to train on and those held out, int64."""
HEADER = ("model", "parameters", "code", "prose", "mean")
MERGES: dict[str, tuple[str, dict[str, Any]]] = {
    "linear (the average)": ("linear", {}),
    "slerp": ("slerp", {}),
    "task arithmetic, λ 1.4": ("task_arithmetic", {"scale": 1.4}),
    "TIES, density 0.2": ("ties", {}),
    "TIES, density 0.5, λ 1.4": ("ties", {"density": 0.5, "scale": 1.4}),
    "DARE, density 0.5": ("dare", {}),
    "DARE with TIES, density 0.5": ("dare_ties", {}),
    "breadcrumbs, density 0.1": ("breadcrumbs", {}),
    "breadcrumbs, density 0.9, λ 1.4": ("breadcrumbs", {"density": 0.9, "scale": 1.4}),
    "consensus": ("consensus", {}),
}
"""What is said of each merge, its method and options."""


@dataclass(frozen=True)
class Sizes:
    """Of the base model, its training on both domains, and that of each fine-tuned model on one.

    Args:
        steps, tune_steps: optimizer steps of ``batch`` sequences of ``length`` bytes; ``mix_steps`` of the mixtures.
        held_out: sequences of each domain that the losses are measured on.
    """

    d_model: int = 96
    d_ff: int = 256
    layers: int = 3
    steps: int = 300
    tune_steps: int = 150
    mix_steps: int = 60
    batch: int = 16
    length: int = 256
    held_out: int = 96
    most_bytes: int = 4_000_000


def library_texts(sizes: Sizes) -> Texts:
    """The standard library's code and prose, as bytes."""
    train, held_out = split_corpus(load_corpus())

    def joined(documents: list[Any], domain: str) -> Tensor:
        text = "\n\n".join(each.text for each in documents if each.domain == domain)
        return as_bytes(text, sizes.most_bytes)

    return {domain: (joined(train, domain), joined(held_out, domain)) for domain in ("code", "prose")}


def as_bytes(text: str, most: int) -> Tensor:
    """``[N]`` int64, at most ``most`` of them."""
    return torch.from_numpy(np.frombuffer(text.encode()[:most], dtype=np.uint8).astype(np.int64))


class Family:
    """A base, what was fine-tuned from it and what that was merged into, each a folder that is made once.

    Args:
        folder: to keep them in. say: called with a line before each one that is made.
    """

    def __init__(
        self, folder: Path, texts: Texts, sizes: Sizes, say: Callable[[str], None] = lambda line: None
    ) -> None:
        self.folder, self.texts, self.sizes, self._say = folder, texts, sizes, say
        self.base = self._made("base", self._train_base)
        self.tuned = [self._tuned(domain) for domain in texts]
        self.both = self._trained("both", self.base, list(texts), 2 * sizes.tune_steps, 1e-3)

    def _train_base(self, out: Path) -> None:
        s = self.sizes
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=256,
            hidden_size=s.d_model,
            intermediate_size=s.d_ff,
            num_hidden_layers=s.layers,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=s.length,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=None,
        )
        model = LlamaForCausalLM(config)
        self._fit(model, list(self.texts), s.steps, 3e-3)
        model.save_pretrained(out)

    def _tuned(self, domain: str) -> Path:
        return self._trained(f"tuned-{domain}", self.base, [domain], self.sizes.tune_steps, 1e-3)

    def _trained(self, name: str, start: Path, domains: list[str], steps: int, rate: float) -> Path:
        def make(out: Path) -> None:
            model = AutoModelForCausalLM.from_pretrained(start)
            self._fit(model, domains, steps, rate)
            model.save_pretrained(out)

        return self._made(name, make)

    def merged(self, name: str, settings: MergeSettings) -> Path:
        """The fine-tuned models merged."""
        return self._made(name, lambda out: merge(self.base, out, replace(settings, models=self.tuned)))

    def mixtures(self) -> dict[str, Path]:
        """The fine-tuned models as experts, the base's copies as experts, and both after as much training."""
        mixed = self.merged("mixed", MergeSettings(self.tuned, into="experts", with_base=False))
        settings = UpcycleSettings(num_experts=2)
        copied = self._made("copied", lambda out: upcycle(self.base, out, settings))
        domains, steps = list(self.texts), self.sizes.mix_steps
        return {
            "experts from both, routers untrained": mixed,
            f"experts from both, {steps} steps on both": self._trained("mixed-on", mixed, domains, steps, 1e-3),
            f"the base's copies as experts, {steps} steps on both": self._trained(
                "copied-on", copied, domains, steps, 1e-3
            ),
            f"the base, {steps} steps on both": self._trained("base-on", self.base, domains, steps, 1e-3),
        }

    def _made(self, name: str, make: Callable[[Path], object]) -> Path:
        path = self.folder / name
        if not path.exists():
            self._say(name)
            making = self.folder / f"{name}.making"
            shutil.rmtree(making, ignore_errors=True)
            make(making)
            making.rename(path)
        return path

    def _fit(self, model: PreTrainedModel, domains: list[str], steps: int, rate: float) -> None:
        torch.manual_seed(1)
        model.train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.01)
        warm = max(steps // 20, 1)
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = rate * min((step + 1) / warm, 0.55 + 0.45 * math.cos(math.pi * step / steps))
            ids = self._draw(domains)
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def _draw(self, domains: list[str]) -> Tensor:
        """``[B, S]`` int64: sequences of the domains in turns."""
        rows = []
        for row in range(self.sizes.batch):
            data = self.texts[domains[row % len(domains)]][0]
            start = int(torch.randint(len(data) - self.sizes.length, ()))
            rows.append(data[start : start + self.sizes.length])
        return torch.stack(rows)


@torch.no_grad()
def bits_per_byte(folder: Path, held_out: Tensor, sizes: Sizes) -> float:
    """The mean loss on evenly spread sequences of the held-out bytes, in bits."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    starts = torch.linspace(0, len(held_out) - sizes.length, sizes.held_out).long()
    losses = []
    for part in starts.split(16):
        ids = torch.stack([held_out[start : start + sizes.length] for start in part.tolist()])
        logits = model(input_ids=ids).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())  # without balancing
        losses.append(float(loss) * len(part))
    return sum(losses) / len(starts) / math.log(2)


def measure(folder: Path, texts: Texts, sizes: Sizes, say: Callable[[str], None] = lambda line: None) -> Part:
    """Bits per byte of every merge on held-out code and prose, beside the base, the fine-tuned models, and the base
    trained on both domains as long as both fine-tuned models together.

    Models that are in ``folder`` already are not made again.
    """
    logging.disable_progress_bar()
    family = Family(folder, texts, sizes, say)
    models = {"base": family.base}
    models |= {f"fine-tuned on {domain}": path for domain, path in zip(texts, family.tuned, strict=True)}
    for number, (name, (by, options)) in enumerate(MERGES.items()):
        models[name] = family.merged(f"merged-{number}", MergeSettings(family.tuned, by=by, options=options))
    models |= family.mixtures()
    models[f"base trained on both, {2 * sizes.tune_steps} steps"] = family.both
    rows, figures = [], {}
    for name, path in models.items():
        losses = [bits_per_byte(path, held_out, sizes) for _, held_out in texts.values()]
        mean = sum(losses) / len(losses)
        figures[name] = mean
        count = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_pretrained(path).parameters())
        rows.append((name, f"{count / 1e6:.2f} M", *(f"{loss:.3f}" for loss in losses), f"{mean:.3f}"))
    lines = [
        f"bits per byte on {sizes.held_out} held-out sequences of {sizes.length} bytes a domain, smaller is better; "
        f"the base was trained for {sizes.steps} steps of {sizes.batch * sizes.length} bytes on both domains, each "
        f"fine-tuned model for {sizes.tune_steps} on one"
    ]
    best = min(MERGES, key=figures.__getitem__)
    tuned = " and ".join(f"{figures[f'fine-tuned on {domain}']:.3f}" for domain in texts)
    lines.append(
        f"the best merge without further training is {best} with {figures[best]:.3f} in the mean, where the fine-tuned "
        f"models have {tuned} and the base {figures['base']:.3f}"
    )
    return Part("What merging does to quality, in miniature", HEADER, rows, [], lines, figures)
