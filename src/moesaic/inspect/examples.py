"""Where to look: the occurrences that show best what an expert takes, with the text around them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moesaic.inspect.metrics import TopToken
from moesaic.inspect.trace import FloatArray, IntArray, LayerTrace, RoutingTrace

CONTEXT = 60
"""Characters of text on each side of an example."""


def pick_examples(
    trace: RoutingTrace, layer: LayerTrace, tops: Sequence[Sequence[TopToken]], limit: int
) -> list[list[int]]:
    """For each expert at most ``limit`` positions in the trace: of each of its top tokens in turn the occurrence with
    the largest weight in a passage that no earlier example is from, where there is one."""
    passages = trace.passage_ids
    # All slots, grouped by expert.
    order = np.argsort(layer.expert_ids, axis=None, kind="stable")
    edges = np.searchsorted(layer.expert_ids.ravel()[order], np.arange(layer.num_experts + 1))
    chosen: list[list[int]] = []
    for expert, tokens in enumerate(tops):
        slots = order[edges[expert] : edges[expert + 1]]
        rows, weights = slots // layer.top_k, layer.weights.ravel()[slots]
        ids = trace.token_ids[rows]
        found: list[int] = []
        for top in tokens[:limit]:
            of_token = ids == top.token
            found.append(_best(rows[of_token], weights[of_token], passages, found))
        chosen.append(found)
    return chosen


def _best(rows: IntArray, weights: FloatArray, passages: IntArray, found: Sequence[int]) -> int:
    fresh = ~np.isin(passages[rows], passages[list(found)])
    order = np.lexsort((rows, -weights, ~fresh))
    return int(rows[order[0]])


def context(trace: RoutingTrace, position: int) -> tuple[str, str, str]:
    """(text before, text of the token, text after), within the passage, at most ``CONTEXT`` characters each side."""
    start, stop = (int(edge) for edge in trace.spans[position])
    text = trace.passage_of(position).text
    return text[max(0, start - CONTEXT) : start], text[start:stop], text[stop : stop + CONTEXT]
