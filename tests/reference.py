"""A mixture of experts written with plain Python loops, straight from the papers' formulas, in float64.

It shares no code with the package: one token, one slot, one expert at a time. The package is judged by it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

NULL = -1  # a slot without an expert, in this file


@dataclass
class Answer:
    """What the reference says about one forward of the layer."""

    output: Tensor  # [T, D]
    aux_loss: Tensor  # scalar
    ids: list[list[int]]  # after capacity; NULL for a slot that has no expert
    dropped: int
    margin: float  # the smallest distance of a taken expert's score from one that was not taken
    counts: list[int]  # slots per expert before capacity


@dataclass
class Settings:
    """The settings of the layer that the formulas need, by the names of ``moesaic.MoEConfig``."""

    num_experts: int
    top_k: int
    router: str = "softmax_topk"
    router_options: Mapping[str, Any] = field(default_factory=dict)
    balancing: Mapping[str, float] = field(default_factory=dict)
    capacity_factor: float = 0.0
    activation: str = "swiglu"
    num_shared_experts: int = 0


def moe(x: Tensor, parameters: Mapping[str, Tensor], settings: Settings, masked: list[bool] | None = None) -> Answer:
    """The whole layer for tokens ``x`` [T, D]; ``parameters`` by the names of the layer's state dict, all float64."""
    experts = range(settings.num_experts)
    ids, weights, scores, logits, margin = [], [], [], [], math.inf
    for token in x:
        token_logits = [sum_of(token * row) for row in parameters["router.weight"]]
        taken, taken_weights, token_scores, gap = choose(token_logits, parameters, settings)
        ids.append(taken)
        weights.append(taken_weights)
        scores.append(token_scores)
        logits.append(token_logits)
        margin = min(margin, gap)
    for t, hidden in enumerate(masked or []):
        if hidden:
            ids[t] = [NULL] * settings.top_k

    aux = x.new_zeros(())
    for name, coefficient in settings.balancing.items():
        aux = aux + coefficient * LOSSES[name](ids, scores, logits, settings.num_experts)
    counts = [sum(row.count(e) for row in ids) for e in experts]
    ids, dropped = limit(ids, settings)

    outputs = []
    for t, token in enumerate(x):
        y = 0 * token
        for e, weight in zip(ids[t], weights[t], strict=True):
            if e != NULL:
                y = y + weight * expert(token, parameters, e, settings.activation)
        outputs.append(y + shared(token, parameters, settings))
    return Answer(torch.stack(outputs) if outputs else x * 0, aux, ids, dropped, margin, counts)


def sum_of(vector: Tensor) -> Tensor:
    return vector.sum()


# ------------------------------------------------------------------------------------------------------------ routers


def choose(
    logits: list[Tensor], parameters: Mapping[str, Tensor], settings: Settings
) -> tuple[list[int], list[Tensor], list[Tensor], float]:
    """Expert ids, weights, all scores, and the margin of the choice, for one token."""
    options = dict(settings.router_options)
    if settings.router == "softmax_topk":
        exponentials = [torch.exp(z) for z in logits]
        scores = [value / sum(exponentials) for value in exponentials]
        choice, allowed, gap = [s.item() for s in scores], set(range(len(scores))), math.inf
    else:
        scores = [1 / (1 + torch.exp(-z)) for z in logits]
        choice = [s.item() + b.item() for s, b in zip(scores, parameters["router.selection_bias"], strict=True)]
        allowed, gap = allowed_by_groups(choice, options.get("num_groups", 1), options.get("top_groups", 1))

    ranked = sorted(allowed, key=lambda e: -choice[e])
    taken, left = ranked[: settings.top_k], ranked[settings.top_k :]
    # The order among the taken ones decides too: first choices go first where capacity is short.
    borders = [choice[a] - choice[b] for a, b in zip(taken, [*taken[1:], *left[:1]], strict=False)]
    weights = [scores[e] for e in taken]
    if options.get("normalize", True):
        total = sum(weights)
        weights = [w / total for w in weights]
    return taken, [w * options.get("scale", 1.0) for w in weights], scores, min([gap, *borders])


def allowed_by_groups(choice: list[float], num_groups: int, top_groups: int) -> tuple[set[int], float]:
    """The experts of the best groups (a group is worth the sum of its two best scores), and the margin."""
    size = len(choice) // num_groups
    worth = [sum(sorted(choice[g * size : (g + 1) * size])[-2:]) for g in range(num_groups)]
    ranked = sorted(range(num_groups), key=lambda g: -worth[g])
    gap = worth[ranked[top_groups - 1]] - worth[ranked[top_groups]] if top_groups < num_groups else math.inf
    return {e for g in ranked[:top_groups] for e in range(g * size, (g + 1) * size)}, gap


def limit(ids: list[list[int]], settings: Settings) -> tuple[list[list[int]], int]:
    """Drop what is over capacity: all first choices are served before all second ones, earlier tokens before later."""
    if settings.capacity_factor == 0:
        return ids, 0
    capacity = math.ceil(abs(settings.capacity_factor) * len(ids) * settings.top_k / settings.num_experts)
    served = [0] * settings.num_experts
    kept = [list(row) for row in ids]
    dropped = 0
    for k in range(settings.top_k):
        for row in kept:
            if row[k] == NULL:
                continue
            if served[row[k]] == capacity:
                row[k] = NULL
                dropped += 1
            else:
                served[row[k]] += 1
    return kept, dropped


# ------------------------------------------------------------------------------------------------------------ experts


def silu(z: Tensor) -> Tensor:
    return z / (1 + torch.exp(-z))


def gelu(z: Tensor) -> Tensor:
    return z * 0.5 * (1 + torch.erf(z / math.sqrt(2)))


def gelu_tanh(z: Tensor) -> Tensor:
    return 0.5 * z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))


def relu(z: Tensor) -> Tensor:
    return z * (z > 0)


FUNCTIONS = {
    "swiglu": silu,
    "geglu": gelu,
    "geglu_tanh": gelu_tanh,
    "relu": relu,
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
}


def activate(h: Tensor, activation: str) -> Tensor:
    function = FUNCTIONS[activation]
    if activation in ("swiglu", "geglu", "geglu_tanh"):
        width = h.shape[0] // 2
        return function(h[:width]) * h[width:]
    return function(h)


def expert(token: Tensor, parameters: Mapping[str, Tensor], e: int, activation: str) -> Tensor:
    h = parameters["experts.up"][e] @ token
    if "experts.up_bias" in parameters:
        h = h + parameters["experts.up_bias"][e]
    y = parameters["experts.down"][e] @ activate(h, activation)
    return y + parameters["experts.down_bias"][e] if "experts.down_bias" in parameters else y


def shared(token: Tensor, parameters: Mapping[str, Tensor], settings: Settings) -> Tensor:
    """The sum of S separate experts, sliced out of the fused matrices."""
    y = 0 * token
    if not settings.num_shared_experts:
        return y
    up, down = parameters["shared.up.weight"], parameters["shared.down.weight"]
    hidden = down.shape[1]
    width = hidden // settings.num_shared_experts
    for s in range(settings.num_shared_experts):
        rows = list(range(s * width, (s + 1) * width))
        if settings.activation in ("swiglu", "geglu", "geglu_tanh"):
            rows += [hidden + row for row in rows]
        h = up[rows] @ token
        if "shared.up.bias" in parameters:
            h = h + parameters["shared.up.bias"][rows]
        y = y + down[:, s * width : (s + 1) * width] @ activate(h, settings.activation)
    if "shared.down.bias" in parameters:
        y = y + parameters["shared.down.bias"]
    if "shared.gate.weight" in parameters:
        y = y / (1 + torch.exp(-sum_of(parameters["shared.gate.weight"][0] * token)))
    return y


# ---------------------------------------------------------------------------------------------------------- balancing


def load_balancing(ids: list[list[int]], scores: list[list[Tensor]], logits: Any, num_experts: int) -> Tensor | float:
    """E · Σ f_e · P_e over the tokens that are routed at all; P from scores that sum to 1."""
    routed = [t for t, row in enumerate(ids) if any(e != NULL for e in row)]
    slots = sum(e != NULL for row in ids for e in row)
    loss: Tensor | float = 0.0
    for e in range(num_experts):
        f = sum(row.count(e) for row in ids) / max(slots, 1)
        p = sum(scores[t][e] / sum(scores[t]) for t in routed) / max(len(routed), 1)
        loss = loss + num_experts * f * p
    return loss


def z_loss(ids: list[list[int]], scores: Any, logits: list[list[Tensor]], num_experts: int) -> Tensor | float:
    """Mean of log(Σ exp z)² over the tokens that are routed at all."""
    routed = [t for t, row in enumerate(ids) if any(e != NULL for e in row)]
    squares = [torch.log(sum(torch.exp(z) for z in logits[t])) ** 2 for t in routed]
    return sum(squares) / max(len(routed), 1)


LOSSES = {"load_balancing": load_balancing, "z_loss": z_loss, "bias_update": lambda *_: 0.0}


def updated_bias(bias: list[float], counts: list[int], rate: float) -> list[float]:
    """DeepSeek-V3: an underloaded expert's bias goes up by the rate, an overloaded one's goes down."""
    mean = sum(counts) / len(counts)
    return [b + rate * ((c < mean) - (c > mean)) for b, c in zip(bias, counts, strict=True)]


# --------------------------------------------------------------------------------------------------------- comparison


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """‖got − wanted‖ / ‖wanted‖, in float64; the plain norm of the difference where nothing is wanted."""
    got, wanted = got.detach().double(), wanted.detach().double()
    assert got.shape == wanted.shape, f"{list(got.shape)} is not {list(wanted.shape)}"
    size = wanted.norm().item()
    return ((got - wanted).norm() / (size or 1.0)).item()
