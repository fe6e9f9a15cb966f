"""Split and distil in one go: a dense model to the mixture that one would use."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from moesaic.convert.dense import DenseModel, check_dense
from moesaic.convert.distilling import Distilled, DistillSettings, distill, read_lessons
from moesaic.convert.source import TensorSource, open_source, passage_length
from moesaic.convert.splitting import Split, SplitSettings, plan_split, read_calibration, split
from moesaic.convert.writing import NOTE, Written, partial_path
from moesaic.errors import CheckpointError
from moesaic.hf.save import check_new

Say = Callable[[str], None]


@dataclass(frozen=True)
class Taught:
    """What :func:`split_and_distill` made: ``split`` is None where an earlier start had done it; its folder is gone,
    and its ``written`` says the same as the whole's."""

    written: Written
    split: Split | None
    distilled: Distilled


def split_and_distill(
    model: str | Path,
    out: str | Path,
    settings: SplitSettings,
    teaching: DistillSettings,
    *,
    say: Say | None = None,
    shard_bytes: int = 2 << 30,
) -> Taught:
    """:func:`moesaic.convert.split` the dense model at ``model`` into the folder ``<out>.split``, then teach that what
    the dense model says (:func:`moesaic.convert.distill`), into ``out``; the former is removed at the end.

    Interrupted, the same call goes on. What the teaching would refuse (text that is shorter than a passage, an
    ``<out>.partial`` in the way) is refused before the split.

    Raises:
        CheckpointError: where ``out`` exists, ``<out>.split`` is of another model, text or other settings, or there is
            an ``<out>.partial`` without it.
        DataError: for text of which a domain is shorter than a passage.
        MoesaicError: as both of them do.
    """
    out = Path(out)
    begun = out.with_name(f"{out.name}.split")
    check_new(out)
    dense = check_dense(open_source(model))
    plan_split(dense.d_ff, settings)  # before the text of the teaching is read, which takes long
    made, told = None, say or (lambda line: None)
    if begun.exists():
        _check_begun(begun, dense, settings, told)
    else:
        _check_teaching(dense.source, out, teaching, told)
        made = split(model, begun, settings, say=say, shard_bytes=shard_bytes)
    distilled = distill(begun, model, out, teaching, say=say, shard_bytes=shard_bytes)
    shutil.rmtree(begun)
    made = made and replace(made, written=distilled.written)
    return Taught(distilled.written, made, distilled)


def _check_teaching(source: TensorSource, out: Path, teaching: DistillSettings, say: Say) -> None:
    """Refuse what the distillation would refuse after the split."""
    if (partial := partial_path(out)).exists():
        raise CheckpointError(
            f"{str(partial)!r} is in the way, it is of no split that is there to go on with: remove it to begin anew"
        )
    read_lessons(source, teaching, passage_length(teaching.sequence_length, source), say)


def _check_begun(begun: Path, dense: DenseModel, settings: SplitSettings, say: Say) -> None:
    """Refuse what is there where it is not what this split would make."""
    say("reading the calibration text")
    wanted = json.loads(json.dumps(read_calibration(dense, settings)[1]))
    try:
        noted = json.loads((begun / NOTE).read_bytes())
    except (OSError, ValueError):
        noted = None
    noted = noted if isinstance(noted, dict) else {}
    if other := [name for name, value in wanted.items() if noted.get(name) != value]:
        name = other[0]
        raise CheckpointError(
            f"{str(begun)!r} holds another split ({name}: {noted.get(name)!r} there, {wanted[name]!r} now): give "
            "the same settings to go on, or remove it to begin anew"
        )
