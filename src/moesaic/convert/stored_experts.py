"""The experts of one MoE layer as they lie on disk: each with tensors of its own, or all in fused ones.

E experts · D model width · F expert hidden width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from moesaic.convert.meter import watch
from moesaic.convert.source import TensorSource
from moesaic.convert.streaming import PARTS
from moesaic.hf.placement import MoEBlock

MOST_ALIGNED = 4096
"""The widest experts whose neurons are put in order: the time that it takes grows with the cube of their number."""
_GATE_UP = {f"{name}.weight" for gate, up, _ in PARTS for name in (gate, up)}
_DOWN = {f"{down}.weight" for *_, down in PARTS}
_OURS = {"up", "down", "up_bias", "down_bias"}


class StoredExperts:
    """The experts of ``block``; ``parts`` are the rests of their tensors' names, and ``fused`` whether each tensor
    holds all experts; ``where`` says in a message whose experts these are.

    Args:
        gated: whether the activation has a gate; asked of fused tensors, which hold gate and up projection in one.
    """

    def __init__(self, source: TensorSource, block: MoEBlock, gated: bool) -> None:
        self._source, self._prefix, self._gated = source, f"{block.name}.experts.", gated
        self.num_experts = block.num_experts
        self.where = f"the experts of layer {block.number} of {str(source.path)!r}"
        rests = [name.removeprefix(self._prefix) for name in source.names if name.startswith(self._prefix)]
        single = [rest.partition(".") for rest in rests]
        self.fused = not all(number.isdigit() for number, _, _ in single)
        self.parts = tuple(rests if self.fused else dict.fromkeys(rest for _, _, rest in single))

    def name(self, part: str, expert: int) -> str:
        """What the tensor with this part of an expert is called."""
        return self._prefix + (part if self.fused else f"{expert}.{part}")

    def shape(self, part: str) -> tuple[int, ...]:
        """The shape of one expert's part."""
        shape = self._source.shape(self.name(part, 0))
        return shape[1:] if self.fused else shape

    def dtype(self, part: str) -> torch.dtype:
        """The dtype that the part is stored in."""
        return self._source.dtype(self.name(part, 0))

    def read(self, part: str, expert: int) -> Tensor:
        """One expert's part."""
        if self.fused:
            return self._source.read(self.name(part, 0), slice(expert, expert + 1))[0]
        return self._source.read(self.name(part, expert))

    def knows_neurons(self) -> bool:
        """Whether it is known which number of each part belongs to which hidden neuron, so that experts can be merged:
        where they are stored as Mixtral's, Qwen-MoE's, OLMoE's and DeepSeek's are, or as ours, in floating point."""
        known = _OURS if self.fused else _GATE_UP | _DOWN
        return set(self.parts) <= known and all(self.dtype(part).is_floating_point for part in self.parts)

    @property
    def d_ff(self) -> int:
        """Hidden width F; only where :meth:`knows_neurons`."""
        part = next(part for part in self.parts if part == "down" or part in _DOWN)
        return self.shape(part)[1]

    def average(self, part: str, members: Sequence[int], shares: Sequence[float], orders: Sequence[Tensor]) -> Tensor:
        """The weighted sum of the members' parts, each with its neurons in its order; computed in float32."""
        total = torch.zeros(self.shape(part))
        for expert, share, order_F in zip(members, shares, orders, strict=True):
            total += share * self._ordered(part, self.read(part, expert).float(), order_F)
        return total.to(self.dtype(part))

    def orders(self, members: Sequence[int]) -> list[Tensor]:
        """For each member the order ``[F]`` of its neurons that brings them nearest to those of the first one.

        The sum over the neurons of the inner products of their weights is largest: weight matching as in Git Re-Basin:
        Merging Models modulo Permutation Symmetries, section 3.2, which M-SMoE (section 3.1) applies to experts. For
        one hidden layer it is one assignment problem, solved exactly. Experts wider than :data:`MOST_ALIGNED` keep
        their order.
        """
        same_F = torch.arange(self.d_ff)
        if self.d_ff > MOST_ALIGNED:
            return [same_F for _ in members]
        found = [same_F]
        for expert in members[1:]:
            gain_FF = torch.zeros(self.d_ff, self.d_ff)
            for part in self.parts:
                first, other = (self._of_neurons(part, self.read(part, e).float()) for e in (members[0], expert))
                if first is not None and other is not None:
                    gain_FF += first @ other.t()
            found.append(torch.from_numpy(linear_sum_assignment(gain_FF.numpy(), maximize=True)[1]))
        return found

    def pieces(self) -> Iterator[Tensor]:
        """The experts' matrices as rows ``[E, N]``, one part after the other."""
        for part in self.parts:
            size = torch.Size(self.shape(part)).numel()
            rows_EN = watch(torch.empty(self.num_experts, size, dtype=self.dtype(part)))
            for expert in range(self.num_experts):
                rows_EN[expert] = self.read(part, expert).flatten()
            yield rows_EN

    def _ordered(self, part: str, tensor: Tensor, order_F: Tensor) -> Tensor:
        if part == "down_bias":
            return tensor
        if part == "down" or part in _DOWN:
            return tensor[:, order_F]
        ordered: Tensor = tensor.unflatten(0, (self._halves(part), -1))[:, order_F].flatten(0, 1)
        return ordered

    def _of_neurons(self, part: str, tensor: Tensor) -> Tensor | None:
        """``[F, N]``: each neuron's numbers; None for what no neuron owns."""
        if part == "down_bias":
            return None
        if part == "down" or part in _DOWN:
            return tensor.t()
        halves: Tensor = tensor.unflatten(0, (self._halves(part), -1))
        return halves.transpose(0, 1).flatten(1)

    def _halves(self, part: str) -> int:
        """How many rows a neuron has, one in each of so many halves."""
        return 2 if self._gated and part in ("up", "up_bias") else 1
