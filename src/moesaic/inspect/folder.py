"""Inspect a model on disk: its folder to a report, with what is not said taken from the run that made it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moesaic.data import Skipped
from moesaic.data.sources import STDLIB
from moesaic.errors import CheckpointError
from moesaic.hf.load import load_model
from moesaic.inspect.passages import read_documents
from moesaic.inspect.report import check_out, write_report
from moesaic.inspect.tracing import DEFAULT_TOKENS, collect

HELD_OUT = 0.05
"""The share of the files that are read for a model that no run here made."""


@dataclass(frozen=True)
class Inspection:
    """Where the report is, what its ``report.json`` holds, and which texts could not be read."""

    folder: Path
    report: dict[str, Any]
    skipped: list[Skipped]


def inspect_folder(
    path: str | Path,
    *,
    sources: Sequence[str] | None = None,
    out: str | Path | None = None,
    max_tokens: int = DEFAULT_TOKENS,
    progress: Callable[[int, int], None] | None = None,
) -> Inspection:
    """Write a report of the model in ``path``: ours, or any MoE of transformers.

    Args:
        path: a model folder, or the folder of a training run.
        sources: as :func:`moesaic.data.load_corpus` takes them; by default what the run was trained on, else
            ``stdlib``. Of the default and of ``stdlib`` only what training holds out is read, of others everything.
        out: the folder to write; by default ``report`` in the run's folder, else ``NAME-report`` in the current one.
        max_tokens: about how many to run, every domain alike.
        progress: called with the tokens done and their number.

    Raises:
        CheckpointError: where there is no usable model, or the run's ``run.json`` cannot be read.
        DataError: where there is no usable text.
        UsageError: where the folder to write is taken, or the model has no MoE layer; its subclass ConfigError for a
            number out of range.
        UnsupportedError: where a layer does not route exactly the tokens of the text.
    """
    path = Path(path)
    name = path.resolve().name
    note = path / "run.json"
    folder = check_out(out or (path / "report" if note.is_file() else f"{name}-report"))
    model, tokenizer = load_model(path)
    trained_on, held_out = _data_of_run(note) if note.is_file() else ([STDLIB], HELD_OUT)
    is_held_out = not sources or list(sources) == [STDLIB]
    corpus = read_documents(sources or trained_on, held_out if is_held_out else None)
    trace = collect(model, tokenizer, corpus.documents, name=name, max_tokens=max_tokens, progress=progress)
    return Inspection(folder, write_report(trace, folder), corpus.skipped)


def _data_of_run(note: Path) -> tuple[list[str], float]:
    """The sources that a run was trained on, and the share of them that it held out."""
    try:
        data = json.loads(note.read_text(encoding="utf-8"))["recipe"]["data"]
        return [str(source) for source in data["sources"]], float(data["validation_fraction"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise CheckpointError(f"{str(note)!r} cannot be read: {error}") from error
