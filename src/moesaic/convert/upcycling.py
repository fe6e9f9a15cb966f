"""Dense to mixture of experts by copies: every expert is the whole feed-forward, changed where asked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moesaic.convert.banks import Experts, FreshRouters, ask, bank_outputs, copied, sound
from moesaic.convert.dense import DenseModel, check_dense
from moesaic.convert.seeds import generator
from moesaic.convert.source import open_source
from moesaic.convert.writing import Output, Written, check_output, write_model
from moesaic.errors import ConfigError
from moesaic.experts import ACTIVATIONS
from moesaic.routing.options import is_of

PROBE_TOKENS = 64
"""Tokens by which the distance from the dense model is measured."""
_VALUES_AT_ONCE = 1 << 16


@dataclass(frozen=True)
class UpcycleSettings:
    """How a dense model is upcycled.

    Args:
        num_experts: copies of each layer's feed-forward. top_k: how many of them a token takes; with 1 a router whose
            weights sum to 1 always weighs its choice by 1, and learns from the balancing loss alone.
        router: a name of ``moesaic.routing.available()`` whose weights sum to 1; ``router_options`` are its own.
        balancing: for the training that follows, as :class:`moesaic.MoEConfig` takes it.
        perturb: make the copies different without changing what they compute. The neurons of each copy stand in an
            order of their own, and each has its up row times c and its down column by 1/c, with c one of 1/2, 1 and 2:
            exact in every precision. Steps of training then move each copy another way, so that they drift apart.
        drop: share r of each copy's neurons that is drawn anew (Drop-Upcycling, section 3.2).
        noise: standard deviation of what is added to each matrix, relative to that of its own values.
        seed: of everything random.

    Raises:
        ConfigError: for a value out of range.
    """

    num_experts: int = 8
    top_k: int = 2
    router: str = "softmax_topk"
    router_options: Mapping[str, Any] = field(default_factory=dict)
    balancing: Mapping[str, Any] = field(default_factory=lambda: {"load_balancing": 0.01})
    perturb: bool = True
    drop: float = 0.0
    noise: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (is_of(int, self.num_experts) and self.num_experts >= 2):
            raise ConfigError(f"num_experts is {self.num_experts!r}: it must be a whole number of at least 2")
        if not (is_of(float, self.drop) and 0 <= self.drop <= 1):
            raise ConfigError(f"drop is {self.drop!r}: it must be a share from 0 to 1 of each copy's neurons")
        if not (is_of(float, self.noise) and self.noise >= 0):
            raise ConfigError(f"noise is {self.noise!r}: it must be finite and at least 0")
        self.experts(0.02)

    def experts(self, std: float) -> Experts:
        """The experts' routers and balancing, the gates drawn with this standard deviation."""
        routers = FreshRouters(self.router, self.router_options, self.num_experts, self.top_k, std, self.seed)
        return Experts(routers, self.balancing)

    def told(self) -> dict[str, Any]:
        """As JSON can hold them."""
        return {**asdict(self), "router_options": dict(self.router_options), "balancing": dict(self.balancing)}


@dataclass(frozen=True)
class Upcycled:
    """What :func:`upcycle` made.

    Args:
        distance: of each layer, ‖experts(x) − feed-forward(x)‖ / ‖feed-forward(x)‖ in float32 on :data:`PROBE_TOKENS`
            random tokens with unit root mean square, scaled by the norm before the layer as its real inputs are; 0 up
            to rounding without ``drop`` and ``noise``.
        active_parameters: of all feed-forwards, those that a token takes. dense_parameters: those of the dense model.
    """

    written: Written
    distance: tuple[float, ...]
    active_parameters: int
    dense_parameters: int


@dataclass(frozen=True)
class CopyChange:
    """What makes one copy of a feed-forward another one; the same for its three matrices.

    Args:
        order_F: ``[F]`` int64, which neuron stands where. scale_F: ``[F]`` float32, the factors c of its up row.
        dropped_S: ``[S]`` int64, the neurons (before reordering) that are drawn anew.
        noise: as in :class:`UpcycleSettings`. seed: what the random values are drawn by.
    """

    order_F: Tensor
    scale_F: Tensor
    dropped_S: Tensor
    noise: float
    seed: tuple[int | str, ...]

    @classmethod
    def of(cls, settings: UpcycleSettings, layer: int, expert: int, d_ff: int) -> CopyChange:
        """That of one expert; always the same for the same settings."""
        seed = (settings.seed, "copy", layer, expert)
        random = generator(*seed)
        order_F, scale_F = torch.arange(d_ff), torch.ones(d_ff)
        if settings.perturb:
            order_F = torch.randperm(d_ff, generator=random)
            scale_F = torch.exp2(torch.randint(-1, 2, (d_ff,), generator=random).float())
        dropped_S = torch.randperm(d_ff, generator=random)[: int(settings.drop * d_ff + 1e-6)]  # 0.29 · 100 < 29
        return cls(order_F, scale_F, dropped_S, settings.noise, seed)

    def up(self, gate_FD: Tensor, up_FD: Tensor, into_GD: Tensor) -> None:
        """The copy's gate and up projections into ``[2F, D]``, computed in float32."""
        d_ff = gate_FD.shape[0]
        self._fill(gate_FD, "gate", torch.ones_like(self.scale_F), into_GD[:d_ff])
        self._fill(up_FD, "up", self.scale_F, into_GD[d_ff:])

    def down(self, down_DF: Tensor, into_DF: Tensor) -> None:
        """The copy's down projection into ``[D, F]``, computed in float32."""
        self._fill(down_DF.t(), "down", 1 / self.scale_F, into_DF.t())

    def _fill(self, weight_FD: Tensor, which: str, scale_F: Tensor, into_FD: Tensor) -> None:
        """The neurons' weights with what is drawn anew or added, some neurons at a time: in bfloat16 a whole matrix in
        float32 would be as large as four of a copy's six."""
        random, rows = generator(*self.seed, which), _rows(weight_FD)
        place_F, is_dropped_F = self.order_F.argsort(), torch.zeros(len(weight_FD), dtype=torch.bool)
        is_dropped_F[self.dropped_S] = True
        mean, deviation = _moments(weight_FD, self.dropped_S) if len(self.dropped_S) else (0.0, 0.0)
        noise = self.noise and self.noise * _moments(weight_FD, torch.arange(len(weight_FD)))[1]
        for own in torch.arange(len(weight_FD)).split(rows):
            some_RD = weight_FD[own].float()
            if len(anew := is_dropped_F[own].nonzero().squeeze(1)):
                some_RD[anew] = torch.randn(len(anew), some_RD.shape[1], generator=random) * deviation + mean
            if noise:
                some_RD += torch.randn(some_RD.shape, generator=random) * noise
            into_FD[place_F[own]] = (some_RD * scale_F[place_F[own], None]).to(into_FD.dtype)


def _rows(weight_FD: Tensor) -> int:
    return max(1, _VALUES_AT_ONCE // weight_FD.shape[1])


def _moments(weight_FD: Tensor, neurons_S: Tensor) -> tuple[float, float]:
    """Mean and standard deviation of all values of these neurons."""
    parts = neurons_S.split(_rows(weight_FD))
    count = len(neurons_S) * weight_FD.shape[1]
    mean = sum(float(weight_FD[own].double().sum()) for own in parts) / count
    squares = sum(float((weight_FD[own].double() - mean).square().sum()) for own in parts)
    return mean, (squares / max(1, count - 1)) ** 0.5


def upcycle(
    model: str | Path,
    out: str | Path,
    settings: UpcycleSettings,
    say: Callable[[str], None] | None = None,
    shard_bytes: int = 2 << 30,
) -> Upcycled:
    """Make a dense model a mixture of experts by copying its feed-forwards, and write it to the folder ``out``.

    Copies and fresh routers are those of Sparse Upcycling: Training Mixture-of-Experts from Dense Checkpoints (section
    2), in all layers, with weights that sum to 1 so that the model computes what the dense one does (the paper's
    normalization of combine weights). ``drop`` is Drop-Upcycling: Training Sparse Mixture of Experts with Partial
    Re-initialization (section 3.2): of each copy ⌊r·F⌋ neurons, the same in its three matrices, are drawn from a normal
    distribution with the mean and standard deviation of the values that they replace. (The authors' program draws
    other neurons for each matrix, and stores all copies in a random order; here the order is part of ``perturb``.)
    ``noise`` is that paper's random-noise upcycling, with a standard deviation relative to each matrix's own instead of
    0.02, and on all values.

    The model is read and written a tensor at a time; a start that was interrupted goes on where it stopped.

    Args:
        model: a dense Llama-like model: a folder, or a ``.gguf`` file. out: must not exist.
        say: called with a line of text for each file, and with the distance from the dense model.
        shard_bytes: most bytes of one file.

    Raises:
        UnsupportedError: for a mixture of experts or an architecture that is not supported.
        CheckpointError: where the model is damaged or has values that are not finite, or ``out`` exists or holds
            another unfinished conversion.
        ConfigError: for settings that do not go together.
        UsageError: where ``out`` cannot be written.
    """
    dense = check_dense(open_source(model))
    experts = settings.experts(getattr(dense.source.config, "initializer_range", 0.02))
    config = experts.config(dense)
    told = {"method": "upcycle", "model": dense.source.content(), **settings.told()}
    check_output(Path(out), told)
    outputs = [copied(dense, name) for name in dense.outside()]
    for layer in range(dense.num_layers):
        outputs += [copied(dense, name) for name in dense.others(layer)]
        outputs += experts.routers.outputs(layer, dense.d_model, dense.dtype)
        outputs += _copies(dense, layer, settings)
    written = write_model(
        outputs,
        Path(out),
        config=config,
        tokenizer_from=dense.source.tokenizer_from,
        settings=told,
        shard_bytes=shard_bytes,
        say=say,
    )
    distance = tuple(measure_distance(dense, layer, settings, experts.routers) for layer in range(dense.num_layers))
    if say is not None:
        say(f"distance of the layers' outputs from the dense ones: {sum(distance) / len(distance):.2g} of their size")
    per_copy = dense.dense_parameters() * dense.num_layers
    return Upcycled(written, distance, per_copy * settings.top_k, per_copy)


def _copies(dense: DenseModel, layer: int, settings: UpcycleSettings) -> list[Output]:
    names = dense.ffn(layer)
    read: dict[str, Tensor] = {}  # while a bank is filled, what all of its experts are made of

    def weight(name: str, last: bool) -> Tensor:
        tensor = read[name] if name in read else read.setdefault(name, sound(dense.source, name))
        if last:
            del read[name]
        return tensor

    def fill_up(expert: int, into_GD: Tensor) -> None:
        last = expert == settings.num_experts - 1
        change = CopyChange.of(settings, layer, expert, dense.d_ff)
        change.up(weight(names.gate, last), weight(names.up, last), into_GD)

    def fill_down(expert: int, into_DF: Tensor) -> None:
        last = expert == settings.num_experts - 1
        CopyChange.of(settings, layer, expert, dense.d_ff).down(weight(names.down, last), into_DF)

    return bank_outputs(dense, layer, settings.num_experts, fill_up, fill_down)


@torch.no_grad()
def measure_distance(dense: DenseModel, layer: int, settings: UpcycleSettings, routers: FreshRouters) -> float:
    """‖experts(x) − feed-forward(x)‖ / ‖feed-forward(x)‖ of one layer, as :class:`Upcycled` tells it; in memory is the
    layer's feed-forward and one copy."""
    names, source = dense.ffn(layer), dense.source
    gate_FD, up_FD, down_DF = (source.read(name) for name in names)
    x_TD = torch.randn(PROBE_TOKENS, dense.d_model, generator=generator(settings.seed, "probe", layer))
    x_TD = x_TD / x_TD.square().mean(dim=1, keepdim=True).sqrt()
    x_TD = x_TD * source.read(f"model.layers.{layer}.post_attention_layernorm.weight").float()
    apply = ACTIVATIONS.get(dense.activation).apply
    # In float32 one matrix at a time.
    wanted_TD = apply(torch.cat([x_TD @ half_FD.float().t() for half_FD in (gate_FD, up_FD)], dim=1))
    wanted_TD = wanted_TD @ down_DF.float().t()
    routing = ask(routers.build(layer, dense.d_model).eval(), x_TD)
    got_TD = torch.zeros_like(wanted_TD)
    copy_GD = torch.empty(2 * dense.d_ff, dense.d_model, dtype=dense.dtype)  # rounded as they are written
    copy_DF = torch.empty(dense.d_model, dense.d_ff, dtype=dense.dtype)
    for expert in range(settings.num_experts):
        weight_T = torch.where(routing.expert_ids == expert, routing.weights, 0.0).sum(dim=1)
        rows = weight_T.nonzero().squeeze(1)
        if len(rows):
            change = CopyChange.of(settings, layer, expert, dense.d_ff)
            change.up(gate_FD, up_FD, copy_GD)
            change.down(down_DF, copy_DF)
            halves = [x_TD[rows] @ half_FD.float().t() for half_FD in copy_GD.chunk(2)]
            hidden = apply(torch.cat(halves, dim=1)) @ copy_DF.float().t()
            got_TD[rows] += weight_T[rows, None] * hidden
    return float((got_TD - wanted_TD).norm() / wanted_TD.norm())
