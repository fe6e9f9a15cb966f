"""A run's middle: everything is ready, and the folder is ours."""

from __future__ import annotations

import contextlib
import shlex
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moesaic.data import TokenData
from moesaic.errors import CheckpointError, Interrupted, MoesaicError
from moesaic.hf.causality import later_tokens_seen
from moesaic.hf.state import to_checkpoint
from moesaic.layer import moe_layers
from moesaic.train.checkpoint import Checkpoints, is_disk_full, newest_good
from moesaic.train.describe import data_note, environment, environment_changes, life_note, now, plain, skipped_line
from moesaic.train.display import Display
from moesaic.train.evaluate import DomainResult, bytes_per_token, evaluate
from moesaic.train.folder import RunFolder
from moesaic.train.job import Built, Job
from moesaic.train.loop import NonFiniteError, Trainer
from moesaic.train.metrics import MetricsLog, NoLog
from moesaic.train.recipe_file import recorded_recipe
from moesaic.train.signals import StopRequest


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


class Life:
    """One process's work on a run, or that of several ranks, until its end or theirs.

    Of several ranks each has one and all go the same way; the first one alone has a folder, log and display that do
    something.
    """

    def __init__(
        self, job: Job, built: Built, folder: RunFolder, data: TokenData, trainer: Trainer, display: Display
    ) -> None:
        self.job, self.built, self.recipe = job, built, job.recipe
        self.folder, self.data, self.trainer, self.display = folder, data, trainer, display
        self.world = trainer.world
        self.checkpoints = Checkpoints(folder.checkpoints, self.recipe.train.keep, self.world)
        self.stopped_by: signal.Signals | None = None
        self._log = NoLog()

    def go(self, resume: bool) -> RunResult:
        if resume:
            self._restore()
        with self._explained():
            self._note(resume)
            self._tell_start()
            self.world.first(self._open_log)
            log = self._log
            try:
                with StopRequest(others_may_end_us=self.world.size > 1) as stop:
                    self._train(log, stop)
                    return self._finish(log, stop)
            finally:
                self.display.close()
                self.checkpoints.join()
                with contextlib.suppress(OSError):  # a full disk has been reported by then
                    log.close()

    def _train(self, log: NoLog, stop: StopRequest) -> None:
        settings, trainer = self.recipe.train, self.trainer
        if not trainer.step:
            self.folder.write(results={"before": plain(self._validate(log))})
        self.display.begin(trainer.step, settings.steps)
        self._heed(self.world.sums(self._tell(stop)))
        while trainer.step < settings.steps and not self.stopped_by:
            with self.world.guard(f"step {trainer.step + 1}"):
                metrics = trainer.train_step(self._tell(stop))
            log.step(metrics)
            self.display.step(metrics)
            # The other ranks know of what came since the step's exchange at the next one.
            self._heed(self._tell(stop) if self.world.size == 1 else trainer.heard)
            last = trainer.step == settings.steps
            if settings.eval_every and trainer.step % settings.eval_every == 0 and not last:
                self._validate(log)
            if last or self.stopped_by or (settings.save_every and trainer.step % settings.save_every == 0):
                self._save(log)

    def _tell(self, stop: StopRequest) -> list[float]:
        """What a rank alone may know, and all must act on at the same step: a signal, a checkpoint that failed."""
        return [*stop.counts(), float(self.checkpoints.failed)]

    def _heed(self, told: list[float]) -> None:
        *signals, failures = told
        self.stopped_by = StopRequest.of_counts(signals)
        if failures:
            self.checkpoints.wait()

    def _finish(self, log: NoLog, stop: StopRequest) -> RunResult:
        self.checkpoints.wait()
        self._heed(self.world.sums(self._tell(stop)))
        program = "moesaic" if self.world.size == 1 else "torchrun ... -m moesaic"
        go_on = f"{program} {self.recipe.command} --resume --out {shlex.quote(str(self.folder.path))}"
        if self.stopped_by and not self.trainer.step:
            raise Interrupted(
                f"stopped by {self.stopped_by.name} before the first step: nothing is trained or saved; "
                f"start again with: {go_on}"
            )
        if self.stopped_by:
            raise Interrupted(
                f"stopped by {self.stopped_by.name} after step {self.trainer.step} of {self.recipe.train.steps}, "
                f"which is saved; go on with: {go_on}"
            )
        self.job.settle()
        after = self._validate(log)
        progress = self.trainer.progress()
        before = self.folder.note["results"]["before"]
        results = {"before": before, "after": plain(after), **progress}
        with self.world.guard("saving the model"):
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

    def _validate(self, log: NoLog) -> dict[str, DomainResult]:
        with self.world.guard("validation"):
            results = evaluate(
                self.trainer.model,
                self.data.validation,
                sequence_length=self.recipe.data.sequence_length,
                batch_size=max(1, self.recipe.train.batch_size // self.recipe.train.accumulation),
                max_tokens=self.recipe.train.eval_tokens or None,
                precision=self.trainer.precision,
                bytes_per_token=bytes_per_token(self.data),
                world=self.world,
            )
        log.validation(self.trainer.step, results)
        self.display.validation(self.trainer.step, results)
        return results

    def _save(self, log: NoLog) -> None:
        log.flush()
        about = {
            "recipe": self.recipe.model_dump(mode="json"),
            "data": self.data.fingerprint,
            "progress": self.trainer.progress(),
            "processes": self.world.size,
        }
        with self.world.guard(f"saving step {self.trainer.step}"):
            state = to_checkpoint(self.trainer.state(), self.trainer.model)
            self.checkpoints.save(self.trainer.step, state, about)

    def _open_log(self) -> None:
        self._log = MetricsLog(self.folder.path, self.trainer.step)

    def _restore(self) -> None:
        with self.world.guard("reading the checkpoints"):
            self._restore_newest()

    def _restore_newest(self) -> None:
        checkpoint, damaged = self.world.first(lambda: newest_good(self.folder.checkpoints))
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
        if reason := later_tokens_seen(moe_layers(self.trainer.model)):
            self.display.say(f"warning: the losses are not those of a model that writes text: {reason}")
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
