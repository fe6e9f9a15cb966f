"""transformers' experts modules with quantized weights: the same modules, of a class that stores them otherwise."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moesaic.errors import UnsupportedError
from moesaic.experts.storage import ExpertStorage
from moesaic.hf.experts import experts_forward, is_experts_module, weights_of

# The class that stands in for each experts class; made once, so that modules of one class stay of one class.
_CLASSES: dict[type[nn.Module], type[QuantizedExperts]] = {}


class QuantizedExperts(ExpertStorage):
    """Goes before an experts class of transformers: its gate, norms and flags stay, its storage and forward change."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """``[T, D]`` to ``[T, D]``.

        Raises:
            UnsupportedError: where another experts implementation than ``"moesaic"`` has been set.
        """
        check_implementation(self)
        return experts_forward(self, hidden_states, top_k_index, top_k_weights)

    def matrices(self) -> tuple[str, str]:
        return ("gate_up_proj" if self.gated() else "up_proj"), "down_proj"

    def stored_transposed(self) -> bool:
        return bool(self.is_transposed)

    def gated(self) -> bool:
        return bool(self.has_gate)

    def dequantize(self, dtype: torch.dtype) -> None:
        """The module is of its own class again, and runs with any experts implementation."""
        super().dequantize(dtype)
        self.__class__ = _base(self)  # type: ignore[assignment]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class cannot be found by its name, where it would be looked for.
        return _empty, (_base(self),), self.__dict__


def adopt(module: nn.Module) -> ExpertStorage:
    """``module`` itself, with :class:`QuantizedExperts` before its class.

    Raises:
        UnsupportedError: where it is a variant that we do not know, or its weights are not plain floats.
    """
    weights_of(module)
    module.__class__ = _class(type(module))
    assert isinstance(module, ExpertStorage)
    return module


def expert_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that hold routed experts, ours and those of transformers' experts interface, by their names."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, ExpertStorage) or is_experts_module(module)
    }


def check_implementation(module: nn.Module) -> None:
    """Refuse an experts module of transformers that another implementation than ``"moesaic"`` would run."""
    chosen = getattr(getattr(module, "config", None), "_experts_implementation", "moesaic")
    if chosen != "moesaic":
        raise UnsupportedError(
            f"quantized experts run with experts_implementation='moesaic' only, but the model has {chosen!r}: "
            "call model.set_experts_implementation('moesaic')"
        )


def _class(base: type[nn.Module]) -> type[QuantizedExperts]:
    if base not in _CLASSES:
        _CLASSES[base] = type(f"Quantized{base.__name__}", (QuantizedExperts, base), {"__module__": __name__})
    return _CLASSES[base]


def _base(module: QuantizedExperts) -> type[nn.Module]:
    return type(module).__bases__[1]


def _empty(base: type[nn.Module]) -> nn.Module:
    made = _class(base)
    return made.__new__(made)
