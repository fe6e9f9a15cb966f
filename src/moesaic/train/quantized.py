"""A model folder with quantized experts, and what that cost in perplexity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from moesaic.hf.load import load_model
from moesaic.hf.quantization import quantize
from moesaic.hf.save import check_new, save_folder
from moesaic.train.evaluation import Evaluation, evaluate_folder


@dataclass(frozen=True)
class Quantized:
    """A folder that :func:`quantize_folder` wrote.

    Attributes:
        bytes_before, bytes_after: of all parameters and buffers of the model.
        before, after: perplexity of the float and of the quantized model on the same text; None where none was given.
    """

    folder: str
    format: str
    bytes_before: int
    bytes_after: int
    before: Evaluation | None = None
    after: Evaluation | None = None

    def rise(self) -> dict[str, float]:
        """By how much the perplexity of each domain rose, as a part of what it was: 0.01 for one percent."""
        if self.before is None or self.after is None:
            return {}
        after = self.after.domains
        return {name: after[name].perplexity / r.perplexity - 1 for name, r in self.before.domains.items()}


def quantize_folder(
    path: str | Path, out: str | Path, format: str, *, group: int | None = None, sources: Sequence[str] | None = None
) -> Quantized:
    """Load a model or run, quantize its experts, and write it with its tokenizer to the new folder ``out``.

    Args:
        format, group: as :func:`moesaic.quantize` takes them.
        sources: text to measure the perplexity on before and after, as :func:`evaluate_folder` takes it.

    Raises:
        CheckpointError: where ``path`` cannot be read, or ``out`` exists already.
        UsageError: as :func:`moesaic.quantize`, :func:`evaluate_folder`, and where the folder cannot be written.
    """
    check_new(out)
    model, tokenizer = load_model(path)
    bytes_before = _bytes(model)
    quantize(model, format, group=group)
    # After the quantization, which says in an instant what it refuses; measuring takes minutes.
    before = evaluate_folder(path, sources=sources) if sources else None
    after = evaluate_folder(path, sources=sources, model=model) if sources else None
    folder = save_folder(model, tokenizer, out)
    return Quantized(str(folder), format, bytes_before, _bytes(model), before, after)


def _bytes(model: nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in [*model.parameters(), *model.buffers()])
