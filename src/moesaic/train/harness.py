"""Tasks of the lm-evaluation-harness (``lm-eval``) on a model, through its Python API.

The harness brings the tasks' definitions and fetches their data itself, from a hub or from the reader's disk; nothing
of either is ours. It is the extra ``moesaic[lm-eval]``.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moesaic.errors import ConfigError, DataError, MissingDependencyError, did_you_mean
from moesaic.train.on_disk import ModelOnDisk, on_disk


@dataclass(frozen=True)
class TaskResult:
    """What a model reaches in one task.

    Attributes:
        metrics: each metric's value, by its name in the harness and the filter behind it where that is not ``none``
            (``acc``, ``acc_norm``, ``exact_match,strict-match``).
        errors: the standard error of those metrics that have one.
        examples: how many were asked.
    """

    metrics: dict[str, float]
    errors: dict[str, float]
    examples: int


@dataclass(frozen=True)
class TaskReport:
    """Results of one model by task, and of its parent where there is one.

    Attributes:
        few_shot: examples shown before each question; None: as each task says.
        against: the parent's path, and ``parent`` its results; None where there is none.
    """

    model: str
    few_shot: int | None
    tasks: dict[str, TaskResult]
    against: str | None = None
    parent: dict[str, TaskResult] | None = None


def evaluate_tasks(
    path: str | Path | ModelOnDisk,
    tasks: Sequence[str],
    *,
    few_shot: int | None = None,
    max_examples: int | None = None,
    batch_size: int = 8,
    model: PreTrainedModel | None = None,
    against: str | Path | ModelOnDisk | None = None,
) -> TaskReport:
    """Run tasks of the harness on a model folder, and on its parent.

    Args:
        path: a model folder, the folder of a training run, or a model that lies elsewhere
            (:func:`moesaic.convert.gguf_model`).
        tasks: names that the harness knows, or ``.yaml`` files that describe a task of one's own.
        few_shot: examples shown before each question; by default what each task says.
        max_examples: ask at most so many questions of each task; by default all.
        model: run in the place of the folder's own, which is then not loaded, with its tokenizer.
        against: a second model, to be run on the same tasks.

    Raises:
        MissingDependencyError: without lm-eval.
        ConfigError: for an unknown task, or a number out of range.
        DataError: where a task's data cannot be had.
        CheckpointError: where there is no usable model.
    """
    for name, value, least in (
        ("few_shot", few_shot, 0),
        ("max_examples", max_examples, 1),
        ("batch_size", batch_size, 1),
    ):
        if value is not None and value < least:
            raise ConfigError(f"{name} is {value}: it must be at least {least}")
    with _quiet():
        manager, names = _find(tasks)
        models = [on_disk(each) for each in (path, against) if each is not None]
        found = []
        for each in models:
            loaded = each.load() if model is None else model
            found.append(_run(loaded, each.tokenizer, manager, names, few_shot, max_examples, batch_size))
            model = None
    parent = None if against is None else models[1].path
    return TaskReport(models[0].path, few_shot, found[0], parent, None if against is None else found[1])


def _find(tasks: Sequence[str]) -> tuple[Any, list[str]]:
    """The harness's register of tasks, with the files' folders in it, and the tasks' names; nothing is fetched."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise MissingDependencyError(
            "tasks are run by lm-eval, which is not installed: pip install 'moesaic[lm-eval]'"
        ) from error
    names, folders = [], []
    for task in tasks:
        if not task.endswith((".yaml", ".yml")):
            names.append(task)
            continue
        file = Path(task)
        if not file.is_file():
            raise DataError(f"the task {task!r} does not exist: give a .yaml file, or a name that lm-eval knows")
        named = re.search(r"^task:\s*['\"]?([\w.-]+)", file.read_text(encoding="utf-8"), re.MULTILINE)
        if named is None:
            raise DataError(f"{task!r} describes no task: it has no line 'task: NAME'")
        names.append(named[1])
        folders.append(str(file.resolve().parent))
    # The harness reads the thousands of its own tasks for half a minute: not where none of them is asked for.
    manager = TaskManager(include_path=folders or None, include_defaults=len(folders) < len(tasks))
    for name in names:
        if not manager.match_tasks([name]):
            near = did_you_mean(name, manager.all_tasks).partition("allowed:")[0].strip()
            hint = f"{near} " if near else ""
            raise ConfigError(f"lm-eval knows no task {name!r}: {hint}`lm-eval ls tasks` lists them all")
    return manager, names


def _run(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    manager: Any,
    names: list[str],
    few_shot: int | None,
    max_examples: int | None,
    batch_size: int,
) -> dict[str, TaskResult]:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    try:
        told = simple_evaluate(
            model=wrapped,
            tasks=list(names),
            num_fewshot=few_shot,
            limit=max_examples,
            log_samples=False,
            bootstrap_iters=1000,
            task_manager=manager,
        )
    except (OSError, ConnectionError) as error:  # what the harness's data library raises without a network or a file
        text = " ".join(str(error).split())
        raise DataError(f"the data of {', '.join(names)} cannot be had: {text[:200]}") from error
    return {name: _result(values, told["n-samples"].get(name, {})) for name, values in told["results"].items()}


def _result(values: dict[str, Any], samples: dict[str, int]) -> TaskResult:
    metrics: dict[str, float] = {}
    errors: dict[str, float] = {}
    for key, value in values.items():
        name, _, filtered = key.partition(",")
        if not filtered or not isinstance(value, int | float):
            continue
        into = errors if name.endswith("_stderr") else metrics
        shown = name.removesuffix("_stderr") + ("" if filtered == "none" else f",{filtered}")
        into[shown] = float(value)
    return TaskResult(metrics, errors, int(samples.get("effective", 0)))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the harness's own account of what it does, on standard error; warnings and errors are let through."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
