"""A way to merge: from one tensor's task vectors to the merged tensor."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from moesaic.convert.merging.vectors import Piece, TaskVectors
from moesaic.errors import ConfigError
from moesaic.registry import Registry
from moesaic.routing.options import check_options, is_of

MERGES: Registry[type[MergeMethod]] = Registry("merge method")


class MergeMethod(ABC):
    """Base of all merge methods: a tensor at a time, through the base's task vectors.

    Every keyword of ``__init__`` is an option, annotated as int, float, bool or str. ``models`` says how many
    fine-tuned models it takes (None: any number from the first on). With ``shares`` the weights are shares of a whole:
    at least 0 and not all 0, and only what they are to each other counts; without it they multiply the task vectors.
    """

    models: ClassVar[tuple[int, int | None]] = (1, None)
    shares: ClassVar[bool] = False

    def learn(self, vectors: TaskVectors, weights: Sequence[float], seed: int) -> Any:
        """What :meth:`merge` must know of the whole tensor before it sees the first piece; by default nothing."""
        return None

    @abstractmethod
    def merge(self, piece: Piece, weights: Sequence[float], learned: Any) -> Tensor:
        """The merged rows, float32 of the shape of ``piece.base``; ``weights`` are one a model."""

    def equal(self, models: int) -> tuple[float, ...]:
        """The weights where none are given: one over the number of models each."""
        return (1 / models,) * models

    def check_weights(self, weights: Sequence[float], models: int, where: str = "weights") -> None:
        """Refuse weights that the method cannot take.

        Raises:
            ConfigError: for another number of them than models, or a value out of range.
        """
        if len(weights) != models:
            raise ConfigError(f"{where} has {len(weights)} numbers for {models} models: it must be one a model")
        if not all(is_of(float, weight) for weight in weights):
            raise ConfigError(f"{where} is {list(weights)}: all must be finite numbers")
        if self.shares and not (min(weights) >= 0 and sum(weights) > 0):
            raise ConfigError(f"{where} is {list(weights)}: shares must be at least 0, and one of them above 0")


def create_merge(name: str, options: Mapping[str, Any], models: int) -> MergeMethod:
    """The merge method registered under ``name``, for this many fine-tuned models.

    Raises:
        ConfigError: for an unknown method or option, an option out of range, or a number of models it does not take.
    """
    kind = MERGES.get(name)
    check_options(f"merge method {name!r}", kind, options)
    method = kind(**options)
    least, most = method.models
    if models < least or (most is not None and models > most):
        allowed = f"{least} or more" if most is None else f"{least} to {most}"
        raise ConfigError(
            f"the merge method {name!r} takes {allowed} fine-tuned models beside their base, not {models}"
        )
    return method


def check_share(name: str, value: float) -> None:
    """Refuse a share that is not above 0 and at most 1.

    Raises:
        ConfigError: with the option's name.
    """
    if not 0 < value <= 1:
        raise ConfigError(f"{name} is {value}: it must be above 0 and at most 1")


def share_of(share: float, size: int) -> int:
    """How many of ``size`` values a share is, rounded up and at least 1."""
    return max(math.ceil(share * size - 1e-6), 1)  # 0.07 · 100 is a little more than 7


def weighted_sum(deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Σ w·τ, in float32."""
    total = deltas[0] * weights[0]
    for delta, weight in zip(deltas[1:], weights[1:], strict=True):
        total.add_(delta, alpha=weight)
    return total
