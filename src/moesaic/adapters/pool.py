"""Many adapters of one model in memory at once, and each token of a batch computed with its own.

Preparing an adapter reads and checks it and fills slots that nothing refers to, in any thread; publishing it is one
table write per layer, between two forward passes. So running requests are neither kept waiting nor changed.
"""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from moesaic import hardware
from moesaic.adapters.fingerprint import fingerprint
from moesaic.adapters.folder import ExpertAdapter, adapter_folder, read_adapter
from moesaic.adapters.lora_format import is_lora
from moesaic.adapters.lora_serving import LoraParts, PreparedLora
from moesaic.errors import CheckpointError, ConfigError, UnsupportedError, UsageError, did_you_mean
from moesaic.experts import ExpertBank, ExpertWeights
from moesaic.experts.slots import BatchAdapters, ExpertSlots
from moesaic.hf.experts import parameter_names, weights_of
from moesaic.hf.quantized import expert_modules

_MOST = 1_000_000
_NAME = re.compile(r"\w[\w.-]*")


@dataclass(frozen=True)
class PoolMemory:
    """What a pool holds, in bytes, and in slots of each layer.

    Attributes:
        base_bytes: of the base's experts. adapter_bytes: of all adapters' experts and low-rank parts.
        committed_bytes: of the memory pages in which these lie.
        slots_used, slots_total: of each layer, beyond the base's experts.
    """

    base_bytes: int
    adapter_bytes: int
    committed_bytes: int
    slots_used: list[int]
    slots_total: list[int]


@dataclass
class Prepared:
    """An adapter in memory that no token uses yet: to be published, or discarded.

    Attributes:
        index: what it will have. slots: by layer, its experts' ids and where they lie.
    """

    name: str
    path: Path
    index: int
    slots: dict[str, tuple[list[int], list[int]]] = field(default_factory=dict)
    lora: PreparedLora | None = None


@dataclass(frozen=True)
class _Layer:
    module: nn.Module
    slots: ExpertSlots
    names: dict[str, str]  # of the tensors of its weights, by the names of the module's parameters


class AdapterPool:
    """The adapters of one model: ESFT adapters as expert slots, LoRA ones as low-rank parts.

    The model's expert weights move into address ranges, where they stay its parameters; alone it computes what it did,
    and a copy of it has no adapters. Convert, move and freeze a model before. It is for inference: no gradient reaches
    the experts' weights in a forward pass with an adapter's experts. ``prepare`` and ``discard`` may be called
    in any thread; all else belongs between two forward passes, in the thread that makes them.

    Args:
        model: ours, or one of transformers that runs with ``experts_implementation="moesaic"``; a dense one can have
            LoRA adapters.
        max_slots: room for adapters' experts in each layer; None: as much as the adapters or the device's memory could
            ever fill. It costs addresses, not memory.
        max_adapters: at once.

    Raises:
        ConfigError: for numbers out of range.
        UnsupportedError: for quantized experts, another experts implementation, or weights on an unusual device.
        UsageError: where the room cannot be reserved.
    """

    def __init__(self, model: nn.Module, *, max_slots: int | None = None, max_adapters: int = 64) -> None:
        if not 1 <= max_adapters <= _MOST:
            raise ConfigError(f"max_adapters is {max_adapters}: it must be in 1 ... {_MOST}")
        if max_slots is not None and not 0 <= max_slots <= _MOST:
            raise ConfigError(f"max_slots is {max_slots}: it must be in 0 ... {_MOST}, or None")
        self.model, self.max_adapters = model, max_adapters
        self._fingerprint = fingerprint(model)
        self._batch = BatchAdapters()
        self._lock = threading.RLock()
        self._pending: dict[str, Prepared] = {}
        # By index, whether an adapter is published there; the base always is.
        self._is_there = np.arange(max_adapters + 1) == 0
        self._loaded: dict[str, Prepared] = {}
        self._lora: LoraParts | None = None
        self._is_closed = False
        self._layers: dict[str, _Layer] = {}
        # All of them first: what cannot be served is refused before anything has been changed.
        found = {name: (module, _servable(name, module)) for name, module in expert_modules(model).items()}
        try:
            for name, (module, weights) in found.items():
                names = {parameter: tensor for tensor, parameter in parameter_names(module).items()}
                room = _room(weights, max_adapters) if max_slots is None else max_slots
                slots = ExpertSlots(weights, room, max_adapters, self._batch)
                self._layers[name] = _Layer(module, slots, names)
                module.slots = slots  # type: ignore[assignment]
        except UsageError:
            self.close()
            raise

    def prepare(self, name: str, path: str | Path) -> Prepared:
        """Read an adapter into free slots; running requests do not notice. In any thread.

        Args:
            path: a folder of an adapter, ESFT's or PEFT's, or of the run that made it.

        Raises:
            UsageError: for a name that is not made of letters, digits, ``_``, ``.`` and ``-``, or is taken; where there
                is no room for another adapter or its experts.
            CheckpointError: where the adapter is damaged, or belongs to another base model.
        """
        prepared = self._claim(name, Path(path))
        try:
            folder = adapter_folder(path)
            if is_lora(folder):
                prepared.lora = self._low_rank().prepare(folder)
            else:
                self._fill(prepared, read_adapter(folder))
        except BaseException as error:
            self.discard(prepared)
            if self._is_closed and isinstance(error, Exception):
                raise UsageError("the pool of adapters was closed while it read one") from error
            raise
        return prepared

    def publish(self, prepared: Prepared) -> int:
        """Let forward passes use a prepared adapter; returns its index, from 1 on."""
        with self._lock:
            if self._pending.get(prepared.name) is not prepared:
                raise UsageError(f"the adapter {prepared.name!r} has been published or discarded already")
            for name, (experts, slots) in prepared.slots.items():
                self._layers[name].slots.publish(prepared.index, experts, slots)
            if prepared.lora is not None:
                assert self._lora is not None
                self._lora.publish(prepared.index, prepared.lora)
            self._loaded[prepared.name] = self._pending.pop(prepared.name)
            self._is_there[prepared.index] = True
        return prepared.index

    def discard(self, prepared: Prepared) -> None:
        """Give up a prepared adapter that has not been published; else nothing is done. In any thread."""
        with self._lock:
            if self._pending.get(prepared.name) is not prepared:
                return
            del self._pending[prepared.name]
            for name, (_, slots) in prepared.slots.items():
                self._layers[name].slots.release(slots)
            if prepared.lora is not None and self._lora is not None:
                self._lora.discard(prepared.lora)

    def load(self, name: str, path: str | Path) -> int:
        """:meth:`prepare` and :meth:`publish` in one."""
        return self.publish(self.prepare(name, path))

    def unload(self, name: str) -> None:
        """Remove an adapter that no token uses any more; its memory goes back to the system.

        Raises:
            UsageError: for an unknown name.
        """
        index = self.index(name)
        with self._lock:
            adapter = self._loaded.pop(name)
            self._is_there[index] = False
            for layer in adapter.slots:
                slots = self._layers[layer].slots
                slots.release(slots.withdraw(index))
            if adapter.lora is not None and self._lora is not None:
                self._lora.unload(index)

    def index(self, name: str | None) -> int:
        """What stands for an adapter in :meth:`using`; 0 for None, the base.

        Raises:
            UsageError: for an unknown name, with the known ones.
        """
        if name is None:
            return 0
        if name not in self._loaded:
            raise UsageError(f"there is no adapter {name!r}: {did_you_mean(name, self.names())}")
        return self._loaded[name].index

    def names(self) -> list[str]:
        """Of the published adapters, in the order in which they came."""
        return list(self._loaded)

    @contextmanager
    def using(self, adapter_of_token_T: Tensor | None) -> Iterator[None]:
        """For one forward pass: which adapter computes which token.

        Args:
            adapter_of_token_T: ``[T]`` int64 indices, 0 for the base, in the order of the flattened tokens; None: the
                base for all.

        Raises:
            ConfigError: for a tensor of another shape or dtype, or with an index that is not there.
        """
        if adapter_of_token_T is not None:
            self._check_indices(adapter_of_token_T)
        low_rank = contextlib.nullcontext() if self._lora is None else self._lora.using(adapter_of_token_T)
        with self._batch.using(adapter_of_token_T), low_rank:
            yield

    def memory(self) -> PoolMemory:
        """What is held now; adapters that are being prepared count."""
        layers = [layer.slots for layer in self._layers.values()]
        lora = None if self._lora is None else self._lora.memory()
        return PoolMemory(
            base_bytes=sum(slots.num_experts * slots.row_bytes for slots in layers),
            adapter_bytes=sum(slots.used * slots.row_bytes for slots in layers) + (lora.adapter_bytes if lora else 0),
            committed_bytes=sum(slots.committed for slots in layers) + (lora.committed_bytes if lora else 0),
            slots_used=[slots.used for slots in layers],
            slots_total=[slots.total - slots.num_experts for slots in layers],
        )

    def close(self) -> None:
        """Unload everything, and give the model's parameters plain memory again; the pool cannot be used any more."""
        with self._lock:
            for adapter in list(self._pending.values()):
                self.discard(adapter)
            for name in self.names():
                self.unload(name)
            if self._lora is not None:
                self._lora.close()
                self._lora = None
            for layer in self._layers.values():
                layer.module.slots = None  # type: ignore[assignment]
                layer.slots.close()
            self._layers = {}
            self._is_closed = True

    def _claim(self, name: str, path: Path) -> Prepared:
        """A name and an index that are taken from now on."""
        if not _NAME.fullmatch(name):
            raise UsageError(f"an adapter's name is made of letters, digits, '_', '.' and '-': {name!r} is not")
        with self._lock:
            if self._is_closed:
                raise UsageError("the pool of adapters has been closed")
            if name in self._loaded or name in self._pending:
                raise UsageError(f"there is an adapter {name!r} already: unload it first, or take another name")
            taken = {adapter.index for adapter in (*self._loaded.values(), *self._pending.values())}
            if len(taken) >= self.max_adapters:
                raise UsageError(f"there are {len(taken)} adapters, and room for {self.max_adapters}: unload one first")
            index = next(index for index in range(1, self.max_adapters + 1) if index not in taken)
            prepared = self._pending[name] = Prepared(name, path, index)
        return prepared

    def _low_rank(self) -> LoraParts:
        with self._lock:
            self._lora = self._lora or LoraParts(self.model, self._fingerprint)
            return self._lora

    def _fill(self, prepared: Prepared, adapter: ExpertAdapter) -> None:
        if adapter.fingerprint != self._fingerprint:
            raise CheckpointError(
                f"the adapter in {str(adapter.path)!r} was trained from another base model ({adapter.base.name}, "
                f"fingerprint {adapter.fingerprint}; this one's is {self._fingerprint})"
            )
        for name, told in adapter.layers.items():
            self._check_layer(adapter, name)
            layer = self._layers[name]
            with self._lock:
                try:
                    slots = layer.slots.allocate(len(told.experts))
                except UsageError as error:
                    raise UsageError(f"the adapter {prepared.name!r} does not fit into {name}: {error}") from error
                prepared.slots[name] = (told.experts, slots)
            rows = {layer.names[parameter]: tensor for parameter, tensor in adapter.tensors(name).items()}
            layer.slots.write(slots, told.experts, rows)

    def _check_layer(self, adapter: ExpertAdapter, name: str) -> None:
        if name not in self._layers:
            known = ", ".join(self._layers) or "none"
            raise _misfit(adapter, f"it has experts of {name!r}, but the model's layers with experts are: {known}")
        layer, told = self._layers[name], adapter.layers[name]
        if told.num_experts != layer.slots.num_experts:
            raise _misfit(adapter, f"{name} has {layer.slots.num_experts} experts, not {told.num_experts}")
        for parameter, tensor in adapter.tensors(name).items():
            if parameter not in layer.names:
                raise _misfit(adapter, f"{name} has no {parameter!r}, only {', '.join(layer.names)}")
            wanted = list(getattr(layer.module, parameter).shape[1:])
            if list(tensor.shape[1:]) != wanted:
                raise _misfit(adapter, f"an expert's {parameter} of {name} is {wanted}, not {list(tensor.shape[1:])}")

    def _check_indices(self, index_T: Tensor) -> None:
        if index_T.ndim != 1 or index_T.dtype != torch.int64:
            raise ConfigError(
                f"adapter indices are int64 of shape [tokens], got {index_T.dtype} of shape {list(index_T.shape)}"
            )
        if index_T.is_cpu and len(index_T):
            low, high = (int(value) for value in index_T.aminmax())
            if low < 0 or high > self.max_adapters:
                raise ConfigError(f"adapter indices are in 0 ... {self.max_adapters}, got {low} ... {high}")
            there_T = self._is_there[index_T.numpy()]
            if not there_T.all():
                raise ConfigError(f"there is no adapter with the index {int(index_T[int(there_T.argmin())])}")


def _servable(name: str, module: nn.Module) -> ExpertWeights:
    implementation = getattr(getattr(module, "config", None), "_experts_implementation", "moesaic")
    if implementation != "moesaic" and not isinstance(module, ExpertBank):
        raise UnsupportedError(
            f"adapters' experts run with experts_implementation='moesaic' only, but the model has {implementation!r}: "
            "call model.set_experts_implementation('moesaic')"
        )
    if getattr(module, "slots", None) is not None:
        raise UsageError(f"{name or type(module).__name__} is in another AdapterPool: close that one first")
    weights = module.weights() if isinstance(module, ExpertBank) else weights_of(module)
    if weights.format is not None:
        raise UnsupportedError(
            f"the experts of {name or type(module).__name__} are stored as {weights.format.name} codes: adapters' "
            "experts are served beside float weights only"
        )
    return weights


def _room(weights: ExpertWeights, max_adapters: int) -> int:
    """Slots that a layer's adapters cannot outgrow: all experts of all adapters, or as many as fill the memory."""
    expert = sum(tensor[0].numel() * tensor.element_size() for tensor in weights.tensors().values())
    kind = weights.up.device.type
    memory = max((device.memory for device in hardware.devices() if device.device.startswith(kind)), default=0)
    return min(max_adapters * weights.num_experts, memory // expert + 1, _MOST)


def _misfit(adapter: ExpertAdapter, reason: str) -> CheckpointError:
    return CheckpointError(f"the adapter in {str(adapter.path)!r} does not fit this model: {reason}")
