"""The recipe of a fine-tuning run: a base, a method with its own keys, text, and the optimization."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, Self

from pydantic import Field, create_model

from moesaic.adapters.methods import METHODS, MethodSettings
from moesaic.errors import ConfigError
from moesaic.train.recipe import HARMLESS, NAME, RunRecipe, TextSettings, TrainSettings


class TuneSettings(TrainSettings):
    """``[train]`` of a fine-tuning run: that of training, with smaller and shorter defaults."""

    steps: int = Field(500, ge=1, description="Optimizer steps.")
    learning_rate: float = Field(1e-4, gt=0, description="AdamW's learning rate after warm-up.")
    weight_decay: float = Field(0.0, ge=0, description="On weight matrices; not on norms, biases and embeddings.")
    seed: int = Field(0, ge=0, lt=2**63, description="Of the order of the data, and of new weights.")


class FinetuneRecipe(RunRecipe):
    """One fine-tuning run. A recipe is of the subclass whose ``[adapter]`` has the keys of its method."""

    command = "finetune"
    # Where the base lies does not matter: its fingerprint does.
    harmless = HARMLESS | {"base"}

    name: str = Field("finetune", pattern=NAME, description="Name of the run.")
    base: str = Field("", description="The model to start from: its folder, or that of the run that trained it.")
    adapter: MethodSettings = MethodSettings()
    data: TextSettings = TextSettings()
    train: TuneSettings = TuneSettings()

    @classmethod
    def kind(cls, tables: Mapping[str, Any], overrides: Sequence[str]) -> type[Self]:
        section = tables.get("adapter")
        method = section.get("method", "esft") if isinstance(section, Mapping) else "esft"
        for name, _, value in (word.partition("=") for word in overrides):
            if name.strip() in ("adapter.method", "method"):
                method = value.strip().strip("\"'")
        if not isinstance(method, str):
            raise ConfigError(f"adapter.method is {method!r}: it must be one of {', '.join(METHODS)}")
        return _with_method(method)  # type: ignore[return-value]


@lru_cache
def _with_method(method: str) -> type[FinetuneRecipe]:
    section = METHODS.get(method).settings
    default = section(method=method)
    return create_model("FinetuneRecipe", __base__=FinetuneRecipe, adapter=(section, default))
