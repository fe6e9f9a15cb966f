"""A run from recipe to result: the order of things, and what happens when one of them fails."""

from __future__ import annotations

import contextlib
import math
import shlex
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from moesaic.data import Batches, TokenData, validation_windows
from moesaic.errors import CheckpointError, DataError, Interrupted, MoesaicError, UsageError
from moesaic.train.checkpoint import Checkpoints, NoSpaceError, is_disk_full, newest_good
from moesaic.train.describe import data_note, environment, environment_changes, life_note, now, plain, skipped_line
from moesaic.train.display import Display
from moesaic.train.evaluate import DomainResult, bytes_per_token, evaluate
from moesaic.train.folder import RunFolder
from moesaic.train.job import Built, Job, Setting, Training
from moesaic.train.loop import NonFiniteError, Trainer, repeatable
from moesaic.train.metrics import MetricsLog
from moesaic.train.precision import choose_device, choose_precision
from moesaic.train.recipe import Recipe, RunRecipe
from moesaic.train.recipe_file import load_recipe, override, recorded_recipe, with_absolute_paths
from moesaic.train.signals import StopRequest

R = TypeVar("R", bound=RunRecipe)


@dataclass(frozen=True)
class RunResult:
    """What a finished run came to.

    Attributes:
        folder, model: the run's folder, and in it that of what it made: a model, or an adapter of one.
        before, after: validation by domain, before the first step and after the last one.
        steps, tokens: done and predicted in training, all lives of the run together.
        seconds: spent in steps.
        parameters, active_parameters: of the model, and of those the ones that one token meets.
        trained_parameters: those that the optimizer changes.
    """

    folder: Path
    model: Path
    before: dict[str, DomainResult]
    after: dict[str, DomainResult]
    steps: int
    tokens: int
    seconds: float
    parameters: int
    active_parameters: int
    trained_parameters: int


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

    Args:
        overwrite: replace a run that is in the folder.
        cache_dir: of the tokens, see :func:`moesaic.data.prepare`.

    Raises:
        UsageError: for a folder that is in use, not empty or not writable, and for bad settings, data or checkpoints.
        TrainingError: where the loss is not finite or a checkpoint cannot be written; names the last good one.
        Interrupted: on SIGINT or SIGTERM, when the step has been finished and saved.
    """
    display = display or Display()
    run = RunFolder(Path(folder))
    recipe = job.recipe
    job.check()
    device = choose_device(recipe.train.device)
    run.check(resume=resume, overwrite=overwrite)
    with repeatable(recipe.train.threads):
        display.say("reading the data")
        data = job.read(cache_dir)
        batches = _batches(recipe, data)
        _check_validation(recipe, data)
        precision = choose_precision(recipe.train.precision, device)
        recorded = run.read() if resume else None
        if recorded is not None:
            _recorded(run, recorded, type(recipe))
        built = job.build(Setting(data, batches, device, precision, recorded, display.say))
        trainer = Trainer(built.model, batches, recipe.train, device, precision)
        _check_space(run, recipe, built)
        run.open(resume=resume, overwrite=overwrite)
        try:
            return _Run(job, built, run, data, trainer, display).go(resume)
        finally:
            run.close()


class _Run:
    """The middle part of :func:`execute`: everything is ready, and the folder is ours."""

    def __init__(
        self, job: Job, built: Built, folder: RunFolder, data: TokenData, trainer: Trainer, display: Display
    ) -> None:
        self.job, self.built, self.recipe = job, built, job.recipe
        self.folder, self.data, self.trainer, self.display = folder, data, trainer, display
        self.checkpoints = Checkpoints(folder.checkpoints, self.recipe.train.keep)

    def go(self, resume: bool) -> RunResult:
        if resume:
            self._restore()
        with self._explained():
            self._note(resume)
            self._tell_start()
            log = MetricsLog(self.folder.path, self.trainer.step)
            try:
                with StopRequest() as stop:
                    self._train(log, stop)
                    return self._finish(log, stop)
            finally:
                self.display.close()
                self.checkpoints.join()
                with contextlib.suppress(OSError):  # a full disk has been reported by then
                    log.close()

    def _train(self, log: MetricsLog, stop: StopRequest) -> None:
        settings, trainer = self.recipe.train, self.trainer
        if not trainer.step:
            self.folder.write(results={"before": plain(self._validate(log))})
        self.display.begin(trainer.step, settings.steps)
        while trainer.step < settings.steps and not stop.received:
            metrics = trainer.train_step()
            log.step(metrics)
            self.display.step(metrics)
            self.checkpoints.check()
            last = trainer.step == settings.steps
            if settings.eval_every and trainer.step % settings.eval_every == 0 and not last:
                self._validate(log)
            if last or stop.received or (settings.save_every and trainer.step % settings.save_every == 0):
                self._save(log)

    def _finish(self, log: MetricsLog, stop: StopRequest) -> RunResult:
        self.checkpoints.wait()
        go_on = f"moesaic {self.recipe.command} --resume --out {shlex.quote(str(self.folder.path))}"
        if stop.received and not self.trainer.step:
            raise Interrupted(
                f"stopped by {stop.received.name} before the first step: nothing is trained or saved; "
                f"start again with: {go_on}"
            )
        if stop.received:
            raise Interrupted(
                f"stopped by {stop.received.name} after step {self.trainer.step} of {self.recipe.train.steps}, "
                f"which is saved; go on with: {go_on}"
            )
        self.job.settle()
        after = self._validate(log)
        progress = self.trainer.progress()
        before = self.folder.note["results"]["before"]
        results = {"before": before, "after": plain(after), **progress}
        self.job.save(self.folder.path / self.job.result, results)
        self.folder.write(status="finished", ended=now(), results=results)
        return RunResult(
            folder=self.folder.path,
            model=self.folder.path / self.job.result,
            before={name: DomainResult(**result) for name, result in before.items()},
            after=after,
            steps=progress["step"],
            tokens=progress["tokens"],
            seconds=progress["seconds"],
            parameters=self.built.parameters,
            active_parameters=self.built.active_parameters,
            trained_parameters=self.built.trained_parameters,
        )

    def _validate(self, log: MetricsLog) -> dict[str, DomainResult]:
        results = evaluate(
            self.trainer.model,
            self.data.validation,
            sequence_length=self.recipe.data.sequence_length,
            batch_size=max(1, self.recipe.train.batch_size // self.recipe.train.accumulation),
            max_tokens=self.recipe.train.eval_tokens or None,
            precision=self.trainer.precision,
            bytes_per_token=bytes_per_token(self.data),
        )
        log.validation(self.trainer.step, results)
        self.display.validation(self.trainer.step, results)
        return results

    def _save(self, log: MetricsLog) -> None:
        log.flush()
        about = {
            "recipe": self.recipe.model_dump(mode="json"),
            "data": self.data.fingerprint,
            "progress": self.trainer.progress(),
        }
        self.checkpoints.save(self.trainer.step, self.trainer.state(), about)

    def _restore(self) -> None:
        checkpoint, damaged = newest_good(self.folder.checkpoints)
        if checkpoint is None:
            # Killed before its first checkpoint: the run has nothing to go back to, but nothing that differs either.
            self.display.say("there is no checkpoint yet: starting from the beginning")
            self._refuse_differences(self.folder.note["recipe"], self.folder.note.get("data", {}).get("fingerprint"))
            return
        self._refuse_differences(checkpoint.about["recipe"], checkpoint.about["data"])
        self.trainer.restore(checkpoint)
        for one in damaged:
            self.display.say(f"warning: {str(one.path)!r} is damaged ({one.damage}): it is removed and done again")
        self.checkpoints.begin_after(checkpoint, damaged)

    def _refuse_differences(self, recipe: dict[str, Any], fingerprint: str | None) -> None:
        where = str(self.folder.path)
        if differences := self.recipe.differences(recorded_recipe(recipe, where, type(self.recipe))):
            raise CheckpointError(
                f"the run in {where!r} cannot go on with another recipe: {'; '.join(differences)}; "
                "leave them as they were, or start anew in another folder"
            )
        if fingerprint != self.data.fingerprint:
            raise CheckpointError(
                f"the run in {where!r} cannot go on: the text or its tokenizer has changed since "
                f"(fingerprint {fingerprint} then, {self.data.fingerprint} now)"
            )

    def _note(self, resumed: bool) -> None:
        here = environment(self.trainer)
        if resumed and (changes := environment_changes(self.folder.note.get("environment", {}), here)):
            self.display.say(f"warning: the numbers will not be those of an uninterrupted run: {'; '.join(changes)}")
        life = life_note(self.trainer.step)
        self.folder.write(
            name=self.recipe.name,
            command=self.recipe.command,
            status="running",
            started=self.folder.note.get("started", life["started"]),
            ended=None,
            error=None,
            lives=[*self.folder.note.get("lives", []), life],
            recipe=self.recipe.model_dump(mode="json"),
            environment=here,
            data=data_note(self.data),
            model={
                "parameters": self.built.parameters,
                "active_parameters": self.built.active_parameters,
                "trained_parameters": self.built.trained_parameters,
                "vocab_size": self.trainer.model.config.get_text_config().vocab_size,
            },
            **self.built.note,
            results=self.folder.note.get("results", {}),
        )

    def _tell_start(self) -> None:
        counts = self.data.counts["train"]
        text = ", ".join(f"{name} {counts[name].tokens:,}" for name in self.data.domains)
        built, trained = self.built, self.built.trained_parameters
        part = f", {trained / 1e6:.2f} M trained" if trained != built.parameters else ""
        if self.data.skipped:
            self.display.say(f"{skipped_line(self.data.skipped)} (all in run.json)")
        self.display.say(
            f"{built.parameters / 1e6:.1f} M parameters, {built.active_parameters / 1e6:.1f} M per token{part}; "
            f"training tokens: {text}; {self.trainer.precision} on {self.trainer.device}; folder {self.folder.path}"
        )
        if self.trainer.step:
            self.display.say(f"going on after step {self.trainer.step}")

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Wait for the checkpoint in flight, name the last good one, and say in ``run.json`` how the run ended."""
        try:
            try:
                yield
            except NonFiniteError as error:
                self.checkpoints.wait()
                raise NonFiniteError(f"{error}; {self.checkpoints.good()}") from None
            except MoesaicError:
                raise
            except Exception as error:
                if not is_disk_full(error, self.folder.path):
                    raise
                self.checkpoints.join()
                raise self.checkpoints.failure("the run could not be recorded", error) from error
        except BaseException as error:
            status = "interrupted" if isinstance(error, Interrupted | KeyboardInterrupt) else "failed"
            with contextlib.suppress(OSError):  # where the disk is full, the error itself matters more
                self.folder.write(status=status, ended=now(), error=str(error) or type(error).__name__)
            raise


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
