"""Checkpoints: written in the background, published whole, the newest good one always kept.

    <folder>/step-00000100/       one checkpoint: torch.distributed.checkpoint's files and ``complete.json``
    <folder>/step-00000200.tmp/   one that is being written, or that a killed run left behind

``complete.json`` lists every file with its size and checksum. It is written last, everything is synced to the disk, and
only then the folder gets its name; an older checkpoint is removed only after that. Of several ranks each writes its own
part of the tensors, and the first one does the rest; any number of ranks can load what any other number has written.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save

from moesaic.errors import CheckpointError, TrainingError
from moesaic.hf.state import to_checkpoint
from moesaic.parallel.liveness.watch import is_communication
from moesaic.train.world import World, portable

MARKER = "complete.json"
_NAME = re.compile(r"step-(\d{8,})")
# Not strict: what is frozen is not there, and whether the rest is all there is a matter of checksums.
_TRAINED = StateDictOptions(ignore_frozen_params=True, strict=False)

# A run in one process needs no process group, and says nothing about it.
warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)


class NoSpaceError(TrainingError):
    """The disk is full; the message names the last good checkpoint."""

    exit_code = 2


@dataclass(frozen=True)
class Checkpoint:
    """A published checkpoint, whole or not. ``about`` is what the run said of itself when it was written."""

    path: Path
    step: int
    about: dict[str, Any]
    damage: str | None = None


def published(folder: Path) -> Iterator[Checkpoint]:
    """All published checkpoints, the newest first; files are compared with their checksums as one gets there."""
    for path in _newest_first(folder):
        yield _inspect(path)


def newest_good(folder: Path) -> tuple[Checkpoint | None, list[Checkpoint]]:
    """The newest whole checkpoint, and the damaged ones that are newer; (None, []) where there is none at all.

    Raises:
        CheckpointError: where there are checkpoints but every one is damaged.
    """
    damaged: list[Checkpoint] = []
    for checkpoint in published(folder):
        if checkpoint.damage is None:
            return checkpoint, damaged
        damaged.append(checkpoint)
    if damaged:
        raise CheckpointError(
            f"no checkpoint in {str(folder)!r} is whole: "
            + "; ".join(f"{checkpoint.path.name}: {checkpoint.damage}" for checkpoint in damaged)
        )
    return None, []


def training_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, progress: Mapping[str, Any], world: World | None = None
) -> dict[str, Any]:
    """All that the next step depends on: weights, buffers, optimizer, random streams, and ``progress``; each rank's own
    stream is under a key of its own.

    Parameters that require no gradient never change, and are not in it; neither are the optimizer's settings, which the
    recipe gives.
    """
    model_state, optimizer_state = get_state_dict(model, optimizer, options=_TRAINED)
    device = next(model.parameters()).device
    # As bytes, which may be empty: a run that began on a CPU can then go on on a GPU.
    random = {
        "cpu": torch.get_rng_state().numpy().tobytes(),
        "cuda": torch.cuda.get_rng_state(device).numpy().tobytes() if device.type == "cuda" else b"",
    }
    return {
        "model": model_state,
        "optimizer": {"state": optimizer_state["state"]},
        _random_key((world or World()).rank): random,
        "progress": dict(progress),
    }


def restore(
    checkpoint: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer, world: World | None = None
) -> dict[str, Any]:
    """Load a checkpoint into a model and its optimizer, and set the random streams; returns its ``progress``.

    It may have been written by another number of ranks. Those that had no random stream then begin one that follows
    from the first rank's, and their number.

    Raises:
        CheckpointError: where it does not fit the model, or cannot be read after all.
    """
    world = world or World()
    state = training_state(model, optimizer, checkpoint.about["progress"], world)
    begins = world.rank >= checkpoint.about.get("processes", 1)
    key = _random_key(0 if begins else world.rank)
    state[key] = state.pop(_random_key(world.rank))
    try:
        # What it loads into are the tensors of the model and the optimizer themselves.
        stored = to_checkpoint(state, model, stored=checkpoint.path)
        load(stored, checkpoint_id=checkpoint.path, process_group=world.patient)
    except (Exception, CheckpointException) as error:  # torch's is no Exception, but a BaseException
        reason = " ".join(str(_root_cause(error)).split())[:300]
        raise CheckpointError(f"the checkpoint {str(checkpoint.path)!r} cannot be loaded: {reason}") from error
    if begins:
        begin_random(world.rank, stored[key])
    else:
        _set_random(stored[key], next(model.parameters()).device)
    return dict(stored["progress"])


def _random_key(rank: int) -> str:
    return f"random_{rank}" if rank else "random"


def begin_random(rank: int, streams: Mapping[str, bytes] | None = None) -> None:
    """Give a rank a random stream of its own: it follows from its number and the first rank's stream, the present one
    by default."""
    first = torch.get_rng_state().numpy().tobytes() if streams is None else streams["cpu"]
    found = hashlib.blake2b(first + str(rank).encode(), digest_size=7)
    torch.manual_seed(int.from_bytes(found.digest(), "big"))


def _set_random(streams: Mapping[str, bytes], device: torch.device) -> None:
    random = {name: torch.frombuffer(bytearray(data), dtype=torch.uint8) for name, data in streams.items() if data}
    torch.set_rng_state(random["cpu"])
    if "cuda" in random and device.type == "cuda":
        torch.cuda.set_rng_state(random["cuda"], device)


class Checkpoints:
    """The folder of a run's checkpoints, with at most one being written at a time.

    Of several ranks all call the same methods in the same order, and all find out whether a checkpoint was written;
    but not at the same time: :attr:`failed` is for telling the others, before all call :meth:`wait`.

    Args:
        folder: made when the first checkpoint is written.
        keep: how many are kept, at least 1.
    """

    def __init__(self, folder: Path, keep: int, world: World | None = None) -> None:
        self.folder, self.keep, self.world = folder, keep, world or World()
        self.last_good: Path | None = None
        self._thread: threading.Thread | None = None
        self._failure: tuple[int, BaseException] | None = None

    @property
    def failed(self) -> bool:
        """Whether this rank knows by now that a checkpoint could not be written, and :meth:`check` would raise."""
        return self._failure is not None

    def begin_after(self, loaded: Checkpoint, damaged: Iterable[Checkpoint]) -> None:
        """Go on from ``loaded``; the ``damaged`` ones, which are newer, are removed: nothing can be read from them."""
        if self.world.is_first:
            for checkpoint in damaged:
                shutil.rmtree(checkpoint.path, ignore_errors=True)
        self.last_good = loaded.path

    def save(self, step: int, state: dict[str, Any], about: Mapping[str, Any]) -> None:
        """Copy ``state`` and write the copy in the background; waits for the one before.

        Args:
            state: as :func:`moesaic.hf.state.to_checkpoint` gives it.
            about: JSON values kept beside the state; ``about["progress"]`` must be the state's.

        Raises:
            TrainingError: where the checkpoint before could not be written.
        """
        self.wait()
        making = self.folder / f"step-{step:08d}.tmp"
        try:
            self.world.first(lambda: _make_anew(making))
            # Returns when the copy is made; from then on training may change the tensors.
            written = async_save(state, checkpoint_id=making, process_group=self.world.writing)
        except Exception as error:
            if self.world.is_first:
                shutil.rmtree(making, ignore_errors=True)
            self._failure = (step, error)
            self.check()
        # Not a daemon: a process that ends for another reason still finishes its checkpoint.
        self._thread = threading.Thread(target=self._publish, args=(step, making, written, dict(about)))
        self._thread.start()

    def wait(self) -> None:
        """Until nothing is being written; raises as :meth:`check` does."""
        self.join()
        self.check()

    def join(self) -> None:
        """Until nothing is being written, whether it succeeded or not."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def check(self) -> None:
        """Raise :class:`TrainingError` where a checkpoint could not be written; where a rank is gone, an error that
        names it.
        """
        if self._failure is None:
            return
        (step, error), self._failure = self._failure, None
        cause = _root_cause(error)
        if self.world.size > 1 and is_communication(cause):
            with self.world.guard(f"writing the checkpoint of step {step}"):  # names the rank
                raise cause
        raise self.failure(f"the checkpoint of step {step} could not be written", cause) from error

    def failure(self, what: str, cause: BaseException) -> TrainingError:
        """An error that says what failed and why, and names the last good checkpoint."""
        if is_disk_full(cause, self.folder):
            return NoSpaceError(f"{what}: no space left on the disk of {str(self.folder.parent)!r}; {self.good()}")
        reason = getattr(cause, "strerror", None) or str(cause) or type(cause).__name__
        return TrainingError(f"{what}: {' '.join(reason.split())}; {self.good()}")

    def good(self) -> str:
        """Which checkpoint is the last good one, as the end of a message."""
        return (
            f"the last good checkpoint is {str(self.last_good)!r}" if self.last_good else "there is no checkpoint yet"
        )

    def _publish(self, step: int, making: Path, written: Any, about: dict[str, Any]) -> None:
        path = self.folder / f"step-{step:08d}"
        failure: BaseException | None = None
        try:
            written.result()
            if self.world.is_first:
                seal(making, about)
                if path.exists():  # the same step of an earlier life of this run, damaged
                    shutil.rmtree(path)
                os.rename(making, path)
                _sync(self.folder)
        except BaseException as error:
            failure = error
        if failure := self._of_first(failure):
            self._failure = (step, failure)
            if self.world.is_first:
                shutil.rmtree(making, ignore_errors=True)
            return
        self.last_good = path
        if self.world.is_first:
            self._prune(step)

    def _of_first(self, failure: BaseException | None) -> BaseException | None:
        """This rank's failure, or else rank 0's."""
        if self.world.size == 1:
            return failure
        told = [failure and portable(failure)]
        try:
            dist.broadcast_object_list(told, src=0, group=self.world.writing)
        except RuntimeError as error:  # a rank is gone
            return failure or error
        return failure or told[0]

    def _prune(self, published: int) -> None:
        # What has a higher number is of an earlier life of the run, and must not displace what is known to be good.
        ours = [path for path in _newest_first(self.folder) if _step(path) <= published]
        for path in [*ours[self.keep :], *self.folder.glob("step-*.tmp")]:
            shutil.rmtree(path, ignore_errors=True)


def _make_anew(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def seal(folder: Path, about: Mapping[str, Any]) -> None:
    """Write the marker that makes a checkpoint complete, and have all of it on the disk."""
    files = {path.name: {"bytes": path.stat().st_size, "blake2b": _checksum(path)} for path in sorted(folder.iterdir())}
    note = {"about": dict(about), "files": files}
    with open(folder / MARKER, "w", encoding="utf-8") as file:
        json.dump(note, file)
        file.flush()
        os.fsync(file.fileno())
    for name in files:
        _sync(folder / name)
    _sync(folder)


def is_disk_full(error: BaseException, folder: Path) -> bool:
    """Whether an error says that there is no space, or quota, left; some writers only say that writing failed."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return "No space left" in str(error) or _free_bytes(folder) < 1 << 20


def _newest_first(folder: Path) -> list[Path]:
    return sorted((path for path in folder.glob("step-*") if _NAME.fullmatch(path.name)), key=_step, reverse=True)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _inspect(path: Path) -> Checkpoint:
    step = _step(path)
    try:
        note = json.loads((path / MARKER).read_bytes())
        files, about = note["files"], dict(note["about"])
        for name, expected in files.items():
            size = (path / name).stat().st_size
            if size != expected["bytes"]:
                return Checkpoint(path, step, {}, f"{name} has {size} bytes of {expected['bytes']}")
            if _checksum(path / name) != expected["blake2b"]:
                return Checkpoint(path, step, {}, f"{name} is damaged")
    except FileNotFoundError as error:
        return Checkpoint(path, step, {}, f"{Path(error.filename).name} is missing")
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return Checkpoint(path, step, {}, f"{MARKER} cannot be read")
    return Checkpoint(path, step, about)


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _free_bytes(folder: Path) -> int:
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _root_cause(error: BaseException) -> BaseException:
    """The error beneath the wrappings of torch.distributed.checkpoint; an :class:`OSError` where there is one."""
    return next((inner for inner in _causes(error) if isinstance(inner, OSError)), list(_causes(error))[-1])


def _causes(error: BaseException) -> Iterator[BaseException]:
    yield error
    # CheckpointException keeps (exception, traceback) by rank.
    for failure in getattr(error, "failures", {}).values():
        yield from _causes(failure[0])
    if error.__cause__ is not None:
        yield from _causes(error.__cause__)
