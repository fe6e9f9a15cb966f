"""Every class of the installed transformers that takes part in its experts interface, and how to build one tiny."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

MODELS = Path(transformers.__file__).parent / "models"
NUM_EXPERTS, WIDTH, HIDDEN = 6, 32, 24  # E, D, F


@cache
def sources() -> dict[str, str]:
    """The text of every modeling file, by module name."""
    files = sorted(MODELS.glob("*/modeling_*.py"))
    return {f"transformers.models.{file.parent.name}.{file.stem}": file.read_text() for file in files}


def decorated() -> list[tuple[str, str]]:
    """Module and name of each class that stands under ``@use_experts_implementation``, without importing anything."""
    pattern = re.compile(r"^@use_experts_implementation\b[^@]*?\nclass (\w+)", re.MULTILINE)
    return [(module, name) for module, text in sources().items() for name in pattern.findall(text)]


def wrapped() -> set[type[nn.Module]]:
    """The same classes found in another way: loaded, they dispatch through the interface, however that is spelled.

    Classes that inherit it count too. A class has a name with "Experts", or a base with one, so that no more than the
    modules where that word stands need to be imported (one in six).
    """
    for module, text in sources().items():
        if re.search(r"Experts|integrations\.moe|experts_interface", text):
            importlib.import_module(module)
    return {
        cls for cls in _subclasses(nn.Module) if cls.__module__.startswith("transformers.models.") and _is_wrapped(cls)
    }


def _subclasses(cls: type[nn.Module]) -> Iterator[type[nn.Module]]:
    for child in type.__subclasses__(cls):
        yield child
        yield from _subclasses(child)


def _is_wrapped(cls: type[nn.Module]) -> bool:
    code = getattr(cls.forward, "__code__", None)
    if code is None or "experts_interface" not in code.co_freevars:
        return False
    return inspect.getclosurevars(cls.forward).nonlocals["experts_interface"] is ALL_EXPERTS_FUNCTIONS


def load(module: str, name: str) -> type[nn.Module]:
    cls: type[nn.Module] = getattr(importlib.import_module(module), name)
    return cls


class TinyConfig:
    """A configuration as it comes, but for sizes: number of experts, width and hidden width are small."""

    def __init__(self, config: PreTrainedConfig) -> None:
        self._config = config
        self._experts_implementation = "eager"

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._config, name)
        if isinstance(value, str | bool | float):
            return value
        if "expert" in name:
            return NUM_EXPERTS
        if "intermediate" in name:
            return HIDDEN
        return WIDTH if name.endswith(("hidden_size", "latent_size")) else value


def build(cls: type[nn.Module], dtype: torch.dtype) -> nn.Module:
    """An instance with random parameters of every kind, from the first configuration class that fits it."""
    failures = []
    for config_class in _config_classes(cls):
        try:
            module = cls(TinyConfig(config_class()), *_further_arguments(cls))
        except AttributeError as error:
            failures.append(f"{config_class.__name__}: {error}")
            continue
        for name, parameter in module.named_parameters():
            # Wide enough that the variants which clamp the gate do so now and then.
            nn.init.normal_(parameter, std=0.5 if "up_proj" in name else 0.3)
        return module.to(dtype)
    raise AssertionError(f"no configuration builds {cls.__name__}: {'; '.join(failures)}")


def _config_classes(cls: type[nn.Module]) -> list[type[PreTrainedConfig]]:
    """The annotated one, then all that the module knows, the text model's first."""
    module = inspect.getmodule(cls)
    assert isinstance(module, ModuleType)
    known = [c for c in vars(module).values() if isinstance(c, type) and issubclass(c, PreTrainedConfig)]
    annotated = inspect.signature(inspect.unwrap(cls.__init__)).parameters["config"].annotation
    return sorted(
        (c for c in known if c is not PreTrainedConfig),
        key=lambda c: (c is not annotated, "Text" not in c.__name__, c.__name__),
    )


def _further_arguments(cls: type[nn.Module]) -> list[int]:
    """Constructors that want more than a configuration want the hidden width."""
    parameters = list(inspect.signature(inspect.unwrap(cls.__init__)).parameters.values())[2:]
    needed = [p.name for p in parameters if p.default is inspect.Parameter.empty]
    assert all("intermediate" in name for name in needed), f"{cls.__name__} needs {needed}"
    return [HIDDEN] * len(needed)
