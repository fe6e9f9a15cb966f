"""The experts implementation ``"moesaic"``: any transformers MoE on our dispatch and backends.

transformers hands an experts module, the tokens, and what the model's own router chose; its variants (gated or not,
biased, transposed, interleaved, custom gates, post-expert norms, expert-parallel sentinels) become one
:class:`ExpertWeights`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers.activations import GELUActivation, GELUTanh, SiLUActivation
from transformers.integrations.moe import _default_apply_gate

from moesaic import autotune  # noqa: F401  (makes "auto" tuned)
from moesaic.dispatch import Dispatch
from moesaic.errors import UnsupportedError
from moesaic.experts import ACTIVATIONS, Activation, ExpertBank, ExpertWeights, compute_and_tell
from moesaic.experts.low_rank import low_rank_of
from moesaic.experts.slots import ExpertSlots
from moesaic.experts.storage import ExpertStorage

_FLAGS = ("has_gate", "has_bias", "is_transposed", "is_concatenated")


def is_experts_module(module: nn.Module) -> bool:
    """Whether a module takes part in transformers' experts interface."""
    return all(hasattr(module, flag) for flag in _FLAGS)


def experts_forward(module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """``[T, D]`` to ``[T, D]`` for a module of transformers' experts interface.

    The module's ``last_choice`` is then the :class:`moesaic.experts.Choice` of this call, ``last_counts`` the rows per
    expert. Where an :class:`moesaic.adapters.AdapterPool` has put ``slots`` there, each token's experts are those of
    its adapter. After :func:`moesaic.parallelize` all ranks call it together, each with its own tokens;
    ``last_decision`` is then how it was carried out, and ``last_counts`` are the slots of this rank's tokens.

    Args:
        top_k_index: ``[T, K]`` integer; ids from the number of experts on are null slots (expert parallelism's
            sentinels).
        top_k_weights: ``[T, K]``.

    Raises:
        UnsupportedError: where the module is a variant that we do not know; the message names it.
    """
    ids_TK = top_k_index.long()
    # Past the modules' own look-up, which takes its time over what is not there.
    if module.__dict__.get("parallel") is not None:
        from moesaic.parallel.sharding import forward_sharded  # its imports take a while

        return forward_sharded(module, hidden_states, ids_TK, top_k_weights).to(hidden_states.dtype)
    slots: ExpertSlots | None = module.__dict__.get("slots")
    if slots is None or slots.is_idle:
        weights = weights_of(module)
    else:
        weights, ids_TK = slots.weights_with(low_rank_of(module)), slots.reroute(ids_TK)
    dispatch = Dispatch.from_slots(ids_TK, top_k_weights, weights.num_experts)
    y_TD, choice = compute_and_tell(hidden_states, dispatch, weights)
    module.last_choice = choice  # type: ignore[assignment]
    if not torch.compiler.is_compiling():
        module.last_counts = dispatch.counts
    return y_TD.to(hidden_states.dtype)


def weights_of(module: nn.Module) -> ExpertWeights:
    """The module's parameters as a backend takes them; no copy.

    Raises:
        UnsupportedError: for a variant that we do not know.
    """
    gated, biased = bool(_flag(module, "has_gate")), bool(_flag(module, "has_bias"))
    up = "gate_up_proj" if gated else "up_proj"
    return ExpertWeights(
        **_matrices(module, up),
        activation=_activation(module, gated),
        up_bias=_parameter(module, f"{up}_bias") if biased else None,
        down_bias=_parameter(module, "down_proj_bias") if biased else None,
        # transformers before 5.18 has no such flag
        post_norm=_own(module, "post_expert_norm") if getattr(module, "has_post_expert_norm", False) else None,
        low_rank=low_rank_of(module),
    )


def parameter_names(module: nn.Module) -> dict[str, str]:
    """The tensors of the module's :class:`ExpertWeights` by the names of the module's parameters, as in
    ``{"up": "gate_up_proj", "down": "down_proj"}``."""
    return stored_experts(module)[1]


def stored_experts(module: nn.Module) -> tuple[ExpertWeights, dict[str, str], bool]:
    """Weights, :func:`parameter_names`, and whether the columns of gate and up projection take turns (gpt-oss).

    Raises:
        UnsupportedError: for a variant that we do not know.
    """
    names = {id(parameter): name for name, parameter in module.named_parameters(recurse=False)}
    if isinstance(module, ExpertBank):
        weights, interleaved = module.weights(), False
    else:
        weights = weights_of(module)
        interleaved = weights.activation.gated and not _flag(module, "is_concatenated")
    return weights, {field: names[id(tensor)] for field, tensor in weights.tensors().items()}, interleaved


def _matrices(module: nn.Module, up: str) -> dict[str, Any]:
    if isinstance(module, ExpertStorage) and module.format is not None:
        ups, downs = module.quantized()
        scales = {"up_scale": ups.scale, "down_scale": downs.scale}
        return {"up": ups.codes, "down": downs.codes, "format": module.format, **scales}
    transposed = bool(_flag(module, "is_transposed"))
    return {"up": _parameter(module, up), "down": _parameter(module, "down_proj"), "transposed": transposed}


def _flag(module: nn.Module, name: str) -> object:
    if not hasattr(module, name):
        raise _unsupported(module, f"it has no {name!r}, so it does not follow the experts interface that we know")
    return getattr(module, name)


def _parameter(module: nn.Module, name: str) -> Tensor:
    value = getattr(module, name, None)
    if not isinstance(value, Tensor):
        raise _unsupported(module, f"it has no tensor {name!r} (quantized or custom storage)")
    wrapper: bool = is_traceable_wrapper_subclass(value)
    if wrapper:
        raise _unsupported(module, f"{name} is a {type(value).__name__} (quantized or distributed storage)")
    if not value.dtype.is_floating_point or value.dtype.itemsize < 2:
        raise _unsupported(module, f"{name} is stored as {value.dtype}; float32, bfloat16 and float16 are supported")
    return value


# transformers' activation classes that are one of ours: (as a plain activation, as the gate of a gated one).
_NAMES: dict[type, tuple[str | None, str | None]] = {
    SiLUActivation: (None, "swiglu"),
    nn.SiLU: (None, "swiglu"),
    GELUActivation: ("gelu", "geglu"),
    GELUTanh: ("gelu_tanh", "geglu_tanh"),
    nn.ReLU: ("relu", None),
}


def _activation(module: nn.Module, gated: bool) -> Activation:
    """The named activation where we can tell that it is one (a kernel may fuse it), else the module's own code."""
    plain, gate = _NAMES.get(type(getattr(module, "act_fn", None)), (None, None))
    if not gated:
        return ACTIVATIONS.get(plain) if plain else Activation("custom", False, _own(module, "act_fn"))
    # Asked of the instance: a gate of its own may have been put there.
    default_gate = getattr(getattr(module, "_apply_gate", None), "__func__", None) is _default_apply_gate
    if default_gate and not _flag(module, "is_concatenated"):
        raise _unsupported(module, "gate and up are interleaved, but it has no _apply_gate of its own to part them")
    return ACTIVATIONS.get(gate) if gate and default_gate else Activation("custom", True, _own(module, "_apply_gate"))


def _own(module: nn.Module, name: str) -> Callable[[Tensor], Tensor]:
    function = getattr(module, name, None)
    if not callable(function):
        raise _unsupported(module, f"it has no callable {name!r}")
    return function  # type: ignore[no-any-return]


def _unsupported(module: nn.Module, reason: str) -> UnsupportedError:
    return UnsupportedError(f"experts_implementation='moesaic' cannot run {type(module).__name__}: {reason}")
