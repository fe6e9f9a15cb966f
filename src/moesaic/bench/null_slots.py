"""Whether null slots save their time: a MoE layer with more and more of its slots null, all shares alternating.

T tokens · D model width · E experts · K slots per token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from moesaic.bench.limits import OtherProcesses
from moesaic.bench.part import Part
from moesaic.bench.shapes import SHAPES, Shape, told_tokens
from moesaic.bench.targets import TRAINING, Verdict
from moesaic.bench.timing import Times, alternate, timed
from moesaic.bench.workload import DTYPES, distance, tiled
from moesaic.config import MoEConfig
from moesaic.experts import use_backend
from moesaic.hf import freeze, use_native_linears
from moesaic.layer import MoE
from moesaic.routing import Router, Routing

SHARES = (0.1, 0.25, 0.5, 0.75, 1.0)
WITHIN = 0.15
"""Of proportional."""
_MOST_OTHERS = 0.05
HEADER = ("backend", "slots in use", "median ms", "quartiles", "of all slots' time", "over proportional", "error")
_WARM = 2
_WARM_TUNER = 8


@dataclass(frozen=True)
class Case:
    """One layer and what is done with it: forward alone it is frozen, as for inference.

    Args:
        wide: the router has a slot for every expert, most of them null, as a ReLU router has; else ``top_k`` slots.
        backward: the gradients too.
    """

    shape: Shape
    dtype: str = "bf16"
    tokens: int = 2048
    wide: bool = False
    backward: bool = False

    def __str__(self) -> str:
        both = ", forward and backward" if self.backward else ", forward"
        slots = f", a slot for each of {self.shape.num_experts} experts" if self.wide else ""
        return f"{self.shape}{slots}, {told_tokens(self.tokens)}, {self.dtype}{both}"


class NullingRouter(Router):
    """The top K of a gate, or all experts, but a slot that ``null`` (``[T, K]`` boolean) names is null."""

    def __init__(self, d_model: int, num_experts: int, top_k: int, null_TK: Tensor) -> None:
        super().__init__(d_model, num_experts, top_k)
        self.null_TK = null_TK

    def forward(self, x_TD: Tensor, top_k: int | None = None) -> Routing:
        scores_TE = self.logits(x_TD).softmax(dim=-1)
        if self.top_k == self.num_experts:
            ids_TK = torch.arange(self.num_experts).expand(x_TD.shape[0], -1)
            weights_TK = scores_TE
        else:
            weights_TK, ids_TK = scores_TE.topk(self.top_k, dim=-1)
        return Routing(ids_TK, weights_TK, scores_TE).without(self.null_TK)


def null_slots(share: float, tokens: int, top_k: int, generator: torch.Generator) -> Tensor:
    """``[T, K]``: drawn so that exactly the rounded ``share`` of all slots is not null."""
    null = torch.ones(tokens * top_k, dtype=torch.bool)
    null[torch.randperm(len(null), generator=generator)[: round(share * len(null))]] = False
    return null.view(tokens, top_k)


CASES = {
    "B": Case(SHAPES["B"]),
    "A": Case(SHAPES["A"]),
    "wide": Case(Shape(32, 32, 512, 256), wide=True),
    "training": Case(TRAINING, backward=True),
    "wide-training": Case(Shape(32, 32, 512, 256), wide=True, backward=True),
    "B-training": Case(SHAPES["B"], backward=True),
}


@dataclass(frozen=True)
class Point:
    """One backend at one share of slots: ``ratio`` is its time over that with all slots, and ``excess`` that over the
    share, minus 1: 0 is proportional."""

    backend: str
    share: float
    seconds: float
    quartiles: tuple[float, float]
    ratio: float
    error: float

    @property
    def excess(self) -> float:
        return self.ratio / self.share - 1


def measure(case: Case, backends: Sequence[str], seconds: float, seed: int = 0) -> Part:
    """Every backend at every share, alternating; the errors are against the backend ``loop`` on the same layer.

    Args:
        seconds: about how long the runs of all may take; at least five rounds are made.
    """
    work = _Work(case, seed)
    by_share = {share: work.errors(backends, share) for share in SHARES}
    errors = {(name, share): by_share[share][name] for name in backends for share in SHARES}
    contenders = {f"{name} {share}": partial(work.seconds, name, share) for name in backends for share in SHARES}
    for name, run in contenders.items():
        for number in range(_WARM_TUNER if name.startswith("auto") else _WARM):
            run(number)
    others = OtherProcesses(0.0)
    times, _ = alternate(contenders, {}, seconds)
    return _part(case, list(_points(times, errors)), others.share(0.0) or 0.0)


def _points(times: dict[str, Times], errors: dict[tuple[str, float], float]) -> Iterator[Point]:
    for (name, share), error in errors.items():
        own, whole = times[f"{name} {share}"], times[f"{name} {SHARES[-1]}"]
        yield Point(name, share, own.median, own.quartiles(), whole.ratio_of(own)[0], error)


def _part(case: Case, points: Sequence[Point], others: float) -> Part:
    """A table, and for each backend whether it is near enough to proportional at its worst share."""
    rows, verdicts, lines = [], [], []
    for each in points:
        low, high = (f"{1e3 * value:.1f}" for value in each.quartiles)
        times = f"{1e3 * each.seconds:.1f}", f"{low} - {high}", f"{each.ratio:.1%}", f"{each.excess:+.0%}"
        rows.append((each.backend, f"{each.share:.0%}", *times, f"{each.error:.1e}"))
    for name in dict.fromkeys(each.backend for each in points):
        own = [each for each in points if each.backend == name]
        for what, shares in (("a quarter of the slots and more", SHARES[1:]), ("a tenth of the slots", SHARES[:1])):
            worst = max((abs(each.excess) for each in own if each.share in shares), default=0.0)
            said = f"{name}: off proportional, {what}"
            verdicts.append(Verdict("null-slots", str(case), said, WITHIN, worst, "%", True, others > _MOST_OTHERS))
        fixed, per_slot = line_of([each.share for each in own], [each.seconds for each in own])
        lines.append(
            f"{name}: about {1e3 * fixed:.1f} ms whatever the share, and {1e3 * per_slot:.1f} ms times the share"
        )
    if others > _MOST_OTHERS:
        lines.append(f"do not trust these figures: other processes used {others:.0%} of the machine")
    return Part(str(case), HEADER, rows, verdicts, lines, points=[asdict(each) for each in points])


def line_of(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """The constant and the slope of the line nearest to y(x), each point weighted by 1 / y²: relative errors count."""
    columns = np.stack([np.ones(len(x)), np.asarray(x)], axis=1) / np.asarray(y)[:, None]
    constant, slope = np.linalg.lstsq(columns, np.ones(len(x)), rcond=None)[0]
    return float(constant), float(slope)


class _Work:
    """A layer, its routers of each share, and its input."""

    def __init__(self, case: Case, seed: int) -> None:
        shape, generator = case.shape, torch.Generator().manual_seed(seed)
        dtype = DTYPES[case.dtype]
        top_k = shape.num_experts if case.wide else shape.top_k
        with torch.device("meta"):
            layer = MoE(MoEConfig(shape.d_model, shape.d_ff, shape.num_experts, top_k))
        layer.experts.to(dtype)
        self.layer = layer.to_empty(device="cpu")
        for buffer in self.layer.buffers():
            buffer.zero_()
        for weight in self.layer.experts.parameters():
            weight.data = tiled(tuple(weight.shape), weight.shape[-1] ** -0.5, dtype, generator)
        self.layer.requires_grad_(case.backward).train(case.backward)
        self.routers = {}
        for share in SHARES:
            null_TK = null_slots(share, case.tokens, top_k, generator)
            self.routers[share] = NullingRouter(shape.d_model, shape.num_experts, top_k, null_TK)
            self.routers[share].requires_grad_(case.backward)
        if not case.backward:
            freeze(self.layer)
            use_native_linears(nn.ModuleList(self.routers.values()))  # its router is another one at each share
        self.x_TD = torch.randn(case.tokens, shape.d_model, generator=generator).to(dtype)
        self.backward = case.backward

    def run(self, share: float) -> list[Tensor]:
        """The output; with gradients, also those of the input, the router and the experts."""
        self.layer.router = self.routers[share]
        if not self.backward:
            with torch.inference_mode():
                return [self.layer(self.x_TD)]
        self.layer.zero_grad(set_to_none=True)
        x_TD = self.x_TD.detach().requires_grad_()
        out_TD = self.layer(x_TD)
        out_TD.backward(self.x_TD)
        found = [x_TD.grad, *(parameter.grad for parameter in self.layer.parameters())]
        return [out_TD.detach(), *(grad for grad in found if grad is not None)]

    def seconds(self, backend: str, share: float, _: int) -> float:
        with use_backend(backend):
            return timed(lambda: self.run(share))

    def errors(self, backends: Sequence[str], share: float) -> dict[str, float]:
        """Of each backend the worst of the output and the gradients, against the backend ``loop``."""
        with use_backend("loop"):
            expected = self.run(share)
        found = {}
        for name in backends:
            with use_backend(name):
                pairs = zip(self.run(share), expected, strict=True)
                found[name] = max(distance(a.float(), b.float()) for a, b in pairs)
        return found
