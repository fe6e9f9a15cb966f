"""What the routers of a trained model do: experts per token, parameters used, balance, specialization."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from moesaic.data import validation_windows
from moesaic.inspect import metrics
from moesaic.layer import MoE, moe_layers
from moesaic.routing.routing import count_slots
from moesaic.train.precision import autocast

TOKENS = 8192
"""Of each domain, that the routing is counted on."""

Counts = list[npt.NDArray[np.int64]]


@torch.no_grad()
def measure_routing(
    model: nn.Module,
    tokens: Mapping[str, npt.NDArray[Any]],
    *,
    sequence_length: int,
    batch_size: int,
    precision: str,
    max_tokens: int = TOKENS,
) -> dict[str, Any]:
    """Figures of the routing on validation text, every domain alike.

    Keys:
        experts, zero: {domain: slots that a token takes of experts with weights, and of zero-computation experts; the
            mean over tokens and layers, all iterations of a layer together}.
        active_parameters: those that a token meets, by these slots; whatever it meets twice counts twice.
        imbalance: largest over mean slots per expert, the mean over layers; 1 is even.
        specialization: how far a slot's expert gives away its domain, 0 to 1, the mean over layers
            (:func:`~moesaic.inspect.metrics.domain_information`).
    """
    layers = moe_layers(model)
    counts = [np.zeros((len(tokens), layer.config.num_choices), dtype=np.int64) for layer in layers]
    seen = np.zeros(len(tokens), dtype=np.int64)
    device = next(model.parameters()).device
    model.eval()
    with _counting(layers) as fresh, autocast(device, precision):
        windows = validation_windows(
            tokens, sequence_length, max(1, max_tokens // sequence_length), batch_size=batch_size
        )
        for domain, ids in windows:
            d = list(tokens).index(domain)
            model(input_ids=ids[:, :-1].to(device), use_cache=False)
            seen[d] += ids[:, :-1].numel()
            for total, one in zip(counts, fresh, strict=True):
                total[d] += one
    return _figures(model, layers, counts, seen, list(tokens))


@contextmanager
def _counting(layers: list[MoE]) -> Iterator[Counts]:
    """``[C]`` slots of each layer in the model's last forward, for as long as the block runs."""
    found: Counts = [np.zeros(0, dtype=np.int64) for _ in layers]

    def hook(index: int) -> Any:
        def after(layer: MoE, args: Any, output: Any) -> None:
            columns = layer.config.num_choices
            each = [count_slots(routing.expert_ids, columns) for routing in layer.last_routings]
            found[index] = torch.stack(each).sum(dim=0).cpu().numpy()

        return after

    with ExitStack() as hooks:
        for index, layer in enumerate(layers):
            hooks.callback(layer.register_forward_hook(hook(index)).remove)
        yield found


def _figures(
    model: nn.Module, layers: list[MoE], counts: Counts, seen: npt.NDArray[np.int64], domains: list[str]
) -> dict[str, Any]:
    experts, zero = np.zeros(len(domains)), np.zeros(len(domains))
    active = float(sum(parameter.numel() for parameter in model.parameters()))
    imbalances, informations = [], []
    for layer, counts_DC in zip(layers, counts, strict=True):
        ffn = layer.config.num_experts
        rates_DE = counts_DC[:, :ffn] / seen[:, None]
        experts += rates_DE.sum(axis=1) / len(layers)
        zero += counts_DC[:, ffn:].sum(axis=1) / seen / len(layers)
        sizes_E = expert_sizes(layer)
        active += float((rates_DE.mean(axis=0) - 1) @ sizes_E)
        load_DE = metrics.load(counts_DC[:, :ffn])
        imbalances.append(metrics.imbalance(load_DE.mean(axis=0)))
        informations.append(metrics.domain_information(load_DE))
    return {
        "experts": dict(zip(domains, experts.tolist(), strict=True)),
        "zero": dict(zip(domains, zero.tolist(), strict=True)),
        "active_parameters": active,
        "imbalance": float(np.mean(imbalances)),
        "specialization": float(np.mean(informations)),
    }


def expert_sizes(layer: MoE) -> npt.NDArray[np.float64]:
    """``[E]``: parameters of each expert."""
    c = layer.config
    total = sum(parameter.numel() for parameter in layer.experts.parameters())
    widths_E = np.asarray(c.expert_d_ffs or [c.d_ff] * c.num_experts, dtype=np.float64)
    return np.asarray(total * widths_E / widths_E.sum())
