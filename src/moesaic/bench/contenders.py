"""Ours under each backend and transformers' own implementations, on one experts module of transformers."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from transformers import OlmoeConfig
from transformers.models.olmoe.modeling_olmoe import OlmoeExperts

from moesaic.bench.shapes import Shape
from moesaic.bench.timing import timed
from moesaic.bench.workload import Bank, Call, relative_error
from moesaic.experts import use_backend


class Contender(ABC):
    """Computes the experts of one call."""

    @abstractmethod
    def output(self, call: Call) -> Tensor:
        """``[T, D]``."""

    def error(self, call: Call, bank: Bank) -> float:
        """``‖out − ref‖ / ‖ref‖`` on this call; see :func:`moesaic.bench.workload.relative_error`."""
        return relative_error(self.output(call), call, bank)

    def seconds(self, call: Call) -> float:
        """How long one run took."""
        return timed(lambda: self.output(call))

    def close(self) -> None:
        """Let go of what garbage collection does not."""
        return


class ModuleContender(Contender):
    """An experts module of transformers, called as a model calls it.

    Args:
        implementation: what ``experts_implementation`` says.
        backend: our backend, where the implementation is ``"moesaic"``.
    """

    def __init__(self, shape: Shape, banks: list[Bank], implementation: str, backend: str | None = None) -> None:
        self.modules = [experts_module(shape, bank, implementation) for bank in banks]
        self.backend = backend

    def output(self, call: Call) -> Tensor:
        """``[T, D]``."""
        if self.backend is None:
            return self._run(call)
        with use_backend(self.backend):
            return self._run(call)

    def seconds(self, call: Call) -> float:
        """One forward, without gradients; setting the backend is not part of it."""
        if self.backend is None:
            return timed(lambda: self._run(call))
        with use_backend(self.backend):
            return timed(lambda: self._run(call))

    @torch.inference_mode()
    def _run(self, call: Call) -> Tensor:
        out: Tensor = self.modules[call.bank](call.x, call.ids, call.weights)
        return out


def experts_module(shape: Shape, bank: Bank, implementation: str) -> nn.Module:
    """transformers' experts of OLMoE around the weights of ``bank``; no copy."""
    import moesaic.hf  # noqa: F401  (registers the implementation "moesaic")

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
