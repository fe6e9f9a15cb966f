"""In which order an offline batch is computed: what shares a beginning together, decode-heavy first.

BatchLLM ("Optimizing Large Batched LLM Inference with Global Prefix Sharing and Throughput-oriented Token Batching"):
a tree of all prompts shows what they share before anything runs, and work with many new tokens per token of prompt goes
first, so that later prompts are computed in the same steps as its decoding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt


@dataclass(eq=False)
class _Node:
    """A beginning that some requests share.

    Attributes:
        depth: its tokens. request: one whose prompt ends here.
        prefill, decode: tokens of everything below, what is shared counted once. first: of the requests there.
    """

    depth: int
    request: int | None = None
    children: list[_Node] = field(default_factory=list)
    prefill: int = 0
    decode: int = 0
    first: int = 0

    def rank(self) -> tuple[float, int]:
        return -self.decode / max(1, self.prefill), self.first


def batch_order(
    prompts: Sequence[Sequence[int]], new_tokens: Sequence[int], roots: Sequence[str] | None = None, page_size: int = 16
) -> list[int]:
    """The places of ``prompts`` in the order in which they are best computed.

    Prompts with a common beginning stand together, at every length of it: the tree of prompts is walked depth first,
    and where it branches, the branch with the most new tokens per token of prompt goes first. Takes about as long as
    sorting the prompts.

    Args:
        new_tokens: how many each request is expected to generate, all its continuations together.
        roots: prompts with different ones share nothing (adapters); None: all have the same.
        page_size: only beginnings of whole pages are shared.
    """
    keys = [np.asarray(prompt, dtype=np.int64) for prompt in prompts]
    names = roots or [""] * len(prompts)
    # Big-endian bytes compare as their numbers do.
    places = sorted(range(len(prompts)), key=lambda place: (names[place], keys[place].astype(">u4").tobytes(), place))
    root = _Node(0)
    stack = [root]
    for before, place in zip([None, *places], places, strict=False):
        shared = 0
        if before is not None and names[before] == names[place]:
            shared = _common(keys[before], keys[place]) // page_size * page_size
        _branch(stack, shared)
        leaf = _Node(len(keys[place]), place)
        stack[-1].children.append(leaf)
        stack.append(leaf)
    return _walk(root, new_tokens)


def _branch(stack: list[_Node], depth: int) -> None:
    """Go back up to a node of this depth, making one where there is none."""
    below = None
    while stack[-1].depth > depth:
        below = stack.pop()
    if below is not None and stack[-1].depth < depth:
        node = _Node(depth, children=[below])
        stack[-1].children[-1] = node
        stack.append(node)


def _walk(root: _Node, new_tokens: Sequence[int]) -> list[int]:
    """The requests depth first. Without recursion: a prompt may begin the next one, and so on for thousands."""
    nodes = [(root, 0)]
    for node, _ in nodes:  # grows: parents stand before their children
        nodes += [(child, node.depth) for child in node.children]
    for node, above in reversed(nodes):
        node.prefill = node.depth - above + sum(child.prefill for child in node.children)
        own = [] if node.request is None else [node.request]
        node.decode = sum(child.decode for child in node.children) + sum(new_tokens[request] for request in own)
        node.first = min([*own, *(child.first for child in node.children)], default=0)
        node.children.sort(key=_Node.rank)
    order, left = [], [root]
    while left:
        node = left.pop()
        if node.request is not None:
            order.append(node.request)
        left += reversed(node.children)
    return order


def _common(one: npt.NDArray[np.int64], other: npt.NDArray[np.int64]) -> int:
    """How many tokens two prompts have in common from their start."""
    size = min(len(one), len(other))
    differ = one[:size] != other[:size]
    return int(differ.argmax()) if differ.any() else size
