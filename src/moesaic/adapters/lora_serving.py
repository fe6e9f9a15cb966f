"""Many low-rank adapters of one model at once, each token of a batch with its own; the pool's part for LoRA.

Nothing loops over adapters: a linear layer's rows, and an experts module's rows, are dispatched over blocks of rank
(:mod:`moesaic.adapters.lora_blocks`). In a batch without such an adapter nothing is computed, and a token without one
is computed by the kernels that compute it elsewhere.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moesaic.adapters.fingerprint import fingerprint
from moesaic.adapters.lora import LoraPart, Target, find_targets
from moesaic.adapters.lora_blocks import LoraBlocks, Placed
from moesaic.adapters.lora_compute import compute_unfused
from moesaic.adapters.lora_format import read_lora
from moesaic.adapters.lora_modules import check_attachable
from moesaic.dispatch import Dispatch
from moesaic.errors import CheckpointError, ConfigError
from moesaic.experts import ExpertWeights


@dataclass(frozen=True)
class LoraMemory:
    """Bytes of all low-rank parts as they are computed with, and of the memory pages in which they lie."""

    adapter_bytes: int
    committed_bytes: int


@dataclass
class PreparedLora:
    """An adapter in memory that no token uses yet.

    Attributes:
        path: where it came from.
        placed: where its parts lie, by the full name of the parameter.
    """

    path: Path
    placed: dict[str, Placed] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        return sum(placed.bytes for placed in self.placed.values())


class _Batch:
    """Which adapter each token of the running forward pass has; shared by all targets."""

    def __init__(self) -> None:
        self.index_T: Tensor | None = None
        self.present: frozenset[int] = frozenset()
        self._chosen: dict[frozenset[int], Tensor | None] = {}

    def tokens(self, adapters: frozenset[int]) -> Tensor | None:
        """``[T]`` boolean: the tokens of some adapters; None where these are all. Computed once for all layers."""
        here = adapters & self.present
        if here not in self._chosen:
            assert self.index_T is not None
            mask_T = torch.isin(self.index_T, torch.tensor(sorted(here), device=self.index_T.device))
            self._chosen[here] = None if bool(mask_T.all()) else mask_T
        return self._chosen[here]

    @contextmanager
    def using(self, index_T: Tensor, present: frozenset[int]) -> Iterator[None]:
        before = self.index_T, self.present, self._chosen
        self.index_T, self.present, self._chosen = index_T, present, {}
        try:
            yield
        finally:
            self.index_T, self.present, self._chosen = before


class _LinearParts:
    """A linear layer's forward hook; ``[..., I]`` to ``[..., O]``, the tokens in the batch's order."""

    def __init__(self, blocks: LoraBlocks, batch: _Batch) -> None:
        self._blocks, self._batch = blocks, batch
        self._handle = blocks.target.module.register_forward_hook(self)

    def remove(self) -> None:
        self._handle.remove()

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        batch, index_T = self._batch, self._batch.index_T
        if index_T is None or not batch.present & self._blocks.adapters:
            return output
        x_TI, out_TO = inputs[0].flatten(0, -2), output.flatten(0, -2)
        if len(x_TI) != len(index_T):
            raise ConfigError(
                f"{len(index_T)} tokens have an adapter index, but {self._blocks.target.path} got {len(x_TI)} tokens"
            )
        index_T, mask_T = index_T.to(x_TI.device), batch.tokens(self._blocks.adapters)
        if mask_T is None:
            return self._blocks.add(out_TO, x_TI, index_T).view(output.shape)
        rows = mask_T.to(x_TI.device).nonzero()[:, 0]
        added = self._blocks.add(out_TO[rows], x_TI[rows], index_T[rows])
        return out_TO.index_copy(0, rows, added).view(output.shape)

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy of a model, or one that is saved whole, has no adapters.
        return partial, (_nothing,)


def _nothing(*_: object) -> None:
    """A forward hook that changes nothing."""


class _ExpertsParts:
    """What an experts module's ``low_rank`` is: a :class:`moesaic.experts.low_rank.LowRank`."""

    def __init__(self, module: nn.Module, up: str, batch: _Batch) -> None:
        self.blocks: dict[str, LoraBlocks] = {}
        self._module, self._up, self._batch = module, up, batch
        module.low_rank = self  # type: ignore[assignment]

    def remove(self) -> None:
        del self._module.low_rank

    @property
    def active(self) -> bool:
        return bool(self._batch.present & self._adapters())

    @property
    def tokens(self) -> Tensor | None:
        return self._batch.tokens(self._adapters())

    def compute(self, x_TD: Tensor, dispatch: Dispatch, weights: ExpertWeights) -> Tensor:
        assert self._batch.index_T is not None
        if len(self._batch.index_T) != len(x_TD):
            raise ConfigError(
                f"{len(self._batch.index_T)} tokens have an adapter index, but the layer got {len(x_TD)} tokens"
            )
        return compute_unfused(x_TD, dispatch, weights, self)

    def add_up(self, h_NG: Tensor, x_ND: Tensor, dispatch: Dispatch) -> Tensor:
        return self._add(h_NG, x_ND, dispatch, is_up=True)

    def add_down(self, y_ND: Tensor, h_NF: Tensor, dispatch: Dispatch) -> Tensor:
        return self._add(y_ND, h_NF, dispatch, is_up=False)

    def _add(self, out_NO: Tensor, x_NI: Tensor, dispatch: Dispatch, is_up: bool) -> Tensor:
        blocks = next((each for name, each in self.blocks.items() if (name == self._up) == is_up), None)
        if blocks is None:
            return out_NO
        assert self._batch.index_T is not None
        # Without padding rows, as serving's dispatches are. The token of an adapter keeps the base's expert ids.
        adapter_N = self._batch.index_T.to(x_NI.device)[dispatch.permutation // dispatch.top_k]
        return blocks.add(out_NO, x_NI, adapter_N, dispatch.expert_of_row())

    def _adapters(self) -> frozenset[int]:
        return frozenset().union(*(blocks.adapters for blocks in self.blocks.values()))

    def __reduce__(self) -> tuple[Any, ...]:
        return _nothing, ()  # as a hook's copy: None is what a module without adapters has


class LoraParts:
    """The low-rank adapters of one model, of any ranks, by the indices that an ``AdapterPool`` gives them.

    Preparing may happen in any thread while the model computes; publishing and unloading belong between two forward
    passes. The sums of a row do not depend on the other rows, but PyTorch's matmuls may round them otherwise where
    there are other rows; under :func:`moesaic.experts.row_invariance.row_invariant` no bit changes.

    Args:
        base_fingerprint: of the model; computed when it is first needed if it is not given.
    """

    def __init__(self, model: nn.Module, base_fingerprint: str | None = None) -> None:
        self._model, self._fingerprint = model, base_fingerprint
        self._targets = find_targets(model)
        self._batch, self._lock = _Batch(), threading.RLock()
        self._blocks: dict[str, LoraBlocks] = {}
        self._hooks: dict[str, _LinearParts | _ExpertsParts] = {}
        self._published: dict[int, PreparedLora] = {}
        self._pending: list[PreparedLora] = []

    def prepare(self, path: str | Path) -> PreparedLora:
        """Read an adapter in PEFT's format, check it, and put its parts where nothing refers to them.

        Raises:
            CheckpointError: where it is damaged, belongs to another base, or has parts that cannot be served.
            ConfigError, UnsupportedError: where the model has an adapter attached, or experts run by transformers.
            UsageError: where there is no room for it.
        """
        self._fingerprint = self._fingerprint or fingerprint(self._model)
        adapter = read_lora(path, self._model, self._fingerprint)
        for name in adapter.parts:
            self._check(path, self._targets[name])
        prepared = PreparedLora(Path(path))
        with self._lock:
            self._pending.append(prepared)
        try:
            for name, part in adapter.parts.items():
                trained = _trained(part)
                if trained is not None:
                    with self._lock:
                        prepared.placed[name] = self._blocks_of(name).put(trained)
        except BaseException:
            self.discard(prepared)
            raise
        return prepared

    def publish(self, index: int, prepared: PreparedLora) -> None:
        """Let the tokens with this index have the adapter's parts; between two forward passes."""
        with self._lock:
            self._pending.remove(prepared)
            self._published[index] = prepared
            for name, placed in prepared.placed.items():
                self._blocks[name].publish(index, placed)
                self._hook(name)

    def discard(self, prepared: PreparedLora) -> None:
        """Give up an adapter that has not been published; in any thread."""
        with self._lock:
            if prepared not in self._pending:
                return
            self._pending.remove(prepared)
            for name, placed in prepared.placed.items():
                self._blocks[name].release(placed)

    def unload(self, index: int) -> None:
        """Remove a published adapter that no token uses any more; its memory goes back to the system."""
        with self._lock:
            prepared = self._published.pop(index)
            for name in prepared.placed:
                blocks = self._blocks[name]
                blocks.release(blocks.withdraw(index))
                if not blocks.adapters:
                    self._unhook(name)

    @contextmanager
    def using(self, adapter_of_token_T: Tensor | None) -> Iterator[None]:
        """For one forward pass.

        Args:
            adapter_of_token_T: ``[T]`` int64, the index of each token's adapter, in the order of the flattened tokens;
                indices that are not of a low-rank adapter mean none. None: none for all.
        """
        present: frozenset[int] = frozenset()
        if adapter_of_token_T is not None and self._published:
            present = frozenset(self._published.keys() & set(adapter_of_token_T.unique().tolist()))
        if adapter_of_token_T is None or not present:
            yield
            return
        with self._batch.using(adapter_of_token_T, present):
            yield

    def memory(self) -> LoraMemory:
        """What is held now; adapters that are being prepared count."""
        with self._lock:
            adapters = [*self._published.values(), *self._pending]
            return LoraMemory(
                sum(adapter.bytes for adapter in adapters), sum(blocks.committed for blocks in self._blocks.values())
            )

    def close(self) -> None:
        """Remove every adapter and every hook: the model is what it was."""
        with self._lock:
            for prepared in list(self._pending):
                self.discard(prepared)
            for index in list(self._published):
                self.unload(index)
            self._blocks = {}

    def _check(self, path: str | Path, target: Target) -> None:
        head = getattr(self._model, "get_output_embeddings", lambda: None)()
        if target.module is head or re.search(r"\bexperts\.\d+\.", target.path):
            raise CheckpointError(
                f"the adapter in {str(path)!r} cannot be served: {target.path} does not get every token, so its part "
                "can be merged or attached only"
            )
        if target.path not in self._hooks:
            check_attachable(target)

    def _blocks_of(self, name: str) -> LoraBlocks:
        if name not in self._blocks:
            target = self._targets[name]
            # Codes of quantized weights say nothing of the dtype that is computed in.
            floats = (each for each in (*target.module.parameters(), *self._model.parameters()))
            dtype = next(each.dtype for each in floats if each.is_floating_point())
            self._blocks[name] = LoraBlocks(target, dtype, target.device)
        return self._blocks[name]

    def _hook(self, name: str) -> None:
        target, blocks = self._targets[name], self._blocks[name]
        if target.num_experts is None:
            if target.path not in self._hooks:
                self._hooks[target.path] = _LinearParts(blocks, self._batch)
            return
        if target.path not in self._hooks:
            up = next(each.parameter for each in self._targets.values() if each.path == target.path)
            self._hooks[target.path] = _ExpertsParts(target.module, up, self._batch)
        parts = self._hooks[target.path]
        assert isinstance(parts, _ExpertsParts)
        parts.blocks[target.parameter] = blocks

    def _unhook(self, name: str) -> None:
        target = self._targets[name]
        parts = self._hooks[target.path]
        if isinstance(parts, _ExpertsParts):
            del parts.blocks[target.parameter]
            if parts.blocks:
                return
        parts.remove()
        del self._hooks[target.path]


def _trained(part: LoraPart) -> LoraPart | None:
    """The part without experts whose B is zero, as those that were never routed to are; None where nothing is left."""
    if part.experts is None:
        return part
    kept = part.b.flatten(1).any(dim=1).nonzero()[:, 0].tolist()
    experts = tuple(part.experts[place] for place in kept)
    return LoraPart(part.a[kept], part.b[kept], part.scaling, experts) if kept else None
