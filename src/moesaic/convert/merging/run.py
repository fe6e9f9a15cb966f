"""Several fine-tuned models of one base become one: a dense one, or a mixture with one expert each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moesaic.convert.banks import Experts, FreshRouters, sound
from moesaic.convert.dense import DenseModel, check_dense
from moesaic.convert.merging.experts import mixed_outputs
from moesaic.convert.merging.layers import LayerWeights
from moesaic.convert.merging.lineage import check_one_base, tensors
from moesaic.convert.merging.method import MergeMethod, create_merge
from moesaic.convert.merging.vectors import Read, TaskVectors
from moesaic.convert.meter import watch
from moesaic.convert.source import open_source
from moesaic.convert.writing import Output, Written, check_output, write_model
from moesaic.errors import ConfigError, did_you_mean
from moesaic.routing.options import is_of

INTO = ("dense", "experts")


@dataclass(frozen=True)
class MergeSettings:
    """How fine-tuned models are merged.

    Args:
        models: folders (or ``.gguf`` files) of models that were fine-tuned from the base.
        into: ``"dense"`` for one model like the base, ``"experts"`` for a mixture of experts (Branch-Train-MiX).
        by: a name of ``moesaic.convert.MERGES``; ``options`` are its own keywords. With ``into="experts"`` it merges
            all that is no feed-forward.
        weights: one a model, after one of the base where that is an expert; by default what the method calls equal.
        layer_weights: other weights for some layers: ``{"0-9": (1, 0), "outside": (0.5, 0.5), "20:ffn": (0, 1)}``; of
            several places that hold a tensor the last one counts. See :func:`moesaic.convert.merging.parse_place`.
        with_base: the base is one of the experts, the first one, and is averaged with the others.
        top_k, router, router_options, balancing: of the mixture, as in :class:`moesaic.convert.UpcycleSettings`.
        seed: of random masks and fresh routers.

    Raises:
        ConfigError: for a value out of range.
    """

    models: Sequence[str | Path]
    into: str = "dense"
    by: str = "linear"
    options: Mapping[str, Any] = field(default_factory=dict)
    weights: Sequence[float] | None = None
    layer_weights: Mapping[str, Sequence[float]] = field(default_factory=dict)
    with_base: bool = True
    top_k: int = 2
    router: str = "softmax_topk"
    router_options: Mapping[str, Any] = field(default_factory=dict)
    balancing: Mapping[str, Any] = field(default_factory=lambda: {"load_balancing": 0.01})
    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.models, str | Path) or not self.models:
            raise ConfigError("a merge needs models that were fine-tuned from the base: give at least one")
        if self.into not in INTO:
            raise ConfigError(f"into is {self.into!r}: {did_you_mean(self.into, INTO)}")
        if not is_of(int, self.seed):
            raise ConfigError(f"seed is {self.seed!r}: it must be a whole number")
        method, number = self.method(), len(self.models) + self.counts_base
        for where, weights in [("weights", self.weights), *self.layer_weights.items()]:
            if weights is not None:
                name = where if where == "weights" else f"layer_weights of {where!r}"
                name += " (the base's is the first)" if self.counts_base else ""
                method.check_weights(tuple(weights), number, name)
        if self.into == "experts":
            self.experts(0.02)

    @property
    def counts_base(self) -> bool:
        """Whether the base is merged as one of the models, the first one."""
        return self.into == "experts" and self.with_base

    def method(self) -> MergeMethod:
        """The merge method with its options."""
        return create_merge(self.by, self.options, len(self.models) + self.counts_base)

    def experts(self, std: float) -> Experts:
        """The mixture's routers and balancing, the gates drawn with this standard deviation."""
        number = len(self.models) + self.counts_base
        if number < 2:
            raise ConfigError("a mixture needs two experts: give more models, or the base as one of them (with_base)")
        routers = FreshRouters(self.router, self.router_options, number, self.top_k, std, self.seed)
        return Experts(routers, self.balancing)

    def told(self) -> dict[str, Any]:
        """As JSON can hold them, without the models."""
        told: dict[str, Any] = {name: getattr(self, name) for name in ("into", "by", "seed")}
        told |= {"options": dict(self.options), "weights": None if self.weights is None else list(self.weights)}
        told["layer_weights"] = [[place, list(weights)] for place, weights in self.layer_weights.items()]
        if self.into == "experts":
            told |= {name: getattr(self, name) for name in ("with_base", "top_k", "router")}
            told |= {"router_options": dict(self.router_options), "balancing": dict(self.balancing)}
        return told


@dataclass(frozen=True)
class Merged:
    """What :func:`merge` made.

    Args:
        experts: how many experts each layer has; 0 for a dense model.
        active_parameters: of all feed-forwards, those that a token takes.
    """

    written: Written
    experts: int
    active_parameters: int


def merge(
    model: str | Path,
    out: str | Path,
    settings: MergeSettings,
    say: Callable[[str], None] | None = None,
    shard_bytes: int = 2 << 30,
) -> Merged:
    """Merge models that were fine-tuned from one base, and write the result to the folder ``out``.

    All merge methods see the same thing: the base's tensor, and what each model has added to it (its task vector), some
    rows at a time and computed in float32; what comes out has the base's dtype, configuration and tokenizer.

    With ``into="experts"`` the feed-forwards become the experts of a mixture, expert e being that of model e, and the
    rest is averaged (Branch-Train-MiX: Mixing Expert LLMs into a Mixture-of-Experts LLM, section 3.2, equation 1). The
    routers know nothing yet: the mixture is to be trained on all the domains. As there, the base may be an expert too.

    A start that was interrupted goes on where it stopped.

    Args:
        model: the base: a dense Llama-like model, as a folder or a ``.gguf`` file. out: must not exist.
        say: called with a line of text for each file. shard_bytes: most bytes of one file.

    Raises:
        UnsupportedError: for a mixture of experts or an architecture that is not supported.
        CheckpointError: where a model is damaged, has values that are not finite or does not come from the base, or
            ``out`` exists or holds another unfinished conversion.
        ConfigError: for settings that do not go together, or weights that make values too large for the dtype.
        UsageError: where ``out`` cannot be written.
    """
    base = check_dense(open_source(model))
    tuned = [check_dense(open_source(path)) for path in settings.models]
    special = LayerWeights.of((), settings.layer_weights, base.num_layers).special
    check_one_base(base, tuned)
    told = {
        "method": "merge",
        "model": base.source.content(),
        "models": [each.source.content() for each in tuned],
        **settings.told(),
    }
    check_output(Path(out), told)
    branches = [base, *tuned] if settings.counts_base else tuned
    method = settings.method()
    general = method.equal(len(branches)) if settings.weights is None else tuple(settings.weights)
    merging = _Merging(base, branches, method, LayerWeights(general, special), settings.seed)
    if settings.into == "experts":
        experts = settings.experts(getattr(base.source.config, "initializer_range", 0.02))
        config: Any = experts.config(base)
        outputs = mixed_outputs(base, branches, experts, merging.output)
    else:
        config = base.source.config
        outputs = [merging.output(name) for name in tensors(base)]
    written = write_model(
        outputs,
        Path(out),
        config=config,
        tokenizer_from=base.source.tokenizer_from,
        settings=told,
        shard_bytes=shard_bytes,
        say=say,
    )
    number = len(branches) if settings.into == "experts" else 0
    active = base.dense_parameters() * base.num_layers * (settings.top_k if number else 1)
    return Merged(written, number, active)


@dataclass(frozen=True)
class _Merging:
    base: DenseModel
    branches: Sequence[DenseModel]
    method: MergeMethod
    weights: LayerWeights
    seed: int

    def output(self, name: str) -> Output:
        """The merged tensor of that name, like the base's."""
        source = self.base.source
        return Output(name, source.shape(name), source.dtype(name), partial(self._make, name))

    def _make(self, name: str) -> Tensor:
        source = self.base.source
        shape = source.shape(name)
        vectors = TaskVectors(
            name, shape, _reader(self.base, name), [_reader(each, name) for each in self.branches], self._rows(shape)
        )
        weights = self.weights[name]
        learned = self.method.learn(vectors, weights, self.seed)
        merged = watch(torch.empty(shape, dtype=source.dtype(name)))
        for piece in vectors:
            merged[piece.rows] = self.method.merge(piece, weights, learned).to(merged.dtype)
            if not torch.isfinite(merged[piece.rows]).all():
                dtype = str(merged.dtype).removeprefix("torch.")
                raise ConfigError(f"{name} merged by {list(weights)} is too large for {dtype}: give smaller weights")
        return merged

    def _rows(self, shape: tuple[int, ...]) -> int:
        """Rows of a piece: those of all models, in float32, are at most a quarter of a layer's feed-forward."""
        per_row = max(torch.Size(shape[1:]).numel(), 1) * (len(self.branches) + 1)
        return max(self.base.dense_parameters() * min(self.base.dtype.itemsize, 4) // 16 // per_row, 1)


def _reader(model: DenseModel, name: str) -> Read:
    return lambda rows: sound(model.source, name, rows)
