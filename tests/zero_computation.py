"""A layer with zero-computation experts in plain loops: MoE++'s and AdaMoE's formulas, in float64.

The feed-forward experts are those of ``reference.py``; here are the others, the routers that choose among all, their
losses, and the capacity of both kinds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tests import reference
from torch import Tensor

from moesaic import MoEConfig

NULL = reference.NULL


@dataclass
class Answer:
    """What the formulas say about one forward."""

    output: Tensor  # [T, D]
    aux_loss: Tensor  # scalar
    ids: list[list[int]]  # after capacity
    logits: list[list[Tensor]]
    margin: float  # the smallest distance between scores that decide
    counts: list[int]  # before capacity


def moe(
    x: Tensor,
    parameters: Mapping[str, Tensor],
    config: MoEConfig,
    before: Sequence[Sequence[Tensor]] | None = None,
    counts: list[int] | None = None,
    masked: Sequence[bool] = (),
) -> Answer:
    """The layer for tokens ``x`` [T, D].

    Args:
        parameters: by the names of the layer's state dict, float64.
        before: the logits of the layer before (gating residual).
        counts: slots of all columns that the losses go by; those of ``x`` by default.
    """
    kinds = [name for name, number in sorted(config.zero_computation_experts.items()) for _ in range(number)]
    num_ffn, columns, top_k = config.num_experts, config.num_experts + len(kinds), config.top_k
    ids, weights, probabilities, logits, margin = [], [], [], [], math.inf
    for t, token in enumerate(x):
        own = [(token * row).sum() for row in parameters["router.weight"]]
        if before is not None:
            residual = parameters["router.residual"]
            own = [
                z + sum(w * g for w, g in zip(row, before[t], strict=True))
                for z, row in zip(own, residual, strict=True)
            ]
        exponentials = [torch.exp(z) for z in own]
        p = [each / sum(exponentials) for each in exponentials]
        ranked = sorted(range(columns), key=lambda e: -p[e].item())
        taken = ranked[:top_k]
        margin = min([margin, *((p[a] - p[b]).item() for a, b in zip(taken, ranked[1 : top_k + 1], strict=False))])
        counted = [e for e in taken if e < num_ffn] if config.router == "null_experts" else taken
        total = sum(p[e] for e in counted)
        logits.append(own)
        probabilities.append(p)
        ids.append([NULL] * top_k if masked and masked[t] else taken)
        weights.append([p[e] / total if e in counted else 0 * p[e] for e in taken])

    asked = [sum(row.count(e) for row in ids) for e in range(columns)]
    there = [p for p, row in zip(probabilities, ids, strict=True) if row[0] != NULL]
    aux: Any = x.new_zeros(())
    for name, entry in config.balancing.items():
        settings = entry if isinstance(entry, Mapping) else {"coefficient": entry}
        aux = aux + settings["coefficient"] * loss(name, settings, asked if counts is None else counts, there, num_ffn)
    kept = limit(ids, num_ffn, columns, config)

    outputs = []
    for token, row, own in zip(x, kept, weights, strict=True):
        y = 0 * token
        for e, weight in zip(row, own, strict=True):
            if e != NULL:
                y = y + weight * say(token, parameters, e, kinds, config)
        outputs.append(y)
    return Answer(torch.stack(outputs) if outputs else 0 * x, aux, kept, logits, margin, asked)


def say(token: Tensor, parameters: Mapping[str, Tensor], e: int, kinds: list[str], config: MoEConfig) -> Tensor:
    """What one expert makes of one token."""
    if e < config.num_experts:
        return reference.expert(token, parameters, e, config.activation)
    kind = kinds[e - config.num_experts]
    if kind == "zero":
        return 0 * token
    if kind == "copy":
        return token
    assert kind == "constant"
    name = f"zero_computation.experts.{e - config.num_experts}"
    gates = [torch.exp((row * token).sum()) for row in parameters[f"{name}.weight"]]
    return (gates[0] * token + gates[1] * parameters[f"{name}.vector"]) / (gates[0] + gates[1])


def loss(
    name: str, settings: Mapping[str, Any], counts: list[int], probabilities: list[list[Tensor]], num_ffn: int
) -> Any:
    """columns · Σ η · f · P, f being a share of the slots."""
    columns = len(counts)
    f = [count / max(sum(counts), 1) for count in counts]
    eta = [1.0] * columns
    if name == "null_load_balancing":
        f[num_ffn:] = [sum(f[num_ffn:]) / (columns - num_ffn)] * (columns - num_ffn)
    elif name == "heterogeneous_load_balancing":
        eta[num_ffn:] = [settings.get("tau", 0.75)] * (columns - num_ffn)
    importance = [sum(p[e] for p in probabilities) / max(len(probabilities), 1) for e in range(columns)]
    return columns * sum(a * b * c for a, b, c in zip(eta, f, importance, strict=True))


def limit(ids: list[list[int]], num_ffn: int, columns: int, config: MoEConfig) -> list[list[int]]:
    """All first choices before all second ones; τ times the rows for a feed-forward expert."""
    if config.capacity_factor == 0:
        return ids
    tau = config.capacity_tau
    share = abs(config.capacity_factor) * len(ids) * config.top_k / (tau * num_ffn + columns - num_ffn)
    room = [math.ceil(share * (tau if e < num_ffn else 1)) for e in range(columns)]
    kept = [list(row) for row in ids]
    for k in range(config.top_k):
        for row in kept:
            if row[k] != NULL:
                room[row[k]] -= 1
                if room[row[k]] < 0:
                    row[k] = NULL
    return kept
