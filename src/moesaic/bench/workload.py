"""The work that contenders are given: banks of random weights, calls with random inputs, and what is right.

T tokens · D model width · F expert hidden width · G = 2F · E experts · K slots per token.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from moesaic.bench.shapes import Shape, told_tokens
from moesaic.errors import ConfigError, did_you_mean

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
ROUTINGS = ("balanced", "hot")
# Between two uses of a weight at least this much else is read, so that no cache holds it. Tiny banks (tests) are not
# multiplied without end.
_ROTATION_BYTES = 1 << 29
_MOST_BANKS = 8
# Odd on purpose: no expert's size is a multiple of it, so that no two experts are alike.
_BLOCK = 4_999_999
_CHECKED_TOKENS = 16


@dataclass(frozen=True)
class Workload:
    """One row of a table: which layer, how many tokens, in what precision, routed how.

    Args:
        dtype: a name of ``DTYPES``.
        routing: ``"balanced"`` (each token's experts are drawn at random) or ``"hot"`` (every token's first expert is
            the same one, the others are drawn at random).
        backward: the gradients too.
    """

    shape: Shape
    tokens: int
    dtype: str = "bf16"
    routing: str = "balanced"
    backward: bool = False

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise ConfigError(f"tokens is {self.tokens}: it must be at least 1")
        for kind, name, allowed in (("dtype", self.dtype, DTYPES), ("routing", self.routing, ROUTINGS)):
            if name not in allowed:
                raise ConfigError(f"unknown {kind} {name!r}: {did_you_mean(name, allowed)}")

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    def rows(self) -> int:
        """Routed rows of one call."""
        return self.tokens * self.shape.top_k

    def passes(self) -> int:
        """How often each weight is read or written, and each product computed: backward has two products for one."""
        return 3 if self.backward else 1

    def __str__(self) -> str:
        both = ", forward and backward" if self.backward else ""
        return f"{self.shape}, {told_tokens(self.tokens)}, {self.dtype}, {self.routing}{both}"


@dataclass
class Bank:
    """The weights of one layer: ``up`` ``[E, G, D]`` (the gate's outputs first), ``down`` ``[E, D, F]``."""

    up: Tensor
    down: Tensor

    @property
    def nbytes(self) -> int:
        return self.up.nbytes + self.down.nbytes


@dataclass
class Call:
    """The input of one call: ``x`` ``[T, D]``, ``ids`` ``[T, K]`` int64, ``weights`` ``[T, K]``, and which bank."""

    x: Tensor
    ids: Tensor
    weights: Tensor
    bank: int


def make_bank(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Bank:
    """Normal weights, scaled by each matrix's input width.

    One block of random numbers is laid out again and again: drawing 400 million of them would take many seconds. It is
    larger than an expert's neighbourhood and out of step with every matrix, so all experts and rows differ.
    """
    e, d, f = shape.num_experts, shape.d_model, shape.d_ff
    return Bank(
        tiled((e, 2 * f, d), 1 / math.sqrt(d), dtype, generator), tiled((e, d, f), 1 / math.sqrt(f), dtype, generator)
    )


def tiled(size: tuple[int, ...], std: float, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """A tensor of normal numbers that come again after some five million."""
    count = math.prod(size)
    block = (torch.randn(min(count, _BLOCK), generator=generator) * std).to(dtype)
    out = torch.empty(count, dtype=dtype)
    whole = count // len(block) * len(block)
    out[:whole].view(-1, len(block)).copy_(block)
    out[whole:] = block[: count - whole]
    return out.view(size)


def make_banks(shape: Shape, dtype: torch.dtype, seed: int = 0) -> list[Bank]:
    """As many banks as the caches cannot hold (512 MiB together; at most 8), each with its own weights."""
    generator = torch.Generator().manual_seed(seed)
    banks = [make_bank(shape, dtype, generator)]
    wanted = min(_MOST_BANKS, math.ceil(_ROTATION_BYTES / banks[0].nbytes))
    return banks + [make_bank(shape, dtype, generator) for _ in range(wanted - 1)]


def make_calls(work: Workload, num_banks: int, seed: int) -> list[Call]:
    """Fresh random inputs, one call after the other on another bank.

    For one token the experts of a bank's successive calls are dealt from a shuffled deck: none comes again before all
    have had their turn, so that none is still in a cache. The routing weights are those of a softmax over the K.
    """
    generator = torch.Generator().manual_seed(seed)
    shape, count = work.shape, 16 if work.tokens <= 64 else 4
    count = -(-count // num_banks) * num_banks
    decks = [_deck(shape, generator) for _ in range(num_banks)]
    calls = []
    for i in range(count):
        x_TD = torch.randn(work.tokens, shape.d_model, generator=generator).to(work.torch_dtype)
        scores_TK = torch.randn(work.tokens, shape.top_k, generator=generator)
        hot = 1.0 if work.routing == "hot" else 0.0
        dealt = next(decks[i % num_banks])[None] if work.tokens == 1 else None
        ids_TK = route(shape, work.tokens, hot, generator) if dealt is None else dealt
        calls.append(Call(x_TD, ids_TK, scores_TK.softmax(-1).to(work.torch_dtype), i % num_banks))
    return calls


def _deck(shape: Shape, generator: torch.Generator) -> Iterator[Tensor]:
    while True:
        shuffled = torch.randperm(shape.num_experts, generator=generator)
        yield from shuffled[: shape.num_experts // shape.top_k * shape.top_k].view(-1, shape.top_k)


def route(shape: Shape, tokens: int, hot: float, generator: torch.Generator) -> Tensor:
    """``[T, K]`` expert ids at random; the first expert is among those of a share ``hot`` of the tokens for sure."""
    scores_TE = torch.rand(tokens, shape.num_experts, generator=generator)
    scores_TE[: round(hot * tokens), 0] = 2.0
    return scores_TE.topk(shape.top_k, dim=-1).indices


def active_experts(calls: list[Call]) -> float:
    """How many experts have rows, on average over the calls."""
    return float(sum(call.ids.unique().numel() for call in calls) / len(calls))


def relative_error(out_TD: Tensor, call: Call, bank: Bank) -> float:
    """``‖out − ref‖ / ‖ref‖`` over up to 16 tokens of a call, evenly chosen.

    The reference is written here, one expert after the other, in float32 for 16-bit formats and in float64 for float32;
    it shares no code with any contender.
    """
    wide = _wide(out_TD)
    tokens = torch.linspace(0, len(call.x) - 1, min(len(call.x), _CHECKED_TOKENS)).long()
    ref_TD = _reference(call.x[tokens].to(wide), call.ids[tokens], call.weights[tokens].to(wide), bank)
    return distance(out_TD[tokens], ref_TD)


def gradient_error(gradients: list[Tensor], call: Call, bank: Bank) -> float:
    """The worst ``‖grad − ref‖ / ‖ref‖`` of the gradients of features, routing weights, up and down.

    The gradient that comes in is the call's own features.
    """
    wide = _wide(gradients[0])
    x, weights, up, down = (
        tensor.to(wide, copy=True).requires_grad_() for tensor in (call.x, call.weights, bank.up, bank.down)
    )
    _reference(x, call.ids, weights, Bank(up, down)).backward(call.x.to(wide))
    references = [tensor.grad for tensor in (x, weights, up, down)]
    return max(distance(found, ref) for found, ref in zip(gradients, references, strict=True) if ref is not None)


def distance(found: Tensor, reference: Tensor) -> float:
    """``‖found − reference‖ / ‖reference‖``."""
    return float(((found.to(reference.dtype) - reference).norm() / reference.norm()).item())


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float32 else torch.float32


def _reference(x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, bank: Bank) -> Tensor:
    out_TD = torch.zeros_like(x_TD)
    for expert in ids_TK.unique().tolist():
        token, slot = (ids_TK == expert).nonzero(as_tuple=True)
        gate, up = (x_TD[token] @ bank.up[expert].to(x_TD.dtype).T).chunk(2, dim=-1)
        y = (F.silu(gate) * up) @ bank.down[expert].to(x_TD.dtype).T
        out_TD = out_TD.index_add(0, token, y * weights_TK[token, slot, None])
    return out_TD
