"""Other weights for some layers, or for some part of them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from moesaic.errors import ConfigError

PARTS = {
    "attention": ("self_attn.", "input_layernorm."),
    "ffn": ("mlp.", "post_attention_layernorm."),
}
"""The two halves of a layer, each with the norm before it, by how the names of their tensors begin."""
_PLACE = re.compile(r"(?:(?P<first>\d+)(?:-(?P<last>\d+))?|(?P<outside>outside))(?::(?P<part>\w+))?")
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.*)")


@dataclass(frozen=True)
class Place:
    """Tensors of some layers: ``first`` to ``last``, both counted; None for those of no layer (``"outside"``).

    ``begins`` is how the names within a layer must begin.
    """

    layers: tuple[int, int] | None
    begins: tuple[str, ...]

    def holds(self, name: str) -> bool:
        """Whether the tensor of that name is one of them."""
        found = _LAYER.fullmatch(name)
        if found is None or self.layers is None:
            return found is None and self.layers is None
        return self.layers[0] <= int(found[1]) <= self.layers[1] and found[2].startswith(self.begins)


def parse_place(text: str, num_layers: int) -> Place:
    """``"3"``, ``"0-9"``, ``"0-9:ffn"``, ``"5:attention"``, or ``"outside"`` (embedding, last norm and head).

    Raises:
        ConfigError: for anything else, or a layer that the model does not have.
    """
    found = _PLACE.fullmatch(text)
    if found is None or (found["outside"] and found["part"]):
        raise ConfigError(
            f"{text!r} says no layers: allowed are '3', '0-9', either with ':attention' or ':ffn', and 'outside'"
        )
    if found["part"] is not None and found["part"] not in PARTS:
        raise ConfigError(f"{text!r} names no half of a layer: allowed are ':attention' and ':ffn'")
    if found["outside"]:
        return Place(None, ("",))
    first = int(found["first"])
    last = first if found["last"] is None else int(found["last"])
    if not first <= last < num_layers:
        raise ConfigError(f"{text!r} says layers that are not there: the model has 0 to {num_layers - 1}")
    return Place((first, last), PARTS[found["part"]] if found["part"] else ("",))


@dataclass(frozen=True)
class LayerWeights:
    """Weights of the models for every tensor: those of the last place that holds it, else the general ones.

    Weights that differ from layer to layer are what Evolutionary Optimization of Model Merging Recipes (section 3.1)
    searches, and Unconstrained Model Merging for Enhanced LLM Reasoning calls layer-wise.
    """

    general: tuple[float, ...]
    special: tuple[tuple[Place, tuple[float, ...]], ...] = ()

    @classmethod
    def of(cls, general: Sequence[float], special: Mapping[str, Sequence[float]], num_layers: int) -> LayerWeights:
        """Read the places of ``special``, in their order."""
        places = tuple((parse_place(text, num_layers), tuple(weights)) for text, weights in special.items())
        return cls(tuple(general), places)

    def __getitem__(self, name: str) -> tuple[float, ...]:
        weights = self.general
        for place, others in self.special:
            if place.holds(name):
                weights = others
        return weights
