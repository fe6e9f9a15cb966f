"""Run a mixture of experts that is larger than memory: a decoder layer's weights are read when it runs, then dropped.

The model is made without weights; each of its layers gets them from the files just before its forward and loses them
just after. E experts · D model width · F expert hidden width.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from moesaic.convert.meter import watch
from moesaic.convert.source import TensorSource
from moesaic.errors import UnsupportedError
from moesaic.hf.placement import MoEBlock
from moesaic.hf.quantized import expert_modules
from moesaic.routing.router import CommonPart

PARTS = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
"""What the gate, up and down projection of an expert with tensors of its own are called."""


class StreamedModel:
    """The body (without the head) of a model on disk; only the layer that runs is in memory.

    ``model`` is transformers' or ours, in evaluation mode, whose parameters are on the meta device but for those of the
    layer that is running, and those that its routers share: a hook of an experts module finds its weights there.

    Args:
        blocks: the MoE layers of ``source``, as :func:`moesaic.hf.placement.moe_blocks` gives them.

    Raises:
        UnsupportedError: where the model is not known to transformers, is quantized, or has a parameter that the files
            hold under no name that is known here.
    """

    def __init__(self, source: TensorSource, blocks: Sequence[MoEBlock]) -> None:
        if getattr(source.config, "quantization_config", None) is not None:
            raise UnsupportedError(
                f"{str(source.path)!r} has quantized weights, which cannot be run a layer at a time: give the model in "
                "floating point"
            )
        self._source = source
        self._dtype = next(source.dtype(name) for name in source.names if source.dtype(name).is_floating_point)
        self.model = _without_weights(source)
        self._aliases = _aliases(self.model)
        self._block_of = _blocks_by_module(self.model, blocks)
        self._units = dict(_units(self.model))
        self._common = _common(self.model)
        for unit, module in self._units.items():
            for name, tensor in _stored(module):
                self._parts(f"{unit}.{name}", tuple(tensor.shape))  # refuses here, before anything runs
                if f"{unit}.{name}" in self._common:
                    _put(module, name, self._read(f"{unit}.{name}", tuple(tensor.shape)))
            module.register_forward_pre_hook(self._load(unit))
            module.register_forward_hook(self._drop(unit), always_call=True)

    @torch.no_grad()
    def run(self, ids_BS: Tensor) -> None:
        """One forward of the body on token ids ``[B, S]``; who wants to know something of it has put hooks there."""
        self.model.base_model(input_ids=ids_BS, use_cache=False)

    def experts_of(self, blocks: Sequence[MoEBlock]) -> dict[str, MoEBlock]:
        """The experts' modules in ``model`` by their names, and the blocks that they are of."""
        wanted = {block.number for block in blocks}
        return {f"{name}.experts": block for name, block in self._block_of.items() if block.number in wanted}

    def _load(self, unit: str) -> Any:
        def before(module: nn.Module, args: Any) -> None:
            for name, tensor in _stored(module):
                if f"{unit}.{name}" not in self._common:
                    _put(module, name, self._read(f"{unit}.{name}", tuple(tensor.shape)))

        return before

    def _drop(self, unit: str) -> Any:
        def after(module: nn.Module, args: Any, output: Any) -> None:
            for name, tensor in _stored(module):
                if f"{unit}.{name}" not in self._common:
                    _put(module, name, tensor.detach().to("meta"))

        return after

    def _read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        parts = self._parts(name, shape)
        if isinstance(parts, str):
            return self._as_loaded(name, self._source.read(parts))
        dtype = self._as_loaded(name, torch.empty(0, dtype=self._source.dtype(parts[0][0]))).dtype
        fused = watch(torch.empty(shape, dtype=dtype))
        for expert, own in enumerate(parts):
            start = 0
            for part in own:
                rows = self._source.shape(part)[0]
                fused[expert, start : start + rows] = self._source.read(part)
                start += rows
        return fused

    def _as_loaded(self, name: str, tensor: Tensor) -> Tensor:
        """In the model's one dtype, but for what transformers keeps in float32."""
        kept = [*(self.model._keep_in_fp32_modules or ()), *(self.model._keep_in_fp32_modules_strict or ())]
        if not tensor.is_floating_point() or any(part in name for part in kept):
            return tensor
        return tensor.to(self._dtype)

    def _parts(self, name: str, shape: tuple[int, ...]) -> str | list[list[str]]:
        """The stored tensor that a parameter is, or for each expert the tensors that it is made of."""
        for alias in self._aliases.get(name, [name]):
            for stored in self._names(alias):
                if stored in self._source and self._source.shape(stored) == shape:
                    return stored
        prefix, _, rest = name.rpartition(".experts.")
        block = self._block_of.get(prefix)
        if block is not None and (own := _of_each_expert(self._source, block, rest, shape)):
            return own
        raise UnsupportedError(
            f"{str(self._source.path)!r} holds no {name} of shape {list(shape)}, and no tensors of single experts that "
            f"it could be made of ({', '.join('/'.join(parts) for parts in PARTS)}): it cannot be run a layer at a time"
        )

    def _names(self, name: str) -> Iterator[str]:
        yield name
        for module, block in self._block_of.items():
            if name.startswith(f"{module}."):
                yield block.name + name.removeprefix(module)


def _of_each_expert(source: TensorSource, block: MoEBlock, rest: str, shape: tuple[int, ...]) -> list[list[str]] | None:
    for gate, up, down in PARTS:
        made_of = {"gate_up_proj": [gate, up], "up_proj": [up], "down_proj": [down]}.get(rest, [])
        names = [
            [f"{block.name}.experts.{expert}.{part}.weight" for part in made_of] for expert in range(block.num_experts)
        ]
        if not made_of or not all(name in source for own in names for name in own):
            continue
        rows = {sum(source.shape(name)[0] for name in own) for own in names}
        columns = {source.shape(name)[1] for own in names for name in own}
        if (block.num_experts, *rows, *columns) == shape:
            return names
    return None


def _without_weights(source: TensorSource) -> PreTrainedModel:
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(source.config)
    if any(hasattr(module, "is_transposed") for module in model.modules()):
        model.set_experts_implementation("moesaic")
    for module in model.modules():
        # What is computed and not stored, such as RoPE's frequencies.
        own = {name for name in module._buffers if name in module._non_persistent_buffers_set}
        for name in own:
            module._buffers[name] = torch.empty_like(module._buffers[name], device="cpu")  # type: ignore[arg-type]
        if own:
            model._init_weights(module)
    model.eval()
    return model


def _units(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module]]:
    """What is in memory at one time: each layer of the body, and what it has beside them."""
    body = model.base_model
    prefix = next(name for name, module in model.named_modules() if module is body)
    for name, child in body.named_children():
        parts = child.named_children() if isinstance(child, nn.ModuleList) else [("", child)]
        for number, part in parts:
            if any(True for _ in _stored(part)):
                yield ".".join(filter(None, (prefix, name, number))), part


def _stored(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The module's parameters and the buffers that a checkpoint has."""
    yield from module.named_parameters()
    for prefix, owner in module.named_modules():
        for name, buffer in owner._buffers.items():
            if buffer is not None and name not in owner._non_persistent_buffers_set:
                yield f"{prefix}.{name}".removeprefix("."), buffer


def _common(model: nn.Module) -> set[str]:
    """The names of what one layer owns and others call: it is small, and stays in memory."""
    parts = [(prefix, module) for prefix, module in model.named_modules() if isinstance(module, CommonPart)]
    return {f"{prefix}.{name}" for prefix, module in parts for name, _ in _stored(module)}


def _put(module: nn.Module, name: str, tensor: Tensor) -> None:
    path, _, attribute = name.rpartition(".")
    owner = module.get_submodule(path)
    if attribute in owner._parameters:
        owner._parameters[attribute] = nn.Parameter(tensor, requires_grad=False)
    else:
        owner._buffers[attribute] = tensor


def _aliases(model: nn.Module) -> dict[str, list[str]]:
    """All names of each parameter that several modules share, of which a checkpoint has one."""
    names: defaultdict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
    return {name: alike for alike in names.values() for name in alike}


def _blocks_by_module(model: nn.Module, blocks: Sequence[MoEBlock]) -> dict[str, MoEBlock]:
    """The blocks by the names of the modules that are made of them: transformers calls some otherwise than files do."""
    by_number = {block.number: block for block in blocks}
    found = {}
    for name in expert_modules(model):
        module = name.partition(".experts")[0]
        numbers = [int(part) for part in module.split(".") if part.isdigit()]
        if numbers and numbers[0] in by_number:
            found[module] = by_number[numbers[0]]
    return found


@contextmanager
def hooks(handles: list[Any]) -> Iterator[None]:
    """Remove the hooks of ``handles`` at the end of the block."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
