"""Where a model spends its experts: how many a token takes, by the kind of token. Plain numpy, as the metrics are.

N tokens · E experts · K slots per token. Counted are the experts that compute; zero-computation experts (zero, copy,
constant), which a token may take in their place, are counted apart. A layer that routes several times in one forward
is a layer for each time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from moesaic.inspect.kinds import KINDS
from moesaic.inspect.metrics import group_means
from moesaic.inspect.trace import FloatArray, IntArray, LayerTrace, RoutingTrace

CHUNK = 8
"""Tokens in a row that BlockFFN's chunk-level sparsity looks at."""


def experts_taken(layer: LayerTrace) -> IntArray:
    """``[N]``: a token's slots with an expert that computes, an id below E."""
    taken: IntArray = (layer.expert_ids < layer.num_experts).sum(axis=1)
    return taken


def free_taken(layer: LayerTrace) -> IntArray:
    """``[N]``: the zero-computation experts that a token takes."""
    beyond = layer.num_experts + len(layer.zero_computation)
    free: IntArray = ((layer.expert_ids >= layer.num_experts) & (layer.expert_ids < beyond)).sum(axis=1)
    return free


def varies(layer: LayerTrace) -> bool:
    """Whether tokens take different numbers of experts, and not because a capacity limit took some away."""
    taken = experts_taken(layer)
    missing = layer.top_k * len(taken) - int(taken.sum())
    return missing > layer.dropped and bool(taken.min() < taken.max())


def token_sparsity(layer: LayerTrace) -> float:
    """1 − (mean number of different experts that a token takes) / E: BlockFFN's token-level sparsity."""
    return 1 - float(_used(layer).mean())


def chunk_sparsity(layer: LayerTrace, edges: Sequence[tuple[int, int]], chunk: int = CHUNK) -> float:
    """The share of experts that none of ``chunk`` tokens in a row takes: BlockFFN's chunk-level sparsity.

    Args:
        edges: (start, stop) of each passage. A passage's last tokens that fill no chunk are left out, as are shorter
            passages; 0 where nothing is left.
    """
    starts = np.asarray([i for start, stop in edges for i in range(start, stop - chunk + 1, chunk)], dtype=np.int64)
    if not len(starts):
        return 0.0
    used_CNE = _used(layer)[starts[:, None] + np.arange(chunk)]
    return 1 - float(used_CNE.any(axis=1).mean())


def _used(layer: LayerTrace) -> npt.NDArray[np.bool_]:
    """``[N, E]``: whether a token takes an expert."""
    used_NE = np.zeros((len(layer.expert_ids), layer.num_experts + 1), dtype=bool)
    np.put_along_axis(used_NE, np.minimum(layer.expert_ids, layer.num_experts), True, axis=1)
    return used_NE[:, :-1]


def spending(taken_N: FloatArray, free_N: FloatArray, kinds_N: IntArray) -> dict[str, Any]:
    """Mean and spread (standard deviation over the tokens) of the experts that a token takes, of all and by kind.

    Args:
        taken_N, free_N: experts, and zero-computation experts, of each token. kinds_N: index into
            :data:`~moesaic.inspect.kinds.KINDS`.

    Returns:
        ``mean``, ``spread``, ``free`` (mean number of zero-computation experts), and ``by_kind``: the same of each kind
        that occurs, with its number of ``tokens``.
    """
    means, free = (group_means(values, kinds_N, len(KINDS)) for values in (taken_N, free_N))
    squares = group_means((taken_N - means[kinds_N]) ** 2, kinds_N, len(KINDS))
    tokens = np.bincount(kinds_N, minlength=len(KINDS))
    return {
        "mean": float(taken_N.mean()),
        "spread": float(taken_N.std()),
        "free": float(free_N.mean()),
        "by_kind": {
            kind: {"tokens": int(tokens[i]), "mean": means[i], "spread": np.sqrt(squares[i]), "free": free[i]}
            for i, kind in enumerate(KINDS)
            if tokens[i]
        },
    }


def of_layer(trace: RoutingTrace, layer: LayerTrace, kinds_N: IntArray) -> dict[str, Any]:
    """:func:`spending` in one layer, whether it ``varies``, and its ``sparsity``: {token, chunk}."""
    edges = [(passage.start, passage.stop) for passage in trace.passages]
    return {
        "varies": varies(layer),
        **spending(experts_taken(layer).astype(np.float64), free_taken(layer).astype(np.float64), kinds_N),
        "sparsity": {"token": token_sparsity(layer), "chunk": chunk_sparsity(layer, edges)},
    }


def of_all(trace: RoutingTrace, kinds_N: IntArray) -> dict[str, Any]:
    """:func:`spending` of the mean over the layers, and whether it ``varies`` in one of them."""
    taken_N, free_N = (
        np.mean([count(layer) for layer in trace.layers], axis=0) for count in (experts_taken, free_taken)
    )
    return {"varies": any(varies(layer) for layer in trace.layers), **spending(taken_N, free_N, kinds_N)}


def common_kinds(spent: dict[str, Any], num_tokens: int) -> dict[str, dict[str, Any]]:
    """Of ``by_kind`` those with at least a hundredth of the tokens, and 16: the mean of fewer says little."""
    return {kind: of for kind, of in spent["by_kind"].items() if of["tokens"] >= max(16, 0.01 * num_tokens)}


def spending_table(report: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """(header, rows) of a report's experts per token: the kinds that most is spent on first, those with only a few
    tokens after them, then all tokens."""
    spent = report["experts_per_token"]
    common = common_kinds(spent, report["data"]["tokens"])
    header = ["kind of token", "tokens", "experts", "±"] + ["computing nothing"] * bool(spent["free"])
    kinds = sorted(spent["by_kind"].items(), key=lambda item: (item[0] not in common, -item[1]["mean"]))
    named = [(KINDS[kind], of) for kind, of in kinds] + [("all", {**spent, "tokens": report["data"]["tokens"]})]
    rows = []
    for name, of in named:
        numbers = [f"{of[key]:.2f}" for key in ("mean", "spread", "free")][: len(header) - 2]
        rows.append([name, str(of["tokens"]), *numbers])
    return header, rows
