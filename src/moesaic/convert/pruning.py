"""A mixture of experts with fewer experts: the least useful ones are dropped, or merged into those that stay.

T tokens · D model width · E experts · M experts that stay · K experts of a token.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PretrainedConfig

from moesaic.convert.activations import read_text
from moesaic.convert.dense import is_moe
from moesaic.convert.grouping import FloatArray, Groups, best, clusters, distances, join_nearest
from moesaic.convert.pruned_config import check_fits, experts_of_a_token, pruned_config
from moesaic.convert.pruned_tensors import PrunedTensors, pruned_outputs
from moesaic.convert.source import SafetensorsSource, TensorSource, open_source, passage_length
from moesaic.convert.stored_experts import MOST_ALIGNED, StoredExperts
from moesaic.convert.streaming import StreamedModel
from moesaic.convert.usefulness import measure_use
from moesaic.convert.writing import Written, check_output, partial_folder, partial_path, write_model
from moesaic.data.sources import STDLIB
from moesaic.errors import CheckpointError, ConfigError, DataError, UnsupportedError, did_you_mean
from moesaic.experts import ACTIVATIONS
from moesaic.hf.load import model_folder
from moesaic.hf.placement import MoEBlock, moe_blocks
from moesaic.hf.save import check_new
from moesaic.inspect.folder import HELD_OUT
from moesaic.inspect.likeness import cosines
from moesaic.inspect.metrics import slot_counts
from moesaic.inspect.placement import check_same_model, load_trace
from moesaic.inspect.trace import RoutingTrace
from moesaic.routing.options import is_of

HOWS = ("drop", "merge")
CRITERIA = ("reap", "usage", "similarity")
SIMILARITIES = ("outputs", "weights")
MIN_ROWS = 16
"""Fewest tokens that an expert must have, in the mean, for the text to say something about it."""
_CHOICE = "choice.json"
_TOKENS_AT_ONCE = 4096
"""Of one forward, in which each layer is read once."""


@dataclass(frozen=True)
class PruneSettings:
    """Which experts go, and how; one of ``keep`` and ``share`` must be given.

    Args:
        keep: experts that stay in every MoE layer. share: the part of the experts that goes, between 0 and 1.
        how: ``"drop"``: experts and their router rows are removed, so that their tokens go to others; ``"merge"``: they
            are averaged, weighted by how often each is taken, into those that stay, after their neurons were put in one
            order, and so are their router rows.
        by: how it is decided. ``"reap"``: the experts with the largest mean of gate x length of output over their own
            tokens stay (REAP the Experts, equation 9); ``"usage"``: those that are taken most (with ``"merge"`` this is
            M-SMoE: the others join the nearest one); ``"similarity"``: the experts are clustered, and each cluster's
            most used one stays (with ``"merge"`` this is HC-SMoE).
        similarity: what near means: ``"outputs"``: the Euclidean distance of the experts' mean outputs over the same
            tokens, as in HC-SMoE; ``"weights"``: one minus the cosine of their weights.
        data: text to measure on, as :func:`moesaic.data.load_corpus` takes it; by default the standard library without
            what training holds out. tokens: how many of it. sequence_length: how many the model sees at once; None for
            512, or as many as it reads.
        trace: a routing trace, or the folder of a report that has one, instead of text: it says how often experts are
            taken, so it is enough where no outputs are looked at.

    Raises:
        ConfigError: for a value that is not allowed, or values that do not go together.
    """

    keep: int | None = None
    share: float | None = None
    how: str = "drop"
    by: str = "reap"
    similarity: str = "outputs"
    data: tuple[str, ...] = ()
    trace: str | None = None
    tokens: int = 16384
    sequence_length: int | None = None

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("how", self.how, HOWS),
            ("by", self.by, CRITERIA),
            ("similarity", self.similarity, SIMILARITIES),
        ):
            if value not in allowed:
                raise ConfigError(f"unknown {name} {value!r}: {did_you_mean(str(value), allowed)}")
        if (self.keep is None) == (self.share is None):
            raise ConfigError("give one of keep (experts that stay in a layer) and share (the part of them that goes)")
        if self.keep is not None and not (is_of(int, self.keep) and self.keep >= 1):
            raise ConfigError(f"keep is {self.keep!r}: it must be a whole number, at least 1")
        if self.share is not None and not (is_of(float, self.share) and 0 < self.share < 1):
            raise ConfigError(f"share is {self.share!r}: it must be between 0 and 1")
        for name in ("tokens", "sequence_length"):
            value = getattr(self, name)
            if not (is_of(int, value) and value >= 1) and (name, value) != ("sequence_length", None):
                raise ConfigError(f"{name} is {value!r}: it must be a whole number, at least 1")
        if self.trace is not None and self.data:
            raise ConfigError("give data to measure on, or a trace that was recorded, not both")
        if self.trace is not None and (self.by == "reap" or self.needs_outputs):
            wanted = "by 'reap'" if self.by == "reap" else "similarity 'outputs'"
            raise ConfigError(
                f"a trace does not know the experts' outputs, which {wanted} looks at: give data instead, or by "
                "'usage' with how 'drop', or similarity 'weights'"
            )

    @property
    def needs_distance(self) -> bool:
        """Whether it matters how alike experts are."""
        return self.how == "merge" or self.by == "similarity"

    @property
    def needs_outputs(self) -> bool:
        """Whether all experts' outputs for the same tokens are looked at."""
        return self.needs_distance and self.similarity == "outputs"


@dataclass(frozen=True)
class PrunedLayer:
    """One MoE layer: ``groups`` of the old experts' numbers, one for each new expert and led by the one that stays, and
    ``kept``: the share of the routed slots that the ones that stay had before."""

    groups: Groups
    kept: float


@dataclass(frozen=True)
class Pruned:
    """What was made: the experts of a layer ``before`` and ``after``, the ``tokens`` that were measured on, the
    ``layers`` by the numbers of the decoder layers, and whether neurons were ``aligned`` (False where nothing was
    merged, or experts are too wide for it)."""

    written: Written
    before: int
    after: int
    tokens: int
    layers: Mapping[int, PrunedLayer]
    aligned: bool


def prune(
    model: str | Path,
    out: str | Path,
    settings: PruneSettings,
    *,
    say: Callable[[str], None] | None = None,
    shard_bytes: int = 2 << 30,
) -> Pruned:
    """Write the mixture of experts in ``model`` with fewer experts to the new folder ``out``.

    Ours, or one of transformers (Mixtral, Qwen-MoE, OLMoE, DeepSeek, gpt-oss and others; to merge, their experts must
    be stored as those of the first four). The new model is of the same class, loads as the old one did, and with
    ``how="drop"`` computes what the old one does where its routers do not take the experts that went; but what is
    counted by expert (a capacity, the tokens that ``expert_choice`` gives each) is shared by fewer. Text goes through
    the model a layer at a time, and tensors are written a shard at a time; interrupted, the same call goes on.

    Dropping follows REAP the Experts (section 4) for ``by="reap"``. Merging is that of M-SMoE (Merge, Then Compress,
    section 3.1) or HC-SMoE (section 3.2), but for this: both keep the old router, with several of its rows leading to
    one merged expert, which no model class of transformers has; here a merged expert has one row, the average of its
    members' rows with the same weights, as long as these are in the mean. M-SMoE groups by the likeness of router
    logits, and counts how often experts are used over all layers; here every layer keeps equally many.

    Raises:
        UnsupportedError: for a dense model, and mixtures whose experts or routers cannot be pruned so.
        CheckpointError: where ``model`` cannot be read, the trace is of another model, or ``out`` exists.
        ConfigError: where so many experts cannot stay. DataError: where the text cannot be read or is too short.
    """
    out = Path(out)
    source = open_source(model)
    blocks = check_prunable(source, settings)
    experts = {block.number: StoredExperts(source, block, _gated(source.config)) for block in blocks}
    keep = _keep(source, settings, blocks)
    _check_mergeable(source, settings, experts)
    config = pruned_config(source.config, blocks[0].num_experts, keep)
    check_fits(config, source, blocks, keep)
    check_new(out)
    measured = _trace(settings.trace, blocks) if settings.trace else _text(source, settings, blocks[0].num_experts)
    told = {"method": "prune", "model": source.content(), **asdict(settings), "data": list(settings.data)}
    told["trace" if settings.trace else "text"] = _digest(measured)
    check_output(out, told)
    choice = _chosen(out, told, partial(_choose, source, blocks, experts, keep, settings, measured, say))
    layers = {}
    for block in blocks:
        own = choice["layers"][str(block.number)]
        layers[block.number] = PrunedTensors(block, experts[block.number], own["groups"], own["counts"])
    written = write_model(
        pruned_outputs(source, layers),
        out,
        config=config,
        tokenizer_from=source.tokenizer_from,
        settings=told,
        shard_bytes=shard_bytes,
        say=say,
    )
    return Pruned(
        written,
        blocks[0].num_experts,
        keep,
        choice["tokens"],
        {number: PrunedLayer(layer.groups, layer.kept) for number, layer in layers.items()},
        settings.how == "merge" and all(stored.d_ff <= MOST_ALIGNED for stored in experts.values()),
    )


def check_prunable(source: TensorSource, settings: PruneSettings) -> list[MoEBlock]:
    """The MoE layers of ``source``; refuses, before any work, a model that cannot be pruned with these settings.

    Raises:
        UnsupportedError, CheckpointError, ConfigError: as :func:`prune`.
    """
    where = repr(str(source.path))
    if not isinstance(source, SafetensorsSource):
        raise UnsupportedError(f"{where} is a GGUF file: prune takes a folder with safetensors")
    if not is_moe(source):
        raise UnsupportedError(
            f"{where} is dense ({source.config.model_type}): prune takes a mixture of experts; split and upcycle make "
            "one of a dense model"
        )
    for setting, plain in (("pre_gating", ("none", "layer")), ("zero_computation_experts", (None, {}))):
        value = getattr(source.config, setting, plain[0])
        if value not in plain:
            raise UnsupportedError(
                f"{where} has {setting} {value!r}: only layers that each have a router of their own, over nothing but "
                "experts that compute, can be pruned"
            )
    blocks = moe_blocks(source.path)
    counts = sorted({block.num_experts for block in blocks})
    if len(counts) > 1 or getattr(source.config, "expert_d_ffs", None):
        what = "experts of unequal width" if len(counts) == 1 else f"{counts[0]} to {counts[-1]} experts in its layers"
        raise UnsupportedError(f"{where} has {what}: only layers with equally many experts of one width can be pruned")
    if grouped := [block for block in blocks if block.groups > 1]:
        raise UnsupportedError(
            f"the routers of {where} choose among {grouped[0].groups} groups of experts first, which would no longer "
            "be equal: only routers that choose among all experts can be pruned"
        )
    if settings.trace is not None:
        check_same_model(load_trace(settings.trace), model_folder(source.path), blocks)
    return blocks


def _keep(source: TensorSource, settings: PruneSettings, blocks: Sequence[MoEBlock]) -> int:
    experts = blocks[0].num_experts
    top_k = experts_of_a_token(source)
    keep = settings.keep if settings.keep is not None else experts - round((settings.share or 0) * experts)
    if not top_k <= keep < experts:
        told = f"keep is {keep}" if settings.share is None else f"with share {settings.share}, {keep} would stay"
        raise ConfigError(
            f"{told} of {experts} experts in a layer, of which a token takes {top_k}: allowed are {top_k} to "
            f"{experts - 1}"
        )
    return keep


def _check_mergeable(source: TensorSource, settings: PruneSettings, experts: Mapping[int, StoredExperts]) -> None:
    for stored in experts.values():
        if settings.how == "merge" and not stored.knows_neurons():
            raise UnsupportedError(
                f"{stored.where} are stored as {', '.join(stored.parts)}: merged "
                "can be those of Mixtral, Qwen-MoE, OLMoE, DeepSeek and ours, in floating point; how "
                "'drop' takes all"
            )


def _gated(config: PretrainedConfig) -> bool:
    """Whether a fused up projection of ours holds a gate too."""
    return config.model_type == "moesaic" and ACTIVATIONS.get(config.expert_activation).gated


def _chosen(out: Path, told: Mapping[str, Any], choose: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What an earlier start has chosen, or ``choose`` does now; it is kept until all is written."""
    file = partial_path(out) / "work" / _CHOICE
    if file.is_file():
        try:
            kept: dict[str, Any] = json.loads(file.read_bytes())
        except (OSError, ValueError) as error:
            anew = f"to begin anew, remove {str(partial_path(out))!r}"
            raise CheckpointError(f"{str(file)!r} is damaged: {error}; {anew}") from error
        return kept
    chosen = choose()
    with partial_folder(out, told) as folder:
        (folder / "work").mkdir(exist_ok=True)
        making = folder / "work" / f".{_CHOICE}"
        making.write_text(json.dumps(chosen))
        making.replace(file)
    return chosen


def _choose(
    source: TensorSource,
    blocks: Sequence[MoEBlock],
    experts: Mapping[int, StoredExperts],
    keep: int,
    settings: PruneSettings,
    measured: RoutingTrace | Tensor,
    say: Callable[[str], None] | None,
) -> dict[str, Any]:
    """The tokens that were looked at, and of each layer its groups and how often each expert was taken."""
    points: dict[int, Tensor] = {}
    if isinstance(measured, RoutingTrace):
        tokens = measured.num_tokens
        counts = {block.number: _traced(measured, block) for block in blocks}
        scores = counts
    else:
        streamed = StreamedModel(source, blocks)
        batches = measured.split(max(1, _TOKENS_AT_ONCE // measured.shape[1]))
        uses = measure_use(streamed, blocks, batches, outputs=settings.needs_outputs, say=say)
        tokens = measured.numel()
        counts = {number: use.counts_E.numpy() for number, use in uses.items()}
        scores = {
            number: use.reap_E.numpy() if settings.by == "reap" else counts[number] for number, use in uses.items()
        }
        if settings.needs_outputs:
            points = {number: use.mean_output_ED for number, use in uses.items()}
    layers = {}
    for number, stored in experts.items():
        groups = _groups(settings, scores[number], counts[number], keep, stored, points.get(number))
        layers[str(number)] = {"groups": groups, "counts": counts[number].tolist()}
    return {"tokens": tokens, "layers": layers}


def _digest(measured: RoutingTrace | Tensor) -> str:
    """Of the token ids, or of the experts that a trace has for each layer."""
    if isinstance(measured, Tensor):
        arrays = [(0, measured.numpy())]
    else:
        arrays = [(layer.number, layer.expert_ids) for layer in measured.layers]
    digest = hashlib.blake2b(digest_size=16)
    for number, array in arrays:
        digest.update(repr((number, array.shape, str(array.dtype))).encode() + array.tobytes())
    return f"v1:{digest.hexdigest()}"


def _text(source: TensorSource, settings: PruneSettings, experts: int) -> Tensor:
    """``[N, S]`` token ids: passages one after the other, cut into rows of one length.

    Raises:
        DataError: where there is too little text for so many experts.
    """
    length = passage_length(settings.sequence_length, source)
    data = settings.data or (STDLIB,)
    held_out = HELD_OUT if data == (STDLIB,) else 0.0
    text = read_text(source, data, tokens=settings.tokens, sequence_length=length, held_out=held_out)
    ids_T = torch.cat(text.passages)
    each = len(ids_T) * experts_of_a_token(source) / experts
    if each < MIN_ROWS:
        raise DataError(
            f"the text to measure on has {len(ids_T)} tokens, so that an expert sees {each:.1f} of them in the mean: "
            f"for {experts} experts at least {-(-MIN_ROWS * experts // experts_of_a_token(source))} tokens are needed"
        )
    length = min(length, len(ids_T))
    return ids_T[: len(ids_T) // length * length].view(-1, length)


def _trace(path: str, blocks: Sequence[MoEBlock]) -> RoutingTrace:
    """Raises :class:`DataError` where it is too short for so many experts."""
    trace = load_trace(path)
    for block in blocks:
        each = float(_traced(trace, block).mean())
        if each < MIN_ROWS:
            raise DataError(
                f"the trace has {trace.num_tokens} tokens, so that an expert of layer {block.number} is taken "
                f"{each:.1f} times in the mean: at least {MIN_ROWS} are needed"
            )
    return trace


def _traced(trace: RoutingTrace, block: MoEBlock) -> FloatArray:
    own = [layer for layer in trace.layers if layer.number == block.number]
    everyone = np.zeros(trace.num_tokens, dtype=np.int64)
    counts = [slot_counts(layer.expert_ids, everyone, block.num_experts, 1)[0] for layer in own]
    total: FloatArray = np.sum(counts, axis=0).astype(np.float64)
    return total


def _groups(
    settings: PruneSettings, scores_E: Any, counts_E: Any, keep: int, stored: StoredExperts, points_ED: Tensor | None
) -> Groups:
    if not settings.needs_distance:
        return best(scores_E, keep)
    if points_ED is not None:
        distance_EE = distances(points_ED.numpy())
    else:
        distance_EE = np.maximum(1 - cosines(stored.pieces()).numpy(), 0)
        np.fill_diagonal(distance_EE, 0)
        if not np.isfinite(distance_EE).all():
            raise CheckpointError(f"{stored.where} hold values that are not finite, or too large to compare")
    if settings.by == "similarity":
        groups = clusters(distance_EE, keep, counts_E)
    else:
        groups = join_nearest(best(scores_E, keep), distance_EE)
    return groups if settings.how == "merge" else [group[:1] for group in groups]
