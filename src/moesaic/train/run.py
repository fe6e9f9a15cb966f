"""A run from recipe to result: the order of things, and what happens when one of them fails."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from moesaic.data import Batches, TokenData, validation_windows
from moesaic.errors import CheckpointError, ConfigError, DataError, UnsupportedError, UsageError
from moesaic.hf.causality import has_been_told
from moesaic.hf.parallelize import parallelize
from moesaic.train.checkpoint import NoSpaceError, begin_random
from moesaic.train.display import Display
from moesaic.train.folder import RunFolder
from moesaic.train.job import Built, Job, Setting, Training
from moesaic.train.life import Life, RunResult
from moesaic.train.loop import Trainer, repeatable
from moesaic.train.precision import choose_device, choose_precision
from moesaic.train.recipe import ParallelSettings, Recipe, RunRecipe
from moesaic.train.recipe_file import load_recipe, override, recorded_recipe, with_absolute_paths
from moesaic.train.world import World, joined, launch, launched, own_device

R = TypeVar("R", bound=RunRecipe)
# Seconds that a process which is being killed may still hold the folder.
_DYING = 10.0


def choose(
    words: Sequence[str],
    out: str | Path | None = None,
    *,
    resume: bool = False,
    sources: Sequence[str] | None = None,
    kind: type[R] = Recipe,  # type: ignore[assignment]
) -> tuple[R, Path]:
    """The recipe and the run folder that a command line means.

    Args:
        words: at most one recipe file, and any number of ``key=value``.
        out: ``runs/<name of the recipe>`` by default.
        resume: without a recipe file, that of the run in the folder is meant.
        sources: short for ``data.sources``.
        kind: of recipe, and so of run.

    Raises:
        UsageError: for two files, a missing one, or data that is named twice.
        ConfigError: for what a recipe does not allow.
        CheckpointError: where there is no run to resume.
    """
    overrides = [word for word in words if "=" in word and not Path(word).is_file()]
    files = [word for word in words if word not in overrides]
    if len(files) > 1:
        raise UsageError(f"give at most one recipe file, not {len(files)}: {', '.join(files)}")
    if sources and any(word.partition("=")[0].strip() in ("data.sources", "sources") for word in overrides):
        raise UsageError("the data is named twice: give either --data or data.sources=...")
    recipe = load_recipe(files[0] if files else None, overrides, kind)
    folder = Path(out) if out is not None else Path("runs") / recipe.name
    if resume and not files:
        run = RunFolder(folder)
        run.check(resume=True, overwrite=False)
        recipe = override(_recorded(run, run.read(), kind), overrides)
    if sources:
        recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"sources": list(sources)})})
    return with_absolute_paths(recipe), folder


def train(
    recipe: Recipe,
    folder: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    display: Display | None = None,
    cache_dir: str | Path | None = None,
) -> RunResult:
    """Train by a recipe into a folder, or go on with the run that is in it; see :func:`execute`."""
    job = Training(with_absolute_paths(recipe))
    return execute(job, folder, resume=resume, overwrite=overwrite, display=display, cache_dir=cache_dir)


def execute(
    job: Job,
    folder: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    display: Display | None = None,
    cache_dir: str | Path | None = None,
) -> RunResult:
    """Do a job in a folder, or go on with the run that is in it.

    Under ``torchrun`` all ranks call it, and do it together. What goes wrong is raised on all of them.

    Args:
        display: shows the run; of several ranks that of the first one.
        overwrite: replace a run that is in the folder.
        cache_dir: of the tokens, see :func:`moesaic.data.prepare`.

    Raises:
        UsageError: for a folder that is in use, not empty or not writable, and for bad settings, data or checkpoints.
        TrainingError: where the loss is not finite or a checkpoint cannot be written; names the last good one.
        Interrupted: on SIGINT or SIGTERM, which may come to any rank, when the step has been finished and saved.
        ParallelError: where a rank is gone.
    """
    job.check()
    device = own_device(choose_device(job.recipe.train.device))
    with joined(device, _parallel(job).timeout) as world:
        run = RunFolder(Path(folder), is_ours=world.is_first)
        display = display if display and world.is_first else Display()
        _check_rows(job.recipe, world)
        if restarted := world.first(lambda: _is_restarted(run)):
            display.say("started anew by torchrun: going on with the run in the folder")
        resume, overwrite = resume or restarted, overwrite and not restarted
        world.first(lambda: run.check(resume=resume, overwrite=overwrite))
        with repeatable(job.recipe.train.threads):
            life = _prepared(job, run, world, device, display, resume, cache_dir)
            world.first(lambda: run.open(resume=resume, overwrite=overwrite))
            try:
                run.note = world.first(lambda: run.note)
                return life.go(resume)
            finally:
                run.close()


def _prepared(
    job: Job,
    run: RunFolder,
    world: World,
    device: torch.device,
    display: Display,
    resume: bool,
    cache_dir: str | Path | None,
) -> Life:
    """Data, model and optimizer: all that is needed before the folder is taken."""
    recipe = job.recipe
    display.say("reading the data")
    data = world.in_turn(lambda: job.read(cache_dir))
    batches = _batches(recipe, data)
    _check_validation(recipe, data)
    precision = choose_precision(recipe.train.precision, device)
    recorded = world.first(run.read) if resume else None
    if recorded is not None:
        _recorded(run, recorded, type(recipe))
    built = job.build(Setting(data, batches, device, precision, recorded, display.say, world))
    world.first(lambda: _check_space(run, recipe, built))
    if world.size > 1:
        with world.guard("spreading the model over the ranks"):
            how = _parallel(job)
            parallelize(built.model, strategy=how.strategy, overlap=how.overlap, exchange=how.exchange)
    if world.rank:  # else all ranks would draw the same noise for their tokens
        begin_random(world.rank)
    has_been_told(built.model)  # of a router that looks at later tokens, by Life, and only on the first rank
    trainer = Trainer(built.model, batches, recipe.train, device, precision, world)
    return Life(job, built, run, data, trainer, display)


def _parallel(job: Job) -> ParallelSettings:
    if job.parallel is None and launched() > 1:
        raise UnsupportedError(
            f"moesaic {job.recipe.command} runs in one process, not in {launched()}: start it without torchrun"
        )
    return job.parallel or ParallelSettings()


def _check_rows(recipe: RunRecipe, world: World) -> None:
    rows = recipe.train.batch_size // recipe.train.accumulation
    if rows < world.size:
        raise ConfigError(
            f"train.batch_size / train.accumulation is {rows}: it must be at least {world.size}, the processes that "
            "share its sequences"
        )
    if recipe.train.compile and world.size > 1:
        raise ConfigError("train.compile is true: it must be false where more than one process trains")


def _is_restarted(run: RunFolder) -> bool:
    """Whether torchrun has started its workers anew, and the run in the folder is theirs."""
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")):
        # A process that is being killed lets go of the folder when it is gone.
        run.wait_until_free(_DYING)
    return run.holds_run_of(launch())


def _recorded(run: RunFolder, note: dict[str, Any], kind: type[R]) -> R:
    """The recipe of a run that is to be gone on with; refuses the run of another command."""
    # Runs of the first version do not say which command made them.
    if (command := note.get("command", Recipe.command)) != kind.command:
        raise CheckpointError(
            f"the run in {str(run.path)!r} is one of 'moesaic {command}': go on with it by that command"
        )
    return recorded_recipe(note["recipe"], str(run.path / "run.json"), kind)


def _batches(recipe: RunRecipe, data: TokenData) -> Batches:
    return Batches(
        data.train,
        sequence_length=recipe.data.sequence_length,
        batch_size=recipe.train.batch_size,
        seed=recipe.train.seed,
        mixture=recipe.data.mixture,
    )


def _check_validation(recipe: RunRecipe, data: TokenData) -> None:
    try:
        validation_windows(data.validation, recipe.data.sequence_length)
    except DataError as error:
        raise DataError(f"the part held out for validation is too small: {error}") from None


def _check_space(run: RunFolder, recipe: RunRecipe, built: Built) -> None:
    """Refuse a disk that cannot hold the checkpoints and the result, before hours are spent on them."""
    parameters = 4 * built.trained_parameters
    saves = math.ceil(recipe.train.steps / (recipe.train.save_every or recipe.train.steps))
    # Weights and two moments each; one more than are kept exists while it is written.
    needed = 3 * parameters * min(recipe.train.keep + 1, saves) + parameters
    existing = next(folder for folder in (run.path, *run.path.absolute().parents) if folder.exists())
    free = shutil.disk_usage(existing).free + (run.size() if run.path.exists() else 0)
    if free < needed:
        raise NoSpaceError(
            f"no space left for the run in {str(run.path)!r}: its checkpoints and result need "
            f"{needed / 2**20:,.0f} MiB and {free / 2**20:,.0f} MiB are free; "
            "choose another folder with --out, or keep fewer with train.keep"
        )
