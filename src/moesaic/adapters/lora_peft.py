"""PEFT's names, settings and memory layout, translated to parts and back.

A linear layer's matrices are ``base_model.model.<module path>.lora_A.weight`` ``[r, I]`` and ``lora_B`` ``[O, r]``. The
parts of E experts of one parameter (PEFT's ``target_parameters``) are one A ``[E · r, I]``, expert after expert, and
one B ``[O, r · E]``, rank after rank, under the path of the experts module; of several targeted parameters of a module
the last one is there, and the one before it under ``<module path>.base_layer``, and so on.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from moesaic.adapters.lora import LoraAdapter, LoraPart, Target, ends_with
from moesaic.adapters.lora_legacy import find_fused, fuse
from moesaic.errors import CheckpointError

_PREFIX = "base_model.model."
_KEY = re.compile(r"(?:base_model\.model\.)?(?P<path>.+)\.lora_(?P<side>[AB])\.weight")
# Settings that change what is computed, and that we do not compute, with the values that switch them off.
_REFUSED: dict[str, tuple[object, ...]] = {
    "use_dora": (False, None),
    "use_qalora": (False, None),
    "use_bdlora": (False, None),
    "bias": ("none", None),
    "lora_bias": (False, None),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None, [], {}),
    "layer_replication": (None, []),
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
    "velora_config": (None,),
}
# Initializations that take something out of the base, which is then another one.
_RESIDUAL = ("pissa", "corda", "olora", "loftq", "lora_ga")
# Before this version PEFT took a parameter [E, O, I] for [E, I, O]: A and B have changed places.
_SWAPPED_BEFORE = (0, 19, 1)
_PATTERNS = {"r": "rank_pattern", "lora_alpha": "alpha_pattern"}


def check_settings(config: Mapping[str, Any]) -> None:
    """Refuse what is not plain LoRA.

    Raises:
        CheckpointError: with the setting.
    """
    if config.get("peft_type") != "LORA":
        raise CheckpointError(f"its peft_type is {config.get('peft_type')!r}, and only 'LORA' is supported")
    for key, harmless in _REFUSED.items():
        if config.get(key) not in harmless:
            raise CheckpointError(f"{key} = {config[key]!r} is not supported")
    initial = str(config.get("init_lora_weights")).lower()
    if initial.startswith(_RESIDUAL):
        raise CheckpointError(f"init_lora_weights = {initial!r} changes the base: have PEFT convert it to plain LoRA")
    for key in _PATTERNS.values():
        if not isinstance(config.get(key) or {}, dict):
            raise CheckpointError(f"{key} is no JSON object")
    told = config.get("target_parameters") or []
    if not isinstance(told, list) or not all(isinstance(each, str) for each in told):
        raise CheckpointError(f"target_parameters = {told!r} is no list of names")


def parts_of(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], targets: Mapping[str, Target]
) -> dict[str, LoraPart]:
    """The parts that a file holds, by the full names of their parameters, in the order of ``targets``.

    Raises:
        CheckpointError: for a tensor that is none of LoRA, fits no target, or is missing.
    """
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        met = _KEY.fullmatch(key)
        if met is None or tensor.ndim != 2 or not tensor.is_floating_point():
            raise CheckpointError(f"the tensor {key} ({tensor.dtype}, {list(tensor.shape)}) is none of LoRA")
        pairs.setdefault(met["path"], {})[met["side"]] = tensor
    found: dict[str, LoraPart] = {}
    single: dict[str, LoraPart] = {}
    for path, pair in pairs.items():
        if len(pair) < 2:
            raise CheckpointError(f"of {path} there is lora_{next(iter(pair))} only")
        target = _target(path, config, targets)
        if target is None:
            find_fused(path, targets)  # or it is nothing that the base has
            single[path] = _linear_part(path, pair["A"], pair["B"], config)
        elif target.num_experts is None:
            found[target.name] = _linear_part(target.path, pair["A"], pair["B"], config)
        else:
            found[target.name] = _experts_part(target, pair["A"], pair["B"], config)
    found |= fuse(single, targets)
    _check(found, config, targets)
    return {name: found[name] for name in targets if name in found}


def tensors_of(adapter: LoraAdapter, targets: Mapping[str, Target]) -> dict[str, Tensor]:
    """PEFT's tensors of an adapter; experts without a part get zeros."""
    tensors = {}
    for name, part in adapter.parts.items():
        target = targets[name]
        a, b = part.a.detach().cpu(), part.b.detach().cpu()
        if part.experts is not None:
            count = target.num_experts or 0
            a_ERI, b_EOR = (each.new_zeros(count, *each.shape[1:]) for each in (a, b))
            a_ERI[list(part.experts)], b_EOR[list(part.experts)] = a, b
            a, b = a_ERI.flatten(0, 1), b_EOR.permute(1, 2, 0).flatten(1)
        mates = [each for key, each in targets.items() if key in adapter.parts and each.path == target.path]
        path = target.path + ".base_layer" * (len(mates) - 1 - _wrapped_in_order(mates).index(target))
        tensors[f"{_PREFIX}{path}.lora_A.weight"] = a.contiguous()
        tensors[f"{_PREFIX}{path}.lora_B.weight"] = b.contiguous()
    return tensors


def config_of(adapter: LoraAdapter, targets: Mapping[str, Target]) -> dict[str, Any]:
    """PEFT's settings of an adapter: names as short as they can be, patterns for ranks and alphas that are not the
    most frequent ones."""
    ranks = {targets[name].peft_name: part.rank for name, part in adapter.parts.items()}
    alphas = {targets[name].peft_name: _alpha(part) for name, part in adapter.parts.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    missing = [each.peft_name for name, each in targets.items() if name not in adapter.parts]
    short = {name: _short_name(targets[name], missing) for name in adapter.parts}
    linear = {name for name in adapter.parts if targets[name].num_experts is None}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": adapter.base.name if adapter.base else None,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {re.escape(name): value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {re.escape(name): value for name, value in alphas.items() if value != alpha},
        "target_modules": sorted({short[name] for name in linear}),
        "target_parameters": sorted({short[name] for name in adapter.parts if name not in linear}),
        "bias": "none",
        "lora_dropout": 0.0,
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
    }


def _target(path: str, config: Mapping[str, Any], targets: Mapping[str, Target]) -> Target | None:
    if linear := targets.get(f"{path}.weight"):
        return linear
    plain = re.sub(r"(\.base_layer)+$", "", path)
    depth = (len(path) - len(plain)) // len(".base_layer")
    wanted = config.get("target_parameters") or ()
    stack = _wrapped_in_order(
        [each for each in targets.values() if each.path == plain and each.num_experts is not None]
    )
    stack = [each for each in stack if any(ends_with(each.name, ending) for ending in wanted)]
    return stack[len(stack) - 1 - depth] if depth < len(stack) else None


def _wrapped_in_order(stack: list[Target]) -> list[Target]:
    """The targets of one module, in the order in which PEFT wraps them: that of their registration."""
    order = [name for name, _ in stack[0].module.named_parameters(recurse=False)] if stack else []
    return sorted(stack, key=lambda each: order.index(each.parameter) if each.parameter in order else 0)


def _linear_part(path: str, a: Tensor, b: Tensor, config: Mapping[str, Any]) -> LoraPart:
    return LoraPart(a, b, _scaling(path, a.shape[0], config))


def _experts_part(target: Target, a: Tensor, b: Tensor, config: Mapping[str, Any]) -> LoraPart:
    rows, count = a.shape[0], target.num_experts or 0
    if rows % count or b.shape[1] != rows or not rows:
        raise CheckpointError(
            f"A {list(a.shape)} and B {list(b.shape)} of {target.name} are no parts of {count} experts"
        )
    a_EXY, b_ZXE = a.view(count, -1, a.shape[1]), b.reshape(b.shape[0], -1, count)
    a_ERI, b_EOR = a_EXY, b_ZXE.permute(2, 0, 1)
    if _is_swapped(target, a.shape[1], b.shape[0], config):
        a_ERI, b_EOR = b_ZXE.permute(2, 1, 0), a_EXY.transpose(1, 2)
    scaling = _scaling(target.name, rows // count, config)
    return LoraPart(a_ERI.contiguous(), b_EOR.contiguous(), scaling, tuple(range(count)))


def _is_swapped(target: Target, inputs: int, outputs: int, config: Mapping[str, Any]) -> bool:
    if target.transposed or (inputs, outputs) != (target.outputs, target.inputs):
        return False
    if inputs != outputs:
        return True
    version = tuple(int(each) for each in re.findall(r"\d+", str(config.get("peft_version") or ""))[:3])
    return bool(version) and version < _SWAPPED_BEFORE


def _scaling(name: str, rank: int, config: Mapping[str, Any]) -> float:
    told, alpha = _setting(config, name, "r"), _setting(config, name, "lora_alpha")
    if not rank or told != rank:
        raise CheckpointError(f"the rank of {name} is {told!r} by its settings, but {rank} by its tensors")
    # Beyond float32, in which parts are computed, as bad as infinity itself.
    if not isinstance(alpha, int | float) or not abs(alpha) < 3e38:
        raise CheckpointError(f"lora_alpha of {name} is {alpha!r}")
    return float(alpha / (rank**0.5 if config.get("use_rslora") else rank))


def _setting(config: Mapping[str, Any], name: str, key: str) -> Any:
    """A target's own rank or alpha, by PEFT's patterns: the first that matches an ending of its name."""
    for pattern, value in (config.get(_PATTERNS[key]) or {}).items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", name):
                return value
        except re.error as error:
            raise CheckpointError(f"{pattern!r} in {_PATTERNS[key]} is no pattern: {error}") from error
    return config.get(key, 8)


def _check(found: Mapping[str, LoraPart], config: Mapping[str, Any], targets: Mapping[str, Target]) -> None:
    if not found:
        raise CheckpointError("its file of tensors is empty")
    for name, part in found.items():
        if wrong := targets[name].check(part):
            raise CheckpointError(wrong)
    modules = config.get("target_modules")
    plain = not any(config.get(key) for key in ("layers_to_transform", "layers_pattern", "exclude_modules"))
    endings = [*(config.get("target_parameters") or ()), *(modules if isinstance(modules, list) and plain else ())]
    for name, target in targets.items():
        if name not in found and any(ends_with(target.peft_name, ending) for ending in endings):
            raise CheckpointError(f"its settings name {target.peft_name}, but its file has no part for it")


def _alpha(part: LoraPart) -> float:
    alpha = part.scaling * part.rank
    return round(alpha) if abs(alpha - round(alpha)) < 1e-9 else alpha


def _short_name(target: Target, missing: list[str]) -> str:
    """``q_proj`` or ``experts.down_proj`` where all that end so have a part, else the whole name."""
    parts = target.peft_name.split(".")
    ending = ".".join(parts[-1:] if target.num_experts is None else parts[-2:])
    return target.peft_name if any(ends_with(other, ending) for other in missing) else ending
