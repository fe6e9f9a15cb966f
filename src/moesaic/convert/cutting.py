"""The weights of a split model: the neurons of each dense feed-forward in a new order.

D model width · F hidden neurons · E experts · F' neurons of one · S shared neurons · G = 2F'.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from moesaic.convert.dense import DenseModel
from moesaic.convert.meter import watch
from moesaic.convert.writing import Output, load_kept


@dataclass(frozen=True)
class Plan:
    """The sizes that the settings come to: E experts of ``d_ff`` hidden neurons, K of them for a token, and ``shared``
    neurons for every token."""

    experts: int
    d_ff: int
    top_k: int
    shared: int


def outputs_of(
    dense: DenseModel, plan: Plan, cuts: Sequence[Path], gates: Sequence[Path], *, straight_through: bool
) -> Iterator[Output]:
    """The tensors of the split model, in the order of the layers.

    Args:
        cuts: of each layer a safetensors file with ``order`` ``[F]`` int64: the shared neurons, then those of each
            expert.
        gates: of each layer that has a router a safetensors file with its ``weight`` ``[E, D]`` and ``bias`` ``[E]``.
        straight_through: whether the routers have no ``scale``.
    """
    first, *others = dense.outside()
    yield _kept(dense, first)
    for layer in range(dense.num_layers):
        yield from (_kept(dense, name) for name in dense.others(layer))
        prefix, cut = f"model.layers.{layer}.mlp.", _LayerCut(dense, plan, layer, cuts[layer])
        d_model, dtype = dense.d_model, dense.dtype
        if layer < len(gates):
            yield from _router(prefix, gates[layer], plan, d_model, dtype, straight_through)
        up, down = (plan.experts, 2 * plan.d_ff, d_model), (plan.experts, d_model, plan.d_ff)
        yield Output(f"{prefix}experts.up", up, dtype, cut.experts_up)
        yield Output(f"{prefix}experts.down", down, dtype, cut.experts_down)
        if plan.shared:
            yield Output(f"{prefix}shared.up.weight", (2 * plan.shared, d_model), dtype, cut.shared_up)
            yield Output(f"{prefix}shared.down.weight", (d_model, plan.shared), dtype, cut.shared_down)
    yield from (_kept(dense, name) for name in others)


def _kept(dense: DenseModel, name: str) -> Output:
    source = dense.source
    return Output(name, source.shape(name), dense.dtype, lambda: source.read(name).to(dense.dtype))


def _router(
    prefix: str, file: Path, plan: Plan, d_model: int, dtype: torch.dtype, straight_through: bool
) -> Iterator[Output]:
    shapes: dict[str, tuple[int, ...]] = {"weight": (plan.experts, d_model), "bias": (plan.experts,)}
    for name, shape in shapes.items():
        yield Output(f"{prefix}router.{name}", shape, dtype, partial(_gate_part, file, name, dtype))
    if not straight_through:
        zeros = partial(torch.zeros, plan.experts, dtype=dtype)
        yield Output(f"{prefix}router.scale", (plan.experts,), dtype, zeros)


def _gate_part(file: Path, name: str, dtype: torch.dtype) -> Tensor:
    return load_kept(file)[name].to(dtype)


@dataclass(frozen=True)
class _LayerCut:
    """The feed-forward of one layer in its new order; each method reads one dense matrix at a time."""

    dense: DenseModel
    plan: Plan
    layer: int
    file: Path

    def experts_up(self) -> Tensor:
        """``[E, 2F', D]``: of each expert the gate's rows, then the up projection's."""
        plan, (_, routed) = self.plan, self._order()
        up_EGD = torch.empty(plan.experts, 2 * plan.d_ff, self.dense.d_model, dtype=self.dense.dtype)
        self._fill(up_EGD, routed.view(plan.experts, plan.d_ff))
        return watch(up_EGD)

    def experts_down(self) -> Tensor:
        """``[E, D, F']``."""
        plan, (_, routed) = self.plan, self._order()
        down_DF = self.dense.source.read(self.dense.ffn(self.layer).down)
        down_EDF = watch(torch.empty(plan.experts, self.dense.d_model, plan.d_ff, dtype=self.dense.dtype))
        for expert, own in enumerate(routed.view(plan.experts, plan.d_ff)):
            down_EDF[expert] = down_DF[:, own]
        return down_EDF

    def shared_up(self) -> Tensor:
        """``[2S, D]``."""
        shared, _ = self._order()
        up_1GD = torch.empty(1, 2 * len(shared), self.dense.d_model, dtype=self.dense.dtype)
        self._fill(up_1GD, shared.unsqueeze(0))
        return watch(up_1GD.squeeze(0))

    def shared_down(self) -> Tensor:
        """``[D, S]``."""
        shared, _ = self._order()
        return watch(self.dense.source.read(self.dense.ffn(self.layer).down)[:, shared].to(self.dense.dtype))

    def _fill(self, up_EGD: Tensor, members_EX: Tensor) -> None:
        width = members_EX.shape[1]
        names = self.dense.ffn(self.layer)
        for name, half in ((names.gate, slice(0, width)), (names.up, slice(width, None))):
            matrix_FD = self.dense.source.read(name)
            for expert, own in enumerate(members_EX):
                up_EGD[expert, half] = matrix_FD[own].to(self.dense.dtype)
            del matrix_FD

    def _order(self) -> tuple[Tensor, Tensor]:
        order_F: Tensor = load_kept(self.file)["order"]
        return order_F[: self.plan.shared], order_F[self.plan.shared :]
