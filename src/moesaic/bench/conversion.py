"""What conversion costs in quality and brings in speed: models made from one dense model, beside it.

T tokens · D model width · L layers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moesaic.bench.part import Part
from moesaic.bench.report import write
from moesaic.bench.targets import Verdict
from moesaic.bench.timing import Times, alternate, timed
from moesaic.errors import CheckpointError
from moesaic.hf import use_native_linears
from moesaic.hf.freezing import freeze
from moesaic.hf.load import load_model
from moesaic.layer import moe_layers
from moesaic.train.evaluation import Evaluation, evaluate_folder

HEADER = (
    "model",
    "FFN parameters of a token",
    "training",
    "perplexity, code",
    "prose",
    "of the dense one",
    "same next token",
    "KL (nats)",
)
SPEED_HEADER = ("model", "dtype", "FFN of a token, µs a layer", "transformers' dense FFN", "dense FFN on our kernels")
WORST_RATIO = 1.25
"""Perplexity over the dense model's, at half of the feed-forward's parameters."""
_WARM = 8


@dataclass(frozen=True)
class Converted:
    """One model of the table.

    Args:
        name: in words. folder: where it lies. training: how long, in words; empty where there was none.
    """

    name: str
    folder: Path
    training: str = ""


@dataclass(frozen=True)
class Quality:
    """What is measured of one model, on held-out text.

    Args:
        active: parameters of all feed-forwards that a token meets, routers not counted; of the dense one all.
        perplexity, agreement, kl: by domain; the last two against the dense model.
        ratio: of the perplexities, their geometric mean over the domains.
    """

    active: int
    dense: int
    perplexity: dict[str, float]
    agreement: dict[str, float]
    kl: dict[str, float]
    ratio: float


def quality(model: Path, dense: Path, cache: Path, *, max_tokens: int, sources: Sequence[str] = ("stdlib",)) -> Quality:
    """Measure ``model`` against ``dense`` on the text that training holds out, or read what ``cache`` tells of that."""
    key = {"model": _stamp(model), "dense": _stamp(dense), "tokens": max_tokens, "sources": list(sources)}
    told = json.loads(cache.read_text(encoding="utf-8")) if cache.exists() else {}
    if told.get("key") != key:
        report = evaluate_folder(
            model, sources=sources, split="validation", max_tokens=max_tokens, batch_size=1, against=dense
        )
        found = _quality(report, load_model(model)[0], load_model(dense)[0])
        told = {"key": key, "quality": asdict(found)}
        write(told, cache)
    return Quality(**told["quality"])


def _quality(report: Evaluation, model: PreTrainedModel, dense: PreTrainedModel) -> Quality:
    logs = [torch.tensor(each.ratio).log() for each in report.agreement.values()]
    return Quality(
        active=active_parameters(model),
        dense=active_parameters(dense),
        perplexity={name: each.perplexity for name, each in report.domains.items()},
        agreement={name: each.agreement for name, each in report.agreement.items()},
        kl={name: each.kl for name, each in report.agreement.items()},
        ratio=float(torch.stack(logs).mean().exp()),
    )


def active_parameters(model: nn.Module) -> int:
    """Parameters of the feed-forwards that one token meets; those of routers are not counted."""
    layers = moe_layers(model)
    if not layers:
        return sum(parameter.numel() for ffn in feed_forwards(model) for parameter in ffn.parameters())
    routers = sum(parameter.numel() for layer in layers for parameter in layer.router.parameters())
    whole = sum(parameter.numel() for layer in layers for parameter in layer.parameters())
    return whole - routers - sum(layer.idle_parameters() for layer in layers)


def feed_forwards(model: nn.Module) -> list[nn.Module]:
    """The feed-forward of each layer, ``model.layers[i].mlp``."""
    return [module for name, module in model.named_modules() if name.split(".")[-1] == "mlp"]


def _stamp(folder: Path) -> list[Any]:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"there is no converted model in {str(folder)!r}")
    return [str(folder), [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]]


def inputs(model: PreTrainedModel, ids: Tensor) -> list[Tensor]:
    """What each feed-forward of ``model`` reads of a text ``[1, S]``: L times ``[S, D]``."""
    found: list[Tensor] = []
    handles = [
        ffn.register_forward_pre_hook(lambda _, args: found.append(args[0].detach().flatten(0, -2)))
        for ffn in feed_forwards(model)
    ]
    try:
        with torch.no_grad():
            model(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return found


def ffn_times(
    dense: Path, models: Mapping[str, Path], ids: Tensor, dtype: torch.dtype, seconds: float
) -> dict[str, Times]:
    """Seconds of one token's feed-forwards in all layers, one after the other as in a forward, all models alternating.

    Every round takes another token of the text, the same for all. ``"dense"`` is the dense model's as transformers
    computes it, ``"dense, our kernels"`` with :func:`moesaic.hf.use_native_linears`; the others are frozen.
    """
    base = load_model(dense, dtype=dtype)[0]
    read_LTD = inputs(base, ids)
    ours = load_model(dense, dtype=dtype)[0]
    use_native_linears(ours)
    contenders = {"dense": feed_forwards(base), "dense, our kernels": feed_forwards(ours)}
    for name, folder in models.items():
        contenders[name] = feed_forwards(freeze(load_model(folder, dtype=dtype)[0]))

    def run(layers: list[nn.Module]) -> Callable[[int], float]:
        def once(number: int) -> float:
            token = number % len(ids[0])
            rows = [x_TD[token].view(1, 1, -1) for x_TD in read_LTD]
            with torch.no_grad():
                return timed(lambda: [ffn(row) for ffn, row in zip(layers, rows, strict=True)])

        return once

    works = {name: run(layers) for name, layers in contenders.items()}
    for work in works.values():
        for number in range(_WARM):
            work(number)
    return alternate(works, {}, seconds, most_rounds=2000)[0]


@torch.no_grad()
def distance_with_all_on(split: Path, dense: Path, ids: Tensor) -> float:
    """‖logits − dense logits‖ / ‖dense logits‖ of a split model whose tokens use all experts, on ids ``[1, S]``."""
    model, parent = load_model(split)[0], load_model(dense)[0]
    for layer in moe_layers(model):
        layer.router.top_k = layer.config.num_experts
    ours, theirs = (each.float()(input_ids=ids).logits for each in (model, parent))
    return float((ours - theirs).norm() / theirs.norm())


def quality_part(models: Sequence[Converted], found: Mapping[str, Quality], tokens: int, half: str) -> Part:
    """The table of quality; ``half`` names the model with half of the parameters active, which has a target."""
    rows = []
    for model in models:
        told = found[model.name]
        agreement, kl = (sum(each.values()) / len(each) for each in (told.agreement, told.kl))
        is_dense = told.ratio == 1 and kl == 0
        rows.append(
            (
                model.name,
                f"{told.active / 1e6:.1f} M ({told.active / told.dense:.0%})",
                model.training,
                *(f"{told.perplexity[name]:.2f}" for name in ("code", "prose")),
                "1" if is_dense else f"{told.ratio:.3f}",
                "" if is_dense else f"{agreement:.1%}",
                "" if is_dense else f"{kl:.3f}",
            )
        )
    target = Verdict("quality", half, "perplexity over the dense model's", WORST_RATIO, found[half].ratio, at_most=True)
    lines = [
        f"perplexity on about {tokens:,} tokens each of code and prose of the standard library that neither "
        "calibration nor training saw; the ratio is the geometric mean of both, agreement and KL(dense ‖ model) are "
        "means of both"
    ]
    return Part("Quality", HEADER, rows, [target], lines)


def speed_part(times: Mapping[str, Mapping[str, Times]], layers: int, half: str) -> Part:
    """The table of speed, from :func:`ffn_times` by dtype."""
    rows, verdicts = [], []
    for dtype, found in times.items():
        for name, each in found.items():
            if name.startswith("dense"):
                continue
            cells = []
            for other in ("dense", "dense, our kernels"):
                ratio, low, high = each.ratio_of(found[other])
                cells.append(f"{ratio:.2f}x as long ({low:.2f} to {high:.2f})")
                if name == half and other == "dense":
                    verdicts.append(
                        Verdict("speed", f"{name}, {dtype}", "the dense FFN's time over its own", 1.0, ratio)
                    )
            rows.append((name, dtype, f"{each.median / layers * 1e6:.0f}", *cells))
    lines = [
        "the feed-forwards of all layers, one token, one after the other as in a forward, so that the weights of all "
        "of them go through the caches; all models alternate in one process; in brackets the quartiles of the ratios"
    ]
    return Part("One token's feed-forwards", SPEED_HEADER, rows, verdicts, lines)
