"""A dense model's feed-forwards, cut into experts: the same function with all of them on, and a router to choose some.

T tokens · D model width · F hidden neurons · E experts · K slots per token.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moesaic.convert.activations import CalibrationText, FeedForward, feed_forwards, read_text, token_embeddings
from moesaic.convert.criteria import CRITERIA, always_active, experts_of_domains, observe
from moesaic.convert.cutting import Plan, outputs_of
from moesaic.convert.dense import DenseModel, check_dense
from moesaic.convert.routers import GateFit, align, contributions, explained
from moesaic.convert.source import open_source, passage_length
from moesaic.convert.writing import Written, check_output, load_kept, partial_folder, save_atomically, write_model
from moesaic.errors import ConfigError, DataError, did_you_mean
from moesaic.hf.configuration import MoesaicConfig
from moesaic.hf.save import check_new
from moesaic.routing.options import is_of

TOKENS_PER_EXPERT = 32
"""Least tokens of calibration text for one expert."""
PRE_GATINGS = ("none", "stack")
Say = Callable[[str], None]


@dataclass(frozen=True)
class SplitSettings:
    """How to split.

    Args:
        experts: number E of routed experts in every layer, all of one size.
        shared: hidden neurons of the shared expert, which every token uses; 0 for none.
        active: share of the feed-forward's parameters that a token uses, the shared expert's counted; it must be a
            whole number of experts.
        criterion: a name of ``moesaic.convert.criteria.CRITERIA``: routed, coactivation, weight or domain.
        pre_gating: ``"none"`` for a router in each layer, ``"stack"`` for one that decides for all of them, from the
            token's embedding (Read-ME).
        straight_through: of the router ``unit_topk``.
        data: calibration text, as :func:`moesaic.data.load_corpus` takes it.
        tokens: about how many tokens of it.
        sequence_length: of its passages, in tokens; None for 512, or as many as the model has positions.
        held_out: share of its files that is left out; 0 for none.
        seed: of the clustering.
    """

    experts: int = 16
    shared: int = 0
    active: float = 0.5
    criterion: str = "routed"
    pre_gating: str = "none"
    straight_through: bool = False
    data: tuple[str, ...] = ("stdlib",)
    tokens: int = 16384
    sequence_length: int | None = None
    held_out: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in {"experts": 1, "shared": 0, "tokens": 1, "sequence_length": 2, "seed": 0}.items():
            value = getattr(self, name)
            if name == "sequence_length" and value is None:
                continue
            if not is_of(int, value) or value < least:
                raise ConfigError(f"{name} is {value!r}: it must be a whole number from {least} on")
        if not is_of(float, self.active) or not 0 < self.active <= 1:
            raise ConfigError(f"active is {self.active!r}: it must be above 0 and at most 1")
        if not is_of(float, self.held_out) or not 0 <= self.held_out < 1:
            raise ConfigError(f"held_out is {self.held_out!r}: it must be at least 0 and below 1")
        if self.pre_gating not in PRE_GATINGS:
            raise ConfigError(f"unknown pre_gating {self.pre_gating!r}: {did_you_mean(self.pre_gating, PRE_GATINGS)}")
        CRITERIA.get(self.criterion)


@dataclass(frozen=True)
class Split:
    """What was made. ``active`` is the share of the feed-forward's parameters that a token uses; ``explained`` and
    ``explained_best`` say for each layer which share of the square of the dense feed-forward's output is there, on the
    calibration text, with the experts of the router and with those that contribute most (``explained`` is empty with
    pre_gating stack, whose router is made last)."""

    written: Written
    plan: Plan
    active: float
    layers: int
    tokens: int
    explained: tuple[float, ...]
    explained_best: tuple[float, ...]


def split(
    model: str | Path,
    out: str | Path,
    settings: SplitSettings | None = None,
    *,
    say: Say | None = None,
    shard_bytes: int = 2 << 30,
) -> Split:
    """Cut the dense model at ``model`` into a mixture of experts, the new folder ``out``.

    Layer by layer the hidden neurons that are active for the same tokens of the calibration text become experts of one
    size, and a linear router is fitted to which experts contribute most (Read-ME: Refactorizing LLMs as
    Router-Decoupled Mixture of Experts with System Co-Design; MoEfication: Transformer Feed-forward Layers are Mixtures
    of Experts). Every neuron is in exactly one expert and the router is ``unit_topk``, whose weights begin at 1: with
    ``active=1`` it is the dense model's function. With fewer, quality comes back by :func:`moesaic.convert.distill`.

    One decoder layer's weights are in memory at a time. The calibration has beside them, in bytes, at most
    ``(3 b + 12) T D + 40 T E + F (10 min(T, 8192) + 24 min(T, 4096)) + 24 D D + 4 F D``, with weights of b bytes:
    hidden states, routers in float64, which neurons are active in a sample of the tokens, and the neurons of the tokens
    computed at once; ``16 F D`` more for the criterion weight, and for passages longer than 4,096 tokens their length
    in the place of 4,096.

    An interrupted split goes on where it stopped when it is started again with the same model, text and settings.

    Args:
        model: a folder or a ``.gguf`` file, see :func:`moesaic.convert.open_source`.
        say: called with a line of text now and then.
        shard_bytes: most bytes of one file of weights, and of memory for it.

    Raises:
        ConfigError: for settings that the model's sizes or the text do not allow.
        DataError: for text that cannot be read or is too short.
        CheckpointError: for a model that cannot be read, or an ``out`` that exists.
        UnsupportedError: for a model that is not a dense one of the supported architectures.
        UsageError: where ``out`` cannot be written.
    """
    settings = settings or SplitSettings()
    dense, plan, text, note = check_split(model, out, settings, say)
    with partial_folder(Path(out), note) as partial:
        work = partial / "work"
        work.mkdir(exist_ok=True)
        _calibrate(dense, plan, text, settings, work, say)
        achieved, best = (_figures(work, dense.num_layers, name) for name in ("explained", "best"))
        cuts = [_layer_file(work, layer) for layer in range(dense.num_layers)]
        gates = cuts if settings.pre_gating == "none" else [_gate_file(work)]
        written = write_model(
            list(outputs_of(dense, plan, cuts, gates, straight_through=settings.straight_through)),
            Path(out),
            config=_config(dense, plan, settings),
            tokenizer_from=dense.source.tokenizer_from,
            settings=note,
            shard_bytes=shard_bytes,
            say=say,
        )
    share = (plan.shared + plan.top_k * plan.d_ff) / dense.d_ff
    return Split(written, plan, share, dense.num_layers, len(text), achieved, best)


def check_split(
    model: str | Path, out: str | Path, settings: SplitSettings, say: Say | None = None
) -> tuple[DenseModel, Plan, CalibrationText, dict[str, Any]]:
    """Refuse, before any work, what :func:`split` would refuse; gives what it goes on with, and the note of the
    conversion. Raises as that does."""
    dense = check_dense(open_source(model))
    plan = plan_split(dense.d_ff, settings)
    check_new(out)
    if say is not None:
        say("reading the calibration text")
    text, note = read_calibration(dense, settings)
    _check_text(text, settings)
    check_output(Path(out), note)
    return dense, plan, text, note


def read_calibration(dense: DenseModel, settings: SplitSettings) -> tuple[CalibrationText, dict[str, Any]]:
    """The text, and the note by which a split of this model, text and settings is told from others.

    Raises:
        ConfigError: where passages are longer than what the model reads at once.
        DataError, CheckpointError: as :func:`moesaic.convert.activations.read_text` does.
    """
    length = passage_length(settings.sequence_length, dense.source)
    text = read_text(
        dense.source, settings.data, tokens=settings.tokens, sequence_length=length, held_out=settings.held_out
    )
    told = asdict(replace(settings, sequence_length=length))
    note = {"method": "split", "model": dense.source.fingerprint(), **told, "data": list(settings.data)}
    return text, {**note, "content": dense.source.content(), "text": text.digest()}


def _check_text(text: CalibrationText, settings: SplitSettings) -> None:
    experts, enough = settings.experts, f"({TOKENS_PER_EXPERT} an expert): give more text (data, tokens)"
    if len(text) < (least := TOKENS_PER_EXPERT * experts):
        raise DataError(
            f"the calibration text is too short for {experts} experts: it has {len(text)} tokens, at least "
            f"{least} are needed {enough} or fewer experts"
        )
    if settings.criterion != "domain":
        return
    names = text.names
    if not 2 <= len(names) <= experts:
        raise ConfigError(
            f"the criterion domain needs text of at least 2 domains and an expert for each: there are "
            f"{len(names)} ({', '.join(names)}) and {experts} experts; give data as DOMAIN=PATH, or another criterion"
        )
    tokens: Counter[str] = Counter()
    for passage, name in zip(text.passages, text.domains, strict=True):
        tokens[name] += len(passage)
    for name, own in zip(names, experts_of_domains(experts, len(names)), strict=True):
        if tokens[name] < (least := TOKENS_PER_EXPERT * own):
            raise DataError(
                f"the calibration text of the domain {name} is too short for its {own} experts: it has {tokens[name]} "
                f"tokens, at least {least} are needed {enough}, fewer experts, or another criterion"
            )


def plan_split(d_ff: int, settings: SplitSettings) -> Plan:
    """The sizes for a feed-forward of ``d_ff`` hidden neurons.

    Raises:
        ConfigError: where an expert would be empty, experts would differ in size, or ``active`` is no whole number of
            experts; the message says what is near.
    """
    experts, shared = settings.experts, settings.shared
    routed = d_ff - shared
    if routed < experts:
        raise ConfigError(
            f"experts is {experts} and shared is {shared}: of {d_ff} hidden neurons this leaves an expert empty; "
            f"allowed: experts + shared up to {d_ff}"
        )
    if routed % experts:
        near = [
            d_ff - experts * width for width in (routed // experts + 1, routed // experts) if experts * width <= d_ff
        ]
        raise ConfigError(
            f"{routed} hidden neurons ({d_ff} less {shared} shared) cannot be cut into {experts} experts of one size: "
            f"shared may be {' or '.join(map(str, near))}"
        )
    width = routed // experts
    top_k = round((settings.active * d_ff - shared) / width)
    if not 1 <= top_k <= experts or abs(shared + top_k * width - settings.active * d_ff) > 0.005 * d_ff:
        down = min(max(int((settings.active * d_ff - shared) // width), 1), experts)
        near_shares = [
            f"{(shared + k * width) / d_ff:.4g} ({k} of {experts})" for k in (down, down + 1) if 1 <= k <= experts
        ]
        raise ConfigError(
            f"active is {settings.active}: with {experts} experts of {width} hidden neurons and {shared} shared ones "
            f"of {d_ff} it may be {' or '.join(near_shares)}"
        )
    return Plan(experts, width, top_k, shared)


def _config(dense: DenseModel, plan: Plan, settings: SplitSettings) -> MoesaicConfig:
    return dense.moe_config(
        num_experts=plan.experts,
        moe_intermediate_size=plan.d_ff,
        num_experts_per_tok=plan.top_k,
        num_shared_experts=1 if plan.shared else 0,
        shared_intermediate_size=plan.shared or None,
        router="unit_topk",
        router_options={"straight_through": True} if settings.straight_through else {},
        pre_gating=settings.pre_gating,
    )


def _calibrate(
    dense: DenseModel, plan: Plan, text: CalibrationText, settings: SplitSettings, work: Path, say: Say | None
) -> None:
    """Leave in ``work`` a file for each layer, and with one router for all of them its file."""
    stacked = settings.pre_gating == "stack"
    files = [_layer_file(work, layer) for layer in range(dense.num_layers)]
    read_TD = token_embeddings(dense, text) if stacked else None
    if not all(file.is_file() for file in files):
        for layer in feed_forwards(dense, text, say, work / "hidden.safetensors"):
            if not files[layer.layer].is_file():
                if say is not None:
                    say(f"layer {layer.layer + 1} of {dense.num_layers}: putting neurons into experts")
                common_TE = _wanted(files[: layer.layer]) if stacked else None
                save_atomically(_cut(layer, plan, text, settings, read_TD, common_TE), files[layer.layer])
    common_TE = _wanted(files) if stacked else None
    if read_TD is not None and common_TE is not None:
        gate = GateFit(read_TD).gate(common_TE, plan.top_k)
        save_atomically({"weight": gate.weight, "bias": gate.bias}, _gate_file(work))


def _wanted(files: Sequence[Path]) -> Tensor | None:
    """``[T, E]``: how much the experts of these layers contribute, together; None for no layers."""
    wanted_TE = None
    for file in files:
        target_TE = load_kept(file)["target"]
        wanted_TE = target_TE if wanted_TE is None else wanted_TE + target_TE
    return wanted_TE


def _cut(
    layer: FeedForward,
    plan: Plan,
    text: CalibrationText,
    settings: SplitSettings,
    read_TD: Tensor | None,
    common_TE: Tensor | None,
) -> dict[str, Tensor]:
    """``order`` ``[F]``: the shared neurons, then those of each expert; the layer's router; what it explains.

    With one router for all layers it reads ``read_TD``, and ``common_TE`` is what the layers before want.
    """
    neurons = observe(layer, text.domain_ids(), len(text.names), read_TD, common_TE)
    shared = always_active(neurons, plan.shared, settings.criterion)
    routed = torch.ones(layer.gate.shape[0], dtype=torch.bool)
    routed[torch.from_numpy(shared)] = False
    rest = routed.nonzero().squeeze(1).numpy()
    labels = CRITERIA.get(settings.criterion)(neurons.of(rest), plan.experts, plan.top_k, settings.seed)
    members_EX = torch.from_numpy(rest[labels.argsort(kind="stable")]).view(plan.experts, plan.d_ff)
    target_TE = contributions(layer, members_EX)
    if common_TE is not None:
        places = torch.from_numpy(align(target_TE, common_TE))
        members_EX, target_TE = members_EX[places], target_TE[:, places]
    shared_X = torch.from_numpy(shared)
    found = {
        "order": torch.cat([shared_X, members_EX.flatten()]),
        "best": torch.tensor(explained(layer, shared_X, members_EX, target_TE, plan.top_k)),
    }
    if settings.pre_gating == "stack":
        return {**found, "target": target_TE.contiguous()}
    gate = GateFit(layer.inputs).gate(target_TE, plan.top_k)
    share = explained(layer, shared_X, members_EX, gate.logits(layer.inputs), plan.top_k)
    return {**found, "weight": gate.weight, "bias": gate.bias, "explained": torch.tensor(share)}


def _figures(work: Path, layers: int, name: str) -> tuple[float, ...]:
    """What the calibration found for each layer; nothing where it did not look."""
    found = (load_kept(_layer_file(work, layer)).get(name) for layer in range(layers))
    return tuple(float(figure) for figure in found if figure is not None)


def _layer_file(work: Path, layer: int) -> Path:
    return work / f"layer-{layer:05d}.safetensors"


def _gate_file(work: Path) -> Path:
    return work / "router.safetensors"
