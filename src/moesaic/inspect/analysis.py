"""The report as data: a trace to one JSON document. Every number in it is finite."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np

from moesaic.inspect import locality, metrics, spending
from moesaic.inspect.examples import context, pick_examples
from moesaic.inspect.kinds import token_kinds
from moesaic.inspect.trace import FloatArray, LayerTrace, RoutingTrace

FORMAT = 1
DECIMALS = 5
TOP_TOKENS = 10
EXAMPLES = 6


def analyze(trace: RoutingTrace) -> dict[str, Any]:
    """All metrics of a trace (see :mod:`moesaic.inspect.metrics` for their formulas), ready for ``json.dumps``.

    Keys:
        format: 1.
        model: name, architecture, num_layers, total_parameters, active_parameters.
        data: tokens, and domains: a list of {name, tokens, passages}.
        experts_per_token: where the model spends: varies (whether tokens take different numbers of experts), mean,
            spread and free of the experts of a token and layer, and by_kind: {kind of token
            (:data:`moesaic.inspect.kinds.KINDS`): tokens, mean, spread, free} (:mod:`moesaic.inspect.spending`).
        locality: whether tokens in a row take the same experts, of all layers' experts as one group: segments: {m:
            {performance (SRP), size}} for segments of m tokens, and caches: {multiple of a token's experts: hit rate
            (SCH)} (:mod:`moesaic.inspect.locality`).
        layers: a list, see :func:`_layer`.
        transitions: a list, one between each MoE layer and the next one, of {from, to (decoder layer numbers),
            information, affinity: {share, chance} (:func:`moesaic.inspect.metrics.affinity`), counts [E][E'] (token
            slots), probabilities [E][E']}.
    """
    kinds_N = token_kinds(trace)
    edges = [(passage.start, passage.stop) for passage in trace.passages]
    local = [locality.LayerLocality.of(layer, edges) for layer in trace.layers]
    return {
        "format": FORMAT,
        "model": asdict(trace.model),
        "data": {"tokens": trace.num_tokens, "domains": _domains(trace)},
        "experts_per_token": nested(spending.of_all(trace, kinds_N)),
        "locality": nested(locality.whole(local)),
        "layers": [
            {
                **_layer(trace, layer),
                "experts_per_token": nested(spending.of_layer(trace, layer, kinds_N)),
                "locality": nested(own.report()),
                "similarity": {name: _similarity(cosines) for name, cosines in layer.similarity.items()},
            }
            for layer, own in zip(trace.layers, local, strict=True)
        ],
        "transitions": [
            _transition(layer, following) for layer, following in zip(trace.layers, trace.layers[1:], strict=False)
        ],
    }


def _domains(trace: RoutingTrace) -> list[dict[str, Any]]:
    members = {name: [passage for passage in trace.passages if passage.domain == name] for name in trace.domains}
    return [
        {"name": name, "tokens": sum(p.stop - p.start for p in passages), "passages": len(passages)}
        for name, passages in members.items()
    ]


def _layer(trace: RoutingTrace, layer: LayerTrace) -> dict[str, Any]:
    """Of one MoE layer with E experts and K slots per token; lists ``[E]`` are indexed by expert.

    Keys:
        number (of the decoder layer, from 0), label (the same as text; "3.2" for the second routing of layer 3, where
            a layer routes several times), name, experts (E), top_k (K), zero_computation (the kinds of experts that
            compute nothing, which count as no expert here).
        load: [E], share of the layer's slots; load_by_domain: {domain: [E]}, of that domain's slots.
        token_share: [E], share of tokens that the expert takes part in; token_share_by_domain: {domain: [E]}.
        imbalance, variation: of the load. idle_experts: ids of experts without a slot.
        empty_slots: slots without an expert that computes; dropped_slots: those of them that a capacity limit took
            away. experts_per_token: as of the whole, and sparsity: {token, chunk}
            (:func:`moesaic.inspect.spending.token_sparsity`, :func:`moesaic.inspect.spending.chunk_sparsity`).
        entropy, entropy_by_domain, entropy_source ("scores" or "weights").
        domain_information; specialization [E]; domain_mix {domain: [E]}.
        token_consistency: {share, chance, tokens}.
        top_tokens: [E] lists of {token (id), text, count, lift}.
        locality: as of the whole, and experts: [E], the performance of each alone with segments of 16 tokens.
        similarity: {outputs, weights}, where known (:mod:`moesaic.inspect.likeness`): the mean cosine of two experts,
            and nearest: [E] of {expert, cosine}, the other one that is most alike.
        examples: [E] lists of {position (in the trace), domain, document, weight, before, text, after}.
    """
    domains = trace.domains
    domain_ids = trace.domain_ids
    counts_DE = metrics.slot_counts(layer.expert_ids, domain_ids, layer.num_experts, len(domains))
    tokens_D = np.bincount(domain_ids, minlength=len(domains))
    load_E, load_DE = metrics.load(counts_DE.sum(axis=0)), metrics.load(counts_DE)
    mix_DE = metrics.domain_mix(load_DE)
    tops = metrics.top_tokens(trace.token_ids, layer.expert_ids, layer.num_experts, TOP_TOKENS)
    examples = pick_examples(trace, layer, tops, EXAMPLES)
    return {
        "number": layer.number,
        "label": layer.label,
        "name": layer.name,
        "experts": layer.num_experts,
        "top_k": layer.top_k,
        "zero_computation": layer.zero_computation,
        "load": rounded(load_E),
        "load_by_domain": {name: rounded(load_DE[d]) for d, name in enumerate(domains)},
        "token_share": rounded(counts_DE.sum(axis=0) / trace.num_tokens),
        "token_share_by_domain": {name: rounded(counts_DE[d] / tokens_D[d]) for d, name in enumerate(domains)},
        "imbalance": rounded(metrics.imbalance(load_E)),
        "variation": rounded(metrics.variation(load_E)),
        "idle_experts": metrics.idle_experts(load_E),
        "empty_slots": int((layer.expert_ids >= layer.num_experts).sum()),
        "dropped_slots": layer.dropped,
        "entropy": rounded(layer.entropy.mean()),
        "entropy_by_domain": dict(
            zip(domains, rounded(metrics.group_means(layer.entropy, domain_ids, len(domains))), strict=True)
        ),
        "entropy_source": layer.entropy_source,
        "domain_information": rounded(metrics.domain_information(load_DE)),
        "specialization": rounded(metrics.specialization(load_DE)),
        "domain_mix": {name: rounded(mix_DE[d]) for d, name in enumerate(domains)},
        "token_consistency": asdict(metrics.token_consistency(trace.token_ids, layer.top_expert, layer.num_experts)),
        "top_tokens": [
            [{"text": trace.vocabulary[top.token], **asdict(top), "lift": rounded(top.lift)} for top in of_expert]
            for of_expert in tops
        ],
        "examples": [
            [_example(trace, layer, expert, position) for position in of_expert]
            for expert, of_expert in enumerate(examples)
        ],
    }


def _example(trace: RoutingTrace, layer: LayerTrace, expert: int, position: int) -> dict[str, Any]:
    passage = trace.passage_of(position)
    before, text, after = context(trace, position)
    slot = int((layer.expert_ids[position] == expert).argmax())
    return {
        "position": position,
        "domain": passage.domain,
        "document": passage.document,
        "weight": rounded(layer.weights[position, slot]),
        "before": before,
        "text": text,
        "after": after,
    }


def _similarity(cosines: FloatArray) -> dict[str, Any]:
    others = np.where(np.eye(len(cosines), dtype=bool), -np.inf, cosines)
    nearest = others.argmax(axis=1) if len(cosines) > 1 else []
    return {
        "mean": rounded(metrics.off_diagonal_mean(cosines)),
        "nearest": [{"expert": int(e), "cosine": rounded(cosines[i, e])} for i, e in enumerate(nearest)],
    }


def _transition(layer: LayerTrace, following: LayerTrace) -> dict[str, Any]:
    counts = metrics.transition_counts(layer.expert_ids, following.expert_ids, layer.num_experts, following.num_experts)
    return {
        "from": layer.number,
        "to": following.number,
        "information": rounded(metrics.transition_information(counts)),
        "affinity": nested(asdict(metrics.affinity(counts, following.top_k))),
        "counts": counts.tolist(),
        "probabilities": rounded(metrics.transition_probabilities(counts)),
    }


def rounded(values: FloatArray | float) -> Any:
    """The same number, or nested lists of them, with so many decimals that the file stays small."""
    return np.round(np.asarray(values, dtype=np.float64), DECIMALS).tolist()


def nested(numbers: dict[str, Any]) -> dict[str, Any]:
    """The same with every number in it rounded; flags and whole numbers as they are."""
    return {
        key: nested(value) if isinstance(value, dict) else value if isinstance(value, bool | int) else rounded(value)
        for key, value in numbers.items()
    }
