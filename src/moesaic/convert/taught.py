"""Split and distil in one go: a dense model to the mixture that one would use."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from moesaic.convert.distilling import Distilled, DistillSettings, distill
from moesaic.convert.source import load_tokenizer, open_source
from moesaic.convert.splitting import Split, SplitSettings, split
from moesaic.convert.writing import NOTE, Written, partial_path
from moesaic.data import Batches, prepare
from moesaic.errors import CheckpointError
from moesaic.hf.save import check_new


@dataclass(frozen=True)
class Taught:
    """What :func:`split_and_distill` made: ``split`` is None where an earlier start had done it."""

    written: Written
    split: Split | None
    distilled: Distilled


def split_and_distill(
    model: str | Path,
    out: str | Path,
    settings: SplitSettings,
    teaching: DistillSettings,
    *,
    say: Callable[[str], None] | None = None,
    shard_bytes: int = 2 << 30,
) -> Taught:
    """:func:`moesaic.convert.split` the dense model at ``model`` into the folder ``<out>.split``, then teach that what
    the dense model says (:func:`moesaic.convert.distill`), into ``out``; the former is removed at the end.

    Interrupted, the same call goes on. What the teaching would refuse (text that is shorter than a passage, an
    ``<out>.partial`` in the way) is refused before the split.

    Raises:
        CheckpointError: where ``out`` exists, ``<out>.split`` is of another model or other settings, or there is an
            ``<out>.partial`` without it.
        DataError: for text of which a domain is shorter than a passage.
        MoesaicError: as both of them do.
    """
    out = Path(out)
    begun = out.with_name(f"{out.name}.split")
    check_new(out)
    made = None
    if begun.exists():
        _check_begun(begun, model, settings)
    else:
        _check_teaching(model, out, teaching, say)
        made = split(model, begun, settings, say=say, shard_bytes=shard_bytes)
    distilled = distill(begun, model, out, teaching, say=say, shard_bytes=shard_bytes)
    shutil.rmtree(begun)
    return Taught(distilled.written, made, distilled)


def _check_teaching(model: str | Path, out: Path, teaching: DistillSettings, say: Callable[[str], None] | None) -> None:
    """Refuse what the distillation would refuse after the split."""
    if (partial := partial_path(out)).exists():
        raise CheckpointError(
            f"{str(partial)!r} is in the way, it is of no split that is there to go on with: remove it to begin anew"
        )
    if say is not None:
        say("reading the text")
    tokenizer_from = open_source(model).tokenizer_from
    with tempfile.TemporaryDirectory() as scratch:
        folder = tokenizer_from
        if tokenizer_from.suffix == ".gguf":
            load_tokenizer(tokenizer_from).save_pretrained(scratch)
            folder = Path(scratch)
        text = prepare(teaching.data, tokenizer=str(folder), validation_fraction=teaching.held_out)
    for name, ids in text.train.items():
        Batches({name: ids}, sequence_length=teaching.sequence_length, batch_size=1, seed=teaching.seed)


def _check_begun(begun: Path, model: str | Path, settings: SplitSettings) -> None:
    """Refuse what is there where it is not what this split would make."""
    wanted = {"method": "split", "model": open_source(model).fingerprint(), **asdict(settings)}
    wanted = json.loads(json.dumps(wanted))
    try:
        noted = json.loads((begun / NOTE).read_bytes())
    except (OSError, ValueError):
        noted = {}
    if other := [name for name, value in wanted.items() if noted.get(name) != value]:
        name = other[0]
        raise CheckpointError(
            f"{str(begun)!r} holds another split ({name}: {noted.get(name)!r} there, {wanted[name]!r} now): give "
            "the same settings to go on, or remove it to begin anew"
        )
