"""Ours under each backend and transformers' own implementations, on one experts module of transformers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import OlmoeConfig
from transformers.models.olmoe.modeling_olmoe import OlmoeExperts

from moesaic.bench.shapes import Shape
from moesaic.bench.timing import timed
from moesaic.bench.workload import Bank, Call, gradient_error, relative_error
from moesaic.errors import UnsupportedError
from moesaic.experts import QuantFormat, QuantizedMatrix, use_backend
from moesaic.hf import quantize
from moesaic.hf.freezing import freeze
from moesaic.hf.quantized import adopt

FROZEN = "frozen"
_QUANTIZED_EXPERTS = 2


class Contender(ABC):
    """Computes the experts of one call.

    Attributes:
        bytes_per_expert: of its weights, where they are not the bank's own.
    """

    bytes_per_expert: float | None = None

    @abstractmethod
    def output(self, call: Call) -> Tensor:
        """``[T, D]``."""

    def error(self, call: Call, bank: Bank) -> float:
        """``‖out − ref‖ / ‖ref‖`` on this call; see :func:`moesaic.bench.workload.relative_error`."""
        return relative_error(self.output(call), call, bank)

    def seconds(self, call: Call) -> float:
        """How long one run took."""
        return timed(lambda: self.output(call))

    def cpu_seconds(self) -> float:
        """What it has used so far in processes of its own."""
        return 0.0

    def close(self) -> None:
        """Let go of what garbage collection does not."""
        return


class ModuleContender(Contender):
    """An experts module of transformers, called as a model calls it, without gradients.

    Args:
        implementation: what ``experts_implementation`` says.
        backend: our backend, where the implementation is ``"moesaic"``.
    """

    def __init__(self, shape: Shape, banks: list[Bank], implementation: str, backend: str | None = None) -> None:
        self.modules = [experts_module(shape, bank, implementation) for bank in banks]
        self.backend = backend

    def output(self, call: Call) -> Tensor:
        """``[T, D]``."""
        with self._backend():
            return self._run(call)

    def seconds(self, call: Call) -> float:
        """One forward; setting the backend is not part of it."""
        with self._backend():
            return timed(lambda: self._run(call))

    def _backend(self) -> AbstractContextManager[None]:
        return nullcontext() if self.backend is None else use_backend(self.backend)

    @torch.inference_mode()
    def _run(self, call: Call) -> Tensor:
        out: Tensor = self.modules[call.bank](call.x, call.ids, call.weights)
        return out


class TrainingContender(ModuleContender):
    """The same module's forward and backward: gradients of the features, both matrices and the routing weights."""

    def __init__(self, shape: Shape, banks: list[Bank], implementation: str, backend: str | None = None) -> None:
        super().__init__(shape, banks, implementation, backend)
        for module in self.modules:
            module.requires_grad_()

    def error(self, call: Call, bank: Bank) -> float:
        """Of the gradients, the worst of the four."""
        x, weights = self._leaves(call)
        with self._backend():
            self._forward_and_backward(call, x, weights)
        module = self.modules[call.bank]
        found = [x.grad, weights.grad, module.gate_up_proj.grad, module.down_proj.grad]
        return gradient_error([grad for grad in found if isinstance(grad, Tensor)], call, bank)

    def seconds(self, call: Call) -> float:
        """One forward and backward; the gradients of the run before are let go first."""
        x, weights = self._leaves(call)
        self.modules[call.bank].zero_grad(set_to_none=True)
        with self._backend():
            return timed(lambda: self._forward_and_backward(call, x, weights))

    def _leaves(self, call: Call) -> tuple[Tensor, Tensor]:
        return call.x.detach().requires_grad_(), call.weights.detach().requires_grad_()

    def _forward_and_backward(self, call: Call, x: Tensor, weights: Tensor) -> None:
        out: Tensor = self.modules[call.bank](x, call.ids, weights)
        out.backward(call.x)  # any numbers will do; these are there


class QuantizedContender(ModuleContender):
    """Our implementation on weights of 8 or 4 bits; the reference computes with the values that the codes stand for.

    Only the first experts of the first bank are quantized, and copied to all others: the search for the scales of int4
    takes a minute for all, and the kernels' time does not depend on the codes.
    """

    def __init__(self, shape: Shape, banks: list[Bank], backend: str, format: str) -> None:
        super().__init__(shape, banks, "moesaic", backend)
        few = min(_QUANTIZED_EXPERTS, shape.num_experts)
        pattern = experts_module(replace(shape, num_experts=few, top_k=1), _first(banks[0], few), "moesaic")
        quantized = quantize(pattern, format).state_dict()
        for module in self.modules:
            adopt(module).make_room(QuantFormat.named(format))
            for name, tensor in module.state_dict().items():
                copies = -(-shape.num_experts // few)
                tensor.copy_(quantized[name].repeat(copies, *[1] * (tensor.ndim - 1))[: shape.num_experts])
        tensors = self.modules[0].state_dict().values()
        self.bytes_per_expert = sum(tensor.nbytes for tensor in tensors) / shape.num_experts

    def error(self, call: Call, bank: Bank) -> float:
        """Of the kernel alone, not of the rounding of the weights."""
        up, down = self.modules[call.bank].quantized()  # type: ignore[operator]
        return relative_error(self.output(call), call, Bank(_Dequantized(up), _Dequantized(down)))  # type: ignore[arg-type]


def _first(bank: Bank, experts: int) -> Bank:
    return Bank(bank.up[:experts], bank.down[:experts])


class FrozenContender(ModuleContender):
    """Our implementation after :func:`moesaic.freeze`, on weights of its own: freezing changes the memory of all."""

    def __init__(self, shape: Shape, banks: list[Bank], backend: str) -> None:
        own = [Bank(bank.up.clone(), bank.down.clone()) for bank in banks]
        super().__init__(shape, own, "moesaic", backend)
        for module in self.modules:
            freeze(module)


class _Dequantized:
    """One expert at a time: all of them in floats would take as much memory again as the bank."""

    def __init__(self, matrix: QuantizedMatrix) -> None:
        self.matrix = matrix

    def __getitem__(self, expert: int) -> Tensor:
        m = self.matrix
        one = QuantizedMatrix(m.format, m.codes[expert : expert + 1], m.scale[expert : expert + 1], m.inputs)
        return one.dequantize(torch.float32)[0]


def experts_module(shape: Shape, bank: Bank, implementation: str) -> nn.Module:
    """transformers' experts of OLMoE around the weights of ``bank``; no copy."""
    config = OlmoeConfig(
        hidden_size=shape.d_model,
        intermediate_size=shape.d_ff,
        num_experts=shape.num_experts,
        num_experts_per_tok=shape.top_k,
    )
    config._experts_implementation = implementation
    with torch.device("meta"):
        module: nn.Module = OlmoeExperts(config)
    module.gate_up_proj = nn.Parameter(bank.up, requires_grad=False)
    module.down_proj = nn.Parameter(bank.down, requires_grad=False)
    return module


def make_ours(name: str, shape: Shape, banks: list[Bank], backward: bool) -> Contender:
    """Ours by a name of ``moesaic.bench.field.our_backends``: a backend, or a backend, ``+`` and a variant.

    Raises:
        UnsupportedError: for gradients of a variant.
    """
    backend, _, variant = name.partition("+")
    if not variant:
        return (TrainingContender if backward else ModuleContender)(shape, banks, "moesaic", backend)
    if backward:
        raise UnsupportedError("quantized and frozen experts are not trained")
    if variant == FROZEN:
        return FrozenContender(shape, banks, backend)
    return QuantizedContender(shape, banks, backend, variant)
