"""Write a model a shard at a time, so that an interrupted conversion goes on where it stopped.

While it is written the model is ``OUT.partial``: a note of the settings, the shards that are complete, and whatever
else a method wants to keep. At the end it becomes ``OUT``.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PretrainedConfig

from moesaic.convert.meter import watch
from moesaic.convert.source import load_tokenizer, read_header
from moesaic.errors import CheckpointError, UsageError
from moesaic.hf.save import check_new

NOTE = "conversion.json"
_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_COPIED = ("token", "vocab", "merges", "special_tokens", "added_tokens", "chat_template", "spiece", "generation_config")
"""How the names of the files begin that belong to the tokenizer, or to generating with it."""


@dataclass(frozen=True)
class Output:
    """One tensor of the new model; ``make`` reads what it needs and returns it with this shape and dtype."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return int(torch.Size(self.shape).numel()) * self.dtype.itemsize


@dataclass(frozen=True)
class Written:
    """What was written: the folder, the number of its shards and how many of them an earlier start had left, bytes of
    all tensors, and number of parameters."""

    folder: Path
    shards: int
    resumed: int
    nbytes: int
    parameters: int


def write_model(
    outputs: Sequence[Output],
    folder: Path,
    *,
    config: PretrainedConfig,
    tokenizer_from: Path | None,
    settings: Mapping[str, Any],
    shard_bytes: int = 2 << 30,
    say: Callable[[str], None] | None = None,
) -> Written:
    """Write ``outputs`` in their order, a shard in memory at a time, with index, configuration and tokenizer.

    Args:
        folder: must not exist yet; ``<folder>.partial`` may, of an interrupted start with the same ``settings``: then
            the shards that it holds are not made again.
        tokenizer_from: a folder, whose tokenizer files are copied, or a ``.gguf`` file; None for no tokenizer.
        settings: all that the tensors depend on, as JSON can hold it.
        shard_bytes: most bytes of one shard; a tensor that is larger is a shard of its own.
        say: called with a line of text before each shard.

    Raises:
        CheckpointError: where ``folder`` exists, or holds an unfinished conversion with other settings; and before
            anything is written, where the tokenizer of a ``.gguf`` file cannot be loaded.
        UsageError: where it cannot be written.
    """
    tokenizer = load_tokenizer(tokenizer_from) if tokenizer_from and tokenizer_from.suffix == ".gguf" else None
    with partial_folder(folder, settings) as partial:
        shards = _shards(outputs, shard_bytes)
        resumed, weight_map = 0, {}
        for number, shard in enumerate(shards, 1):
            name = _SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            weight_map.update({output.name: name for output in shard})
            if _is_whole(partial / name, shard):
                resumed += 1
                continue
            if say is not None:
                say(f"writing {name} ({number} of {len(shards)})")
            _write_shard(shard, partial / name)
        nbytes = sum(output.nbytes for output in outputs)
        if len(shards) > 1:
            index = {"metadata": {"total_size": nbytes}, "weight_map": weight_map}
            (partial / _INDEX).write_text(json.dumps(index, indent=2) + "\n")
        config.save_pretrained(partial)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        elif tokenizer_from is not None:
            _copy_tokenizer(tokenizer_from, partial)
        kept = {NOTE, _INDEX, _SINGLE} | set(weight_map.values())
        _finish(partial, folder, kept)
    parameters = sum(int(torch.Size(output.shape).numel()) for output in outputs)
    return Written(folder, len(shards), resumed, nbytes, parameters)


@contextmanager
def partial_folder(folder: Path, settings: Mapping[str, Any]) -> Iterator[Path]:
    """The folder ``<folder>.partial`` of a conversion with these settings: a new one, or that of an interrupted start.

    What a method keeps in it beside the model goes into its subfolder ``work``, which is removed at the end.

    Raises:
        CheckpointError: where ``folder`` exists, or another conversion is unfinished.
        UsageError: where something in the block cannot be written.
    """
    check_new(folder)
    partial = partial_path(folder)
    told = json.loads(json.dumps(dict(settings)))
    _check_note(partial, told)
    try:
        if _is_new(partial):
            partial.mkdir(parents=True, exist_ok=True)
            _replace_text(partial / NOTE, json.dumps(told, indent=2) + "\n")
        yield partial
    except (OSError, SafetensorError) as error:  # safetensors tells of a full disk by an error of its own
        raise UsageError(f"{str(folder)!r} cannot be written: {error}") from error


def check_output(folder: Path, settings: Mapping[str, Any]) -> None:
    """Refuse, before any work and without writing, what :func:`partial_folder` would refuse.

    Raises:
        CheckpointError: where ``folder`` exists, or another conversion is unfinished.
        UsageError: where it cannot be written.
    """
    check_new(folder)
    _check_note(partial_path(folder), json.loads(json.dumps(dict(settings))))
    existing = next(parent for parent in folder.absolute().parents if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise UsageError(f"{str(folder)!r} cannot be written: {str(existing)!r} is not a folder that may be written to")


def partial_path(folder: Path) -> Path:
    """Where the unfinished model of ``folder`` is."""
    return folder.with_name(f"{folder.name}.partial")


def save_atomically(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a safetensors file that is complete, or not there at all."""
    making = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file(dict(tensors), making, metadata={"format": "pt"})
        os.replace(making, path)
    finally:
        making.unlink(missing_ok=True)


def load_kept(path: Path) -> dict[str, Tensor]:
    """What an earlier start has left in the subfolder ``work``.

    Raises:
        CheckpointError: where the file is damaged; the message says what to remove to have it made again.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{str(path)!r} is damaged: {error}; remove {str(path.parent)!r}, and the same command makes it again"
        ) from error


def _check_note(partial: Path, settings: dict[str, Any]) -> None:
    if _is_new(partial):
        return
    anew = f"to begin anew, remove {str(partial)!r}"
    try:
        noted = dict(json.loads((partial / NOTE).read_bytes()))
    except (OSError, ValueError, TypeError):
        raise CheckpointError(f"{str(partial)!r} is in the way, it holds no conversion to go on with: {anew}") from None
    names = [*settings, *(name for name in noted if name not in settings)]
    if other := [name for name in names if settings.get(name) != noted.get(name)]:
        name = other[0]
        is_digest = str(noted.get(name)).startswith("v1:")
        told = "; digests of what is in it: it is another one, or was changed" if is_digest else ""
        raise CheckpointError(
            f"{str(partial)!r} holds an unfinished conversion with other settings ({name}: {noted.get(name)!r} there, "
            f"{settings.get(name)!r} now{told}): give the same ones to go on; {anew}"
        )


def _is_new(partial: Path) -> bool:
    """Whether nothing is there, or only what a kill before the note has left."""
    if not partial.exists():
        return True
    return partial.is_dir() and all(path.name.startswith(f".{NOTE}.") for path in partial.iterdir())


def _shards(outputs: Sequence[Output], most: int) -> list[list[Output]]:
    shards: list[list[Output]] = [[]]
    size = 0
    for output in outputs:
        if shards[-1] and size + output.nbytes > most:
            shards.append([])
            size = 0
        shards[-1].append(output)
        size += output.nbytes
    return shards


def _is_whole(path: Path, shard: Sequence[Output]) -> bool:
    """Whether an earlier start has written this shard; one with another ``shard_bytes`` had others of the same name."""
    if not path.is_file():
        return False
    try:
        header = read_header(path)
    except CheckpointError:
        return False
    return {name: tuple(entry["shape"]) for name, entry in header.items()} == {o.name: o.shape for o in shard}


def _write_shard(shard: Sequence[Output], path: Path) -> None:
    tensors = {}
    for output in shard:
        tensor = output.make()
        if tuple(tensor.shape) != output.shape or tensor.dtype != output.dtype:
            raise AssertionError(
                f"{output.name} was made as {tensor.dtype} {list(tensor.shape)}, "
                f"not {output.dtype} {list(output.shape)}"
            )
        tensors[output.name] = watch(tensor.contiguous())
        del tensor
    save_atomically(tensors, path)


def _copy_tokenizer(source: Path, folder: Path) -> None:
    for path in sorted(source.iterdir()):
        if path.is_file() and path.name.startswith(_COPIED):
            shutil.copyfile(path, folder / path.name)
    if (source / "additional_chat_templates").is_dir():
        shutil.copytree(source / "additional_chat_templates", folder / "additional_chat_templates", dirs_exist_ok=True)


def _finish(partial: Path, folder: Path, files: set[str]) -> None:
    for path in partial.glob("model*.safetensors"):  # shards of a start with another shard size
        if path.name not in files:
            path.unlink()
    for path in partial.glob(".*"):  # files that a kill has left unfinished, ours and those of safetensors
        path.unlink()
    partial.rename(folder)
    work = folder / "work"  # goes only now: a kill before would have made it to be done again
    try:
        shutil.rmtree(work, ignore_errors=True)
    except KeyboardInterrupt:
        shutil.rmtree(work, ignore_errors=True)
        raise


def _replace_text(path: Path, text: str) -> None:
    making = path.with_name(f".{path.name}.{os.getpid()}")
    making.write_text(text)
    os.replace(making, path)
