"""Run text through a model and write down what its routers do: model + documents to a :class:`RoutingTrace`."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moesaic.data import Document, check_fits
from moesaic.errors import UnsupportedError, UsageError
from moesaic.experts.kinds import columns_of
from moesaic.experts.unequal import banks_of
from moesaic.hf import is_experts_module
from moesaic.inspect.likeness import Likeness
from moesaic.inspect.passages import cut_passages, vocabulary_of
from moesaic.inspect.trace import LayerTrace, ModelFacts, Passage, RoutingTrace
from moesaic.layer import MoE
from moesaic.routing import Routing

DEFAULT_TOKENS = 16384
DEFAULT_SEQUENCE_LENGTH = 256
_BATCH_TOKENS = 2048
_LOGITS_AGREE = 0.02
"""Largest mean difference between the weights that a layer used and those that its logits give (bfloat16 rounding)."""


def collect(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[Document],
    *,
    name: str,
    max_tokens: int = DEFAULT_TOKENS,
    sequence_length: int = DEFAULT_SEQUENCE_LENGTH,
    progress: Callable[[int, int], None] | None = None,
) -> RoutingTrace:
    """Trace about ``max_tokens`` tokens of ``documents``, every domain alike, through every MoE layer of ``model``.

    A passage of at most ``sequence_length`` tokens sees nothing but itself; there is no padding and no gradient. The
    model is ours, or any of transformers whose experts take part in its experts interface.

    Args:
        name: what to call the model. progress: called with the tokens done and their number.

    Raises:
        UsageError: where the model has no MoE layer that can be watched; its subclass ConfigError for a number out
            of range, DataError for documents without text or a tokenizer that does not fit the model.
        UnsupportedError: where a layer does not route exactly the tokens of the text.
    """
    embedding = model.get_input_embeddings().get_parameter("weight")
    check_fits(tokenizer, embedding.shape[0])
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None) or sequence_length
    watched = _watched_modules(model)
    tokens = cut_passages(
        tokenizer, documents, max_tokens=max_tokens, sequence_length=min(sequence_length, int(longest))
    )
    ids = torch.from_numpy(tokens.token_ids).to(embedding.device)
    with _watching(watched) as records, _in_eval(model), torch.no_grad():
        for batch in _batches(tokens.passages):
            stop = batch[-1].stop
            logits = _router_logits(model, ids[batch[0].start : stop].view(len(batch), -1))
            for i, record in enumerate(records):
                record.finish(stop, logits[i] if len(logits) == len(records) else None)
            if progress:
                progress(stop, len(ids))
    return RoutingTrace(
        model=_facts(model, name, records),
        passages=tokens.passages,
        token_ids=tokens.token_ids,
        spans=tokens.spans,
        vocabulary=vocabulary_of(tokenizer, tokens),
        layers=[record.layer_trace(number) for number, record in enumerate(records)],
    )


def _batches(passages: Sequence[Passage]) -> Iterator[list[Passage]]:
    """Neighbours of one length, so that none has to be padded; their tokens follow each other in the trace."""
    batch: list[Passage] = []
    for passage in passages:
        length = passage.stop - passage.start
        if batch and (batch[0].stop - batch[0].start != length or (len(batch) + 1) * length > _BATCH_TOKENS):
            yield batch
            batch = []
        batch.append(passage)
    if batch:
        yield batch


@dataclass
class _Record:
    """What was seen of one layer so far, a piece for each forward; on the CPU.

    A layer that routes several times in one forward has a record for each time, ``routing`` from 1 on.
    """

    name: str
    module: nn.Module
    num_experts: int
    routing: int = 0
    expert_ids: list[Tensor] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)
    entropies: list[Tensor] = field(default_factory=list)
    sources: set[str] = field(default_factory=set)
    dropped: int = 0
    likeness: Likeness | None = None

    def add(self, expert_ids_TK: Tensor, weights_TK: Tensor) -> None:
        if expert_ids_TK.ndim != 2 or expert_ids_TK.is_floating_point():
            raise UnsupportedError(f"{self.name} ({type(self.module).__name__}) is not told which experts tokens take")
        null = self.num_experts + len(self.zero_computation)
        self.expert_ids.append(expert_ids_TK.detach().cpu().long().clamp(max=null))
        self.weights.append(weights_TK.detach().cpu().double())

    def add_routing(self, routing: Routing) -> None:
        """A forward of our own layer, which tells everything."""
        self.add(routing.expert_ids, routing.weights)
        self.entropies.append(score_entropy(routing.scores.detach().cpu().double()))
        self.sources.add("scores")
        if routing.dropped is not None:
            self.dropped += int(routing.dropped)

    @property
    def zero_computation(self) -> list[str]:
        """The kind of each expert that follows the ``num_experts`` that compute."""
        if not isinstance(self.module, MoE):
            return []
        return columns_of(self.module.config.zero_computation_experts)

    def finish(self, num_tokens: int, logits_TE: Tensor | None) -> None:
        """After a forward: check that all ``num_tokens`` so far were routed once, and complete their entropy."""
        rows = sum(len(piece) for piece in self.expert_ids)
        if rows != num_tokens:
            raise UnsupportedError(
                f"{self.name} ({type(self.module).__name__}) routed {rows} rows where there were {num_tokens} tokens: "
                "which row is which token is not known"
            )
        if len(self.entropies) < len(self.expert_ids):
            source, entropy = entropy_from_logits(logits_TE, self.expert_ids[-1], self.weights[-1])
            self.sources.add(source)
            self.entropies.append(entropy)

    def layer_trace(self, position: int) -> LayerTrace:
        if len(self.sources) > 1:
            # Two kinds of entropy cannot be averaged: what every forward has is the weights.
            self.sources = {"weights"}
            self.entropies = [weight_entropy(weights) for weights in self.weights]
        number = re.search(r"\.(\d+)(\.|$)", self.name)
        null = self.num_experts + len(self.zero_computation)
        return LayerTrace(
            name=self.name,
            number=int(number[1]) if number else position,
            num_experts=self.num_experts,
            expert_ids=_joined(self.expert_ids, null).numpy(),
            weights=_joined(self.weights, 0).numpy(),
            entropy=torch.cat(self.entropies).numpy(),
            entropy_source=next(iter(self.sources)),
            dropped=self.dropped,
            zero_computation=self.zero_computation,
            routing=self.routing,
            similarity=self.likeness.found if self.likeness else {},
        )


def _watched_modules(model: nn.Module) -> list[_Record]:
    records = []
    for name, module in model.named_modules():
        if isinstance(module, MoE):
            times = module.config.iterations
            turns = range(1, times + 1) if times > 1 else [0]
            banks = [bank for bank, _ in banks_of(module.experts, module.config.num_experts)]
            likeness = Likeness(banks)  # one for all turns, whose experts are the same
            records += [_Record(name, module, module.config.num_experts, turn, likeness=likeness) for turn in turns]
        elif is_experts_module(module):
            records.append(_Record(name, module, _num_experts(module), likeness=Likeness([module])))
    if not records:
        raise UsageError(
            f"{type(model).__name__} has no MoE layer that can be watched: it must have moesaic's MoE layers or "
            "experts of transformers' experts interface (a dense model has no routing to inspect)"
        )
    return records


def _joined(pieces: list[Tensor], nothing: float) -> Tensor:
    """All forwards' rows; where some gave fewer slots a token, ``nothing`` stands in those that they lack."""
    width = max(piece.shape[1] for piece in pieces)
    return torch.cat([nn.functional.pad(piece, (0, width - piece.shape[1]), value=nothing) for piece in pieces])


def _num_experts(module: nn.Module) -> int:
    """The experts whose weights are here: the first dimension of each of the module's own parameters, or codes.

    A norm inside it (``post_expert_norm``) has parameters of another shape.
    """
    own = chain(module.parameters(recurse=False), module.buffers(recurse=False))
    return int(next(own).shape[0])


@contextmanager
def _watching(records: list[_Record]) -> Iterator[list[_Record]]:
    """Hooks on the layers of ``records`` as long as the block runs."""
    with ExitStack() as hooks:
        for record in records:
            if isinstance(record.module, MoE):
                handle = record.module.register_forward_hook(_after_moe(record))
            else:
                handle = record.module.register_forward_pre_hook(_before_experts(record), with_kwargs=True)
            hooks.callback(handle.remove)
            if record.likeness is not None and record.routing <= 1:
                hooks.callback(record.likeness.watch().remove)
        yield records


def _after_moe(record: _Record) -> Callable[..., None]:
    def hook(layer: MoE, args: Any, output: Any) -> None:
        record.add_routing(layer.last_routings[max(0, record.routing - 1)])

    return hook


def _before_experts(record: _Record) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = dict(zip(("hidden_states", "top_k_index", "top_k_weights"), args, strict=False)) | kwargs
        record.add(given["top_k_index"], given["top_k_weights"])

    return hook


@contextmanager
def _in_eval(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _router_logits(model: PreTrainedModel, ids: Tensor) -> list[Tensor]:
    """One forward (without the head, where there is a body of its own); ``[T, E]`` of the layers that record it."""
    body = model.base_model
    known = any("router_logits" in (getattr(part, "_can_record_outputs", None) or {}) for part in (model, body))
    outputs = body(input_ids=ids, use_cache=False, **({"output_router_logits": True} if known else {}))
    found = getattr(outputs, "router_logits", None) if known else None
    return [logits.detach().cpu().double().flatten(0, -2) for logits in found or () if isinstance(logits, Tensor)]


def score_entropy(scores_TE: Tensor) -> Tensor:
    """``[T]``: −Σ p log p / log E with p the scores of a token divided by their sum; 0 where there is one expert."""
    p_TE = scores_TE / scores_TE.sum(dim=-1, keepdim=True).clamp(min=1e-300)
    entropy_T: Tensor = -torch.xlogy(p_TE, p_TE).sum(dim=-1)
    return (entropy_T / math.log(max(2, scores_TE.shape[-1]))).clamp(0, 1)


def weight_entropy(weights_TK: Tensor) -> Tensor:
    """The same of the K chosen weights, normalized by log K: all that is known of a router that keeps its scores."""
    return score_entropy(weights_TK.clamp(min=0))


def entropy_from_logits(logits_TE: Tensor | None, expert_ids_TK: Tensor, weights_TK: Tensor) -> tuple[str, Tensor]:
    """(source, ``[T]`` entropy): of all experts' scores where the logits explain the weights that the layer used.

    Models differ in what they record as router logits, and in the function on top of it. So both candidates are
    tried: the scores of the chosen experts, divided by their sum, must be the chosen weights divided by theirs.
    """
    if logits_TE is not None and len(logits_TE) == len(expert_ids_TK):
        chosen_TK = expert_ids_TK.clamp(max=logits_TE.shape[-1] - 1)
        real_TK = expert_ids_TK < logits_TE.shape[-1]
        used_TK = shares(weights_TK * real_TK)
        candidates = [logits_TE.softmax(dim=-1), logits_TE.sigmoid()]
        errors = [float((shares(s.gather(1, chosen_TK) * real_TK) - used_TK).abs().mean()) for s in candidates]
        if min(errors) < _LOGITS_AGREE:
            return "scores", score_entropy(candidates[errors.index(min(errors))])
    return "weights", weight_entropy(weights_TK)


def shares(values_TK: Tensor) -> Tensor:
    """Each row divided by its sum; zeros stay zeros."""
    return values_TK / values_TK.sum(dim=-1, keepdim=True).clamp(min=1e-300)


def _facts(model: PreTrainedModel, name: str, records: list[_Record]) -> ModelFacts:
    total = sum(parameter.numel() for parameter in model.parameters())
    idle = 0.0
    for module in {record.module: None for record in records}:
        used_E = _used_share([record for record in records if record.module is module])
        everyone = range(len(used_E))
        banks = banks_of(module.experts, len(used_E)) if isinstance(module, MoE) else [(module, everyone)]
        for bank, own in banks:
            size = sum(parameter.numel() for parameter in bank.parameters()) / len(own)
            idle += size * float((1 - used_E[own.start : own.stop]).sum())
    layers = getattr(model.config.get_text_config(), "num_hidden_layers", None) or len(records)
    return ModelFacts(name, type(model).__name__, int(layers), total, round(total - idle))


def _used_share(records: list[_Record]) -> Tensor:
    """``[E]``: the share of the tokens that take an expert of one layer, in any of its routings."""
    num_experts = records[0].num_experts
    used_NE = torch.zeros(sum(map(len, records[0].expert_ids)), num_experts + 1, dtype=torch.bool)
    for record in records:
        ids_NK = _joined(record.expert_ids, num_experts).long().clamp(max=num_experts)
        used_NE.scatter_(1, ids_NK, True)
    return used_NE[:, :num_experts].double().mean(dim=0)
