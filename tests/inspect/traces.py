"""Made-up routing traces of any shape, for the tests of what is computed from them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moesaic.inspect import LayerTrace, ModelFacts, Passage, RoutingTrace

PIECES = (
    "the",
    " self",
    "\n",
    "    ",
    " <script>alert(1)</script>",
    "</script>",
    " &amp;",
    "é",
    " =",
    "<!--",
    " x",
    '"',
    "'",
    "",
)


def made_up_trace(
    layers: Sequence[tuple[int, int]] = ((6, 2), (6, 2), (4, 1)),
    domains: Sequence[str] = ("code", "prose"),
    *,
    tokens_per_passage: int = 40,
    passages_per_domain: int = 4,
    null_share: float = 0.0,
    adaptive: bool = False,
    zero_computation: Sequence[str] = (),
    numbers: Sequence[int] | None = None,
    seed: int = 0,
) -> RoutingTrace:
    """Tokens at random over ``PIECES``; layers of (experts, slots a token) whose choice hangs on token and domain.

    ``null_share`` of the slots have no expert: dropped, or by the router's own choice if it is ``adaptive``. Beside the
    experts of a layer stand those of ``zero_computation``. ``numbers`` are the decoder layers of the MoE layers; where
    one comes several times, the layer routes several times.
    """
    random = np.random.default_rng(seed)
    passages, ids = [], []
    for domain in sorted(domains):
        for n in range(passages_per_domain):
            own = random.integers(0, len(PIECES), tokens_per_passage)
            start = len(passages) * tokens_per_passage
            text = "".join(PIECES[i] for i in own)
            passages.append(Passage(domain, f"{domain}/<b>{n}</b>.txt", text, start, start + tokens_per_passage))
            ids.append(own)
    lengths = np.array([[len(PIECES[i]) for i in own] for own in ids])
    ends = lengths.cumsum(axis=1)
    token_ids = np.concatenate(ids).astype(np.int64)
    which = np.repeat([sorted(domains).index(p.domain) for p in passages], tokens_per_passage)
    traced: list[LayerTrace] = []
    numbers = numbers or range(len(layers))
    for number, (num_ffn, top_k) in zip(numbers, layers, strict=True):
        num_experts = num_ffn + len(zero_computation)
        logits = random.normal(size=(len(token_ids), num_experts))
        logits += 1.5 * random.normal(size=(len(PIECES), num_experts))[token_ids]
        logits += random.normal(size=(len(domains), num_experts))[which]
        scores = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        chosen = np.argpartition(-scores, top_k - 1, axis=1)[:, :top_k]
        weights = np.take_along_axis(scores, chosen, axis=1)
        null = random.random(chosen.shape) < null_share
        entropy = -(scores * np.log(scores)).sum(axis=1) / np.log(max(2, num_experts))
        traced.append(
            LayerTrace(
                name=f"model.layers.{number}.mlp",
                number=number,
                num_experts=num_ffn,
                expert_ids=np.where(null, num_experts, chosen).astype(np.int64),
                weights=np.where(null, 0.0, weights),
                entropy=entropy,
                entropy_source="scores",
                dropped=0 if adaptive else int(null.sum()),
                zero_computation=list(zero_computation),
                routing=0 if list(numbers).count(number) == 1 else 1 + [layer.number for layer in traced].count(number),
            )
        )
    return RoutingTrace(
        model=ModelFacts("tiny <&> model", "MadeUpForCausalLM", max(layer.number for layer in traced) + 1, 1000, 600),
        passages=passages,
        token_ids=token_ids,
        spans=np.stack([ends - lengths, ends], axis=2).reshape(-1, 2).astype(np.int64),
        vocabulary={i: piece or "<empty>" for i, piece in enumerate(PIECES)},
        layers=traced,
    )
