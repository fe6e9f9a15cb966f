"""Which code computes the experts: the registry of backends, the choice, and the one entrance."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from types import TracebackType

import torch
from torch import Tensor

from moesaic.dispatch import Dispatch
from moesaic.errors import ConfigError, UnsupportedError, did_you_mean
from moesaic.experts.choice import Choice
from moesaic.experts.low_rank import LowRank, split
from moesaic.experts.row_invariance import is_row_invariant
from moesaic.experts.weights import ExpertWeights
from moesaic.registry import Registry

BACKENDS: Registry[Backend] = Registry("backend")
AUTO = "auto"
Tuned = Callable[[Tensor, Dispatch, ExpertWeights], tuple[Tensor, Choice]]


class Backend(ABC):
    """One way to compute the experts; all give the same numbers.

    ``preference`` orders what ``"auto"`` tries where no timings can be had, the highest first; the reference, which
    computes everything, has 0.
    """

    preference: int

    def missing(self) -> str | None:
        """Why this backend cannot run on this machine at all, or None."""
        return None

    def refusal(self, x_TD: Tensor, weights: ExpertWeights) -> str | None:
        """Why this backend cannot run this call, or None. Must not depend on the values of a tensor."""
        return self.missing()

    @abstractmethod
    def run(self, x_TD: Tensor, dispatch: Dispatch, weights: ExpertWeights) -> Tensor:
        """``[T, D]`` to ``[T, D]``: gather, up, activation, down, weighted combine; ``x`` and weights share a dtype."""


class _Choice:
    """The process-wide choice. Not a context variable: a recomputed forward runs in autograd's own threads."""

    name: str = AUTO
    tuned: Tuned | None = None


def tune_with(tuned: Tuned | None) -> Tuned | None:
    """Let ``tuned`` compute the calls of ``"auto"`` that are not being compiled; returns what did so before.

    With None, or while compiling, the backends' preference decides.
    """
    before, _Choice.tuned = _Choice.tuned, tuned
    return before


def current_backend() -> str:
    """The name that :class:`use_backend` set last; ``"auto"`` at first."""
    return _Choice.name


class use_backend:  # noqa: N801  (it reads as a verb, like torch.no_grad)
    """Choose the backend of all following calls; used as a context manager, the earlier choice comes back.

    Args:
        name: ``"auto"`` or one of ``moesaic.experts.available()``.

    Raises:
        ConfigError: for an unknown name, or a backend that cannot run on this machine (with the reason).
    """

    def __init__(self, name: str) -> None:
        if name != AUTO:
            if name not in BACKENDS:
                raise ConfigError(f"unknown backend {name!r}: {did_you_mean(name, [AUTO, *BACKENDS])}")
            reason = BACKENDS.get(name).missing()
            if reason:
                raise ConfigError(f"the backend {name!r} cannot be used here: {reason}")
        self.name = name
        # The choice holds from here on, without a with block too; entering one only remembers what to go back to.
        self._before = [_Choice.name]
        self._entered = 0
        _Choice.name = name

    def __enter__(self) -> None:
        if self._entered:
            self._before.append(_Choice.name)
            _Choice.name = self.name
        self._entered += 1

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        _Choice.name = self._before.pop()


def status() -> dict[str, str | None]:
    """Every registered backend with the reason why it cannot run here, or None."""
    return {name: BACKENDS.get(name).missing() for name in BACKENDS}


def available() -> list[str]:
    """Names of the backends that can run on this machine."""
    return [name for name, reason in status().items() if reason is None]


def compute(x_TD: Tensor, dispatch: Dispatch, weights: ExpertWeights) -> Tensor:
    """The experts' weighted sum for every token, by the chosen backend.

    Args:
        x_TD: ``[T, D]`` floating point. Under autocast it and the weights are cast to autocast's dtype.
        dispatch: of a routing of these T tokens over the E experts of ``weights``.

    Returns:
        ``[T, D]`` in the dtype computed in.

    Raises:
        ConfigError: where shapes or dtypes do not go together.
        UnsupportedError: where the backend that was asked for by name cannot run this call.
    """
    return compute_and_tell(x_TD, dispatch, weights)[0]


def compute_and_tell(x_TD: Tensor, dispatch: Dispatch, weights: ExpertWeights) -> tuple[Tensor, Choice]:
    """:func:`compute`, and which backend did it: that of the tokens without a low-rank part, if there are any."""
    device = x_TD.device.type
    if device != "meta" and torch.is_autocast_enabled(device):  # the meta device knows no autocast
        dtype = torch.get_autocast_dtype(device)
        x_TD, weights = x_TD.to(dtype), weights.to(dtype)
    _check(x_TD, dispatch, weights)
    if weights.low_rank is not None:
        return _compute_low_rank(x_TD, dispatch, weights, weights.low_rank)
    if is_row_invariant():
        name = "loop" if BACKENDS.get("native").refusal(x_TD, weights) else "native"
        return BACKENDS.get(name).run(x_TD, dispatch, weights), Choice(name, "row-invariant")
    name = _Choice.name
    if name != AUTO:
        return _fixed(name, x_TD, weights).run(x_TD, dispatch, weights), Choice(name, "fixed")
    # What is traced, or has no values, has no time either; and what a compiled program does must not change later.
    if not torch.compiler.is_compiling() and device != "meta" and _Choice.tuned is not None:
        return _Choice.tuned(x_TD, dispatch, weights)
    name = preferred(x_TD, weights)
    return BACKENDS.get(name).run(x_TD, dispatch, weights), Choice(name, "rule")


def _compute_low_rank(
    x_TD: Tensor, dispatch: Dispatch, weights: ExpertWeights, low_rank: LowRank
) -> tuple[Tensor, Choice]:
    tokens_T = low_rank.tokens
    if tokens_T is None:
        return low_rank.compute(x_TD, dispatch, weights), Choice("low-rank", "only")
    tokens_T = tokens_T.to(x_TD.device)
    # A token without a part is computed as if nobody beside it had one: by the same kernel, to the same bits.
    with_parts, others = split(dispatch, tokens_T)
    adapted_TD = low_rank.compute(x_TD, with_parts, weights)
    y_TD, choice = compute_and_tell(x_TD, others, replace(weights, low_rank=None))
    return torch.where(tokens_T.unsqueeze(1), adapted_TD, y_TD), choice


def preferred(x_TD: Tensor, weights: ExpertWeights, backends: Registry[Backend] = BACKENDS) -> str:
    """The backend with the highest preference among those that can run this call.

    Raises:
        UnsupportedError: where none can, with the reason of each.
    """
    reasons = []
    for name in sorted(backends.names(), key=lambda name: -backends.get(name).preference):
        reason = backends.get(name).refusal(x_TD, weights)
        if reason is None:
            return name
        reasons.append(f"{name}: {reason}")
    raise UnsupportedError(f"no backend can run this call: {'; '.join(reasons) or 'there are none'}")


def _fixed(name: str, x_TD: Tensor, weights: ExpertWeights) -> Backend:
    backend = BACKENDS.get(name)
    reason = backend.refusal(x_TD, weights)
    if reason:
        raise UnsupportedError(f"the backend {name!r} cannot run this call: {reason}")
    return backend


def _check(x_TD: Tensor, dispatch: Dispatch, weights: ExpertWeights) -> None:
    width = weights.d_model
    if x_TD.ndim != 2 or x_TD.shape[1] != width:
        raise ConfigError(f"the experts take features of shape [tokens, {width}], got {list(x_TD.shape)}")
    for name, tensor in weights.tensors().items():
        if x_TD.dtype != tensor.dtype:
            raise ConfigError(
                f"features are {x_TD.dtype} but the expert weights are {tensor.dtype} ({name}): they must be alike"
            )
    for name, scale in {"up_scale": weights.up_scale, "down_scale": weights.down_scale}.items():
        if scale is not None and scale.requires_grad:
            raise UnsupportedError(f"quantized expert weights cannot be trained, but {name} requires a gradient")
    if x_TD.shape[0] != dispatch.num_tokens or weights.num_experts != dispatch.num_experts:
        raise ConfigError(
            f"the routing is for {dispatch.num_tokens} tokens and {dispatch.num_experts} experts, "
            f"but there are {x_TD.shape[0]} tokens and {weights.num_experts} experts"
        )
