"""A routing trace: which experts took which token of which text, in every MoE layer of a model.

N tokens · L MoE layers · E experts · K slots per token. A layer may have its own E and K.
"""

from __future__ import annotations

import json
import os
import zipfile
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moesaic.errors import DataError

FORMAT = 2
_READ = (1, 2)
"""Format 1 knows no zero-computation experts and no passes."""

SIMILARITIES = ("outputs", "weights")

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class ModelFacts:
    """What a report says about the model. ``active_parameters``: those that one token's forward uses."""

    name: str
    architecture: str
    num_layers: int
    total_parameters: int
    active_parameters: int


@dataclass(frozen=True)
class Passage:
    """A piece of a document that went through the model in one forward; ``text`` is exactly that piece.

    Its tokens are those from ``start`` up to, not including, ``stop`` of the trace.
    """

    domain: str
    document: str
    text: str
    start: int
    stop: int


@dataclass
class LayerTrace:
    """What the router of one MoE layer did with the N tokens.

    Args:
        name: the module's path in the model. number: the decoder layer that it is in, from 0.
        expert_ids: ``[N, K]`` int64; below ``num_experts`` an expert that computes, from there on those of
            ``zero_computation``, and the id after them in a slot that has no expert (null, dropped, masked).
        weights: ``[N, K]`` float64, the factor of each expert's output.
        entropy: ``[N]`` float64 from 0 (certain) to 1 (undecided); see ``entropy_source``.
        entropy_source: ``"scores"``: of the router's scores of all E experts, normalized by log E; ``"weights"``: of
            the K chosen weights only, normalized by log K (the router keeps its scores to itself).
        dropped: slots that lost their expert to a capacity limit.
        zero_computation: the kind of each expert that computes nothing (zero, copy, constant).
        routing: where the layer routes several times in one forward, which time this is, from 1; else 0.
        similarity: ``[E, E]`` float64 by name, where known: ``"outputs"`` and ``"weights"``, the experts' cosines as
            :mod:`moesaic.inspect.likeness` has them.
    """

    name: str
    number: int
    num_experts: int
    expert_ids: IntArray
    weights: FloatArray
    entropy: FloatArray
    entropy_source: str
    dropped: int = 0
    zero_computation: list[str] = field(default_factory=list)
    routing: int = 0
    similarity: dict[str, FloatArray] = field(default_factory=dict)

    @property
    def top_k(self) -> int:
        return int(self.expert_ids.shape[1])

    @property
    def label(self) -> str:
        """What a reader calls it: the number of the decoder layer, ``3``, or ``3.2`` for its second routing."""
        return f"{self.number}.{self.routing}" if self.routing else str(self.number)

    @property
    def top_expert(self) -> IntArray:
        """``[N]``: the expert with the largest weight; ``num_experts`` where a token has none that computes."""
        real = np.where(self.expert_ids < self.num_experts, self.weights, -np.inf)
        best = real.argmax(axis=1)[:, None]
        found: IntArray = np.take_along_axis(self.expert_ids, best, axis=1)[:, 0]
        return np.minimum(found, self.num_experts)


@dataclass
class RoutingTrace:
    """Texts, their tokens, and their way through the experts.

    Args:
        token_ids: ``[N]`` int64.
        spans: ``[N, 2]`` int64, the characters of a token in the text of its passage. The spans of a passage follow
            each other without gaps: white space that a tokenizer skips belongs to the token after it. A token
            that adds no character (special tokens, the second byte of a character) has an empty span.
        vocabulary: text of every token id that occurs.
    """

    model: ModelFacts
    passages: list[Passage]
    token_ids: IntArray
    spans: IntArray
    vocabulary: dict[int, str]
    layers: list[LayerTrace]

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def domains(self) -> list[str]:
        return sorted({passage.domain for passage in self.passages})

    @property
    def domain_ids(self) -> IntArray:
        """``[N]``: index into :attr:`domains`."""
        domains = self.domains
        return self._repeat([domains.index(passage.domain) for passage in self.passages])

    @property
    def passage_ids(self) -> IntArray:
        """``[N]``: index into ``passages``."""
        return self._repeat(list(range(len(self.passages))))

    def passage_of(self, position: int) -> Passage:
        """The passage that a token belongs to; ``position`` from 0 to N - 1."""
        return self.passages[bisect_right(self.passages, position, key=lambda passage: passage.start) - 1]

    def _repeat(self, values: Sequence[int]) -> IntArray:
        lengths = [passage.stop - passage.start for passage in self.passages]
        return np.repeat(np.asarray(values, dtype=np.int64), lengths)

    def save(self, path: str | Path) -> Path:
        """Write the trace as one ``.npz`` file, complete or not at all.

        Raises:
            OSError: where the disk does not allow it.
        """
        path = Path(path)
        arrays: dict[str, npt.NDArray[Any]] = {"token_ids": self.token_ids, "spans": self.spans}
        for i, layer in enumerate(self.layers):
            arrays[f"expert_ids_{i}"] = layer.expert_ids.astype(np.int32)
            arrays[f"weights_{i}"] = layer.weights.astype(np.float32)
            arrays[f"entropy_{i}"] = layer.entropy.astype(np.float32)
            for name, cosines in layer.similarity.items():
                arrays[f"similarity_{name}_{i}"] = cosines.astype(np.float32)
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            with partial.open("wb") as file:
                about = np.frombuffer(json.dumps(self._about()).encode(), dtype=np.uint8)
                np.savez_compressed(file, allow_pickle=False, about=about, **arrays)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
        return path

    def _about(self) -> dict[str, Any]:
        """Everything that is not an array; an ``.npz`` file needs no pickle that way."""
        keys = ("name", "number", "num_experts", "entropy_source", "dropped", "zero_computation", "routing")
        return {
            "format": FORMAT,
            "model": asdict(self.model),
            "passages": [asdict(passage) for passage in self.passages],
            "vocabulary": {str(token): text for token, text in self.vocabulary.items()},
            "layers": [{key: getattr(layer, key) for key in keys} for layer in self.layers],
        }

    @classmethod
    def load(cls, path: str | Path) -> RoutingTrace:
        """Read what :meth:`save` wrote.

        Raises:
            DataError: where the file is missing, damaged, or not a routing trace.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                about = json.loads(file["about"].tobytes())
                if about["format"] not in _READ:
                    allowed = " and ".join(map(str, _READ))
                    raise DataError(f"{str(path)!r} is a routing trace of format {about['format']}; allowed: {allowed}")
                layers = [
                    LayerTrace(
                        **layer,
                        expert_ids=file[f"expert_ids_{i}"].astype(np.int64),
                        weights=file[f"weights_{i}"].astype(np.float64),
                        entropy=file[f"entropy_{i}"].astype(np.float64),
                        similarity={
                            name: file[f"similarity_{name}_{i}"].astype(np.float64)
                            for name in SIMILARITIES
                            if f"similarity_{name}_{i}" in file
                        },
                    )
                    for i, layer in enumerate(about["layers"])
                ]
                return cls(
                    model=ModelFacts(**about["model"]),
                    passages=[Passage(**passage) for passage in about["passages"]],
                    token_ids=file["token_ids"],
                    spans=file["spans"],
                    vocabulary={int(token): text for token, text in about["vocabulary"].items()},
                    layers=layers,
                )
        except OSError as error:
            raise DataError(f"cannot read the routing trace {str(path)!r}: {error.strerror or error}") from error
        except (LookupError, TypeError, ValueError, zipfile.BadZipFile, EOFError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"{str(path)!r} is not a routing trace, or damaged") from error
