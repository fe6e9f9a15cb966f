"""``moesaic eval``: perplexity on text, by domain, beside that of a parent; or tasks of lm-eval."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from moesaic.errors import UsageError

if TYPE_CHECKING:
    from moesaic.train.evaluation import Evaluation
    from moesaic.train.harness import TaskReport
    from moesaic.train.on_disk import ModelOnDisk


def command(
    model: Annotated[str, typer.Argument(help="A model folder, that of a training run, or a .gguf file.")],
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data",
            "-d",
            help="A file or folder of text, DOMAIN=PATH, or 'stdlib'. Default: the run's own data, else 'stdlib'.",
        ),
    ] = None,
    split: Annotated[
        str,
        typer.Option(
            help="validation: the held-out part; all: everything. Default: all for --data PATH, else validation."
        ),
    ] = "",
    sequence_length: Annotated[
        int, typer.Option(help="Tokens a window; 0: those of the run, else what fits, up to 1024.")
    ] = 0,
    max_tokens: Annotated[int, typer.Option(help="Stop after so many tokens a domain; 0 for all.")] = 0,
    adapter: Annotated[
        str, typer.Option(help="An adapter of the model, to be measured with it: its folder, or that of its run.")
    ] = "",
    batch_size: Annotated[int, typer.Option(help="Windows at a time.")] = 8,
    precision: Annotated[str, typer.Option(help="fp32, or bf16 for autocast.")] = "fp32",
    against: Annotated[
        str,
        typer.Option(
            help="The model that this one was made from, a folder or a .gguf file: also tell how often both predict "
            "the same token, KL(parent ‖ model), and the ratio of their perplexities."
        ),
    ] = "",
    task: Annotated[
        list[str] | None,
        typer.Option(
            "--task",
            help="Instead of perplexity, a task of lm-eval by its name, or a .yaml file that describes one (extra "
            "lm-eval; the harness fetches the data).",
        ),
    ] = None,
    few_shot: Annotated[
        int, typer.Option(help="With --task: examples before each question; -1: as each task says.")
    ] = -1,
    max_examples: Annotated[int, typer.Option(help="With --task: at most so many questions of each; 0 for all.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure the perplexity of our model, or of any causal language model of transformers on disk; or run tasks."""
    adapted = None
    if adapter:
        from moesaic.adapters.merging import load_adapted

        adapted, _ = load_adapted(model, adapter)
    if task:
        from moesaic.train.harness import evaluate_tasks

        if data or split or sequence_length or max_tokens or precision != "fp32":
            raise UsageError("--task runs tasks in place of text: it goes without options that choose or cut text")
        asked = None if few_shot < 0 else few_shot
        found = evaluate_tasks(
            _readable(model),
            task,
            few_shot=asked,
            max_examples=max_examples or None,
            batch_size=batch_size,
            model=adapted,
            against=_readable(against) if against else None,
        )
        _show_tasks(found, as_json)
        return
    if few_shot >= 0 or max_examples:
        raise UsageError("--few-shot and --max-examples belong to --task")
    from moesaic.train.evaluation import evaluate_folder

    report = evaluate_folder(
        _readable(model),
        sources=data,
        split=split or None,
        sequence_length=sequence_length or None,
        max_tokens=max_tokens or None,
        batch_size=batch_size,
        precision=precision,
        model=adapted,
        against=_readable(against) if against else None,
    )
    _show(report, adapter, as_json)


def _readable(path: str) -> str | ModelOnDisk:
    if not path.endswith(".gguf"):
        return path
    from moesaic.convert import gguf_model

    return gguf_model(path)


def _show(report: Evaluation, adapter: str, as_json: bool) -> None:
    from moesaic.cli.output import print_json, print_table
    from moesaic.train.describe import skipped_line

    if report.skipped:
        print(skipped_line(report.skipped), file=sys.stderr)
    if report.text_changed:
        print(f"warning: the text has changed since {report.model} was trained on it", file=sys.stderr)
    if report.not_causal:
        print(f"warning: the figures are not those of a model that writes text: {report.not_causal}", file=sys.stderr)
    if as_json:
        print_json(report)
        return
    print_table(
        f"{' with '.join(filter(None, [report.model, adapter]))}: {report.split} text, "
        f"{report.sequence_length} tokens a window",
        ["domain", "tokens", "loss (nats/token)", "perplexity", "bits/byte"],
        [
            [name, f"{r.tokens:,}", f"{r.loss:.4f}", f"{r.perplexity:.2f}", f"{r.bits_per_byte:.3f}"]
            for name, r in report.domains.items()
        ],
    )
    if report.agreement:
        print_table(
            f"against {report.against}",
            ["domain", "its perplexity", "ratio", "same next token", "KL (nats/token)"],
            [
                [name, f"{a.parent.perplexity:.2f}", f"{a.ratio:.3f}", f"{a.agreement:.1%}", f"{a.kl:.4f}"]
                for name, a in report.agreement.items()
            ],
        )


def _show_tasks(report: TaskReport, as_json: bool) -> None:
    from moesaic.cli.output import print_json, print_table

    if as_json:
        print_json(report)
        return
    rows = []
    for name, result in report.tasks.items():
        for metric, value in result.metrics.items():
            error = result.errors.get(metric)
            cells = [name, f"{result.examples:,}", metric, f"{value:.4f}", "" if error is None else f"± {error:.4f}"]
            rows.append(cells + ([f"{report.parent[name].metrics[metric]:.4f}"] if report.parent else []))
    header = ["task", "examples", "metric", "value", "error", *([report.against] if report.against else [])]
    print_table(f"{report.model}: tasks of lm-eval", header, rows)
