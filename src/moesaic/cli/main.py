"""The root of the command line: finds the command, runs it, and turns what goes wrong into one line and an exit code.

A command is one file, ``cli/<name>.py``, and one line in :data:`COMMANDS`. The file defines ``command``, a plain
function with typer's annotations (``Annotated[..., typer.Option(...)]``) whose docstring is its help. It returns
nothing; it prints its result to standard output (with ``--json`` exactly one document, by
:func:`moesaic.cli.output.print_json`) and everything else to standard error; it raises
:class:`~moesaic.errors.MoesaicError` to fail. A file is imported only when its command is asked for, and imports heavy
modules inside ``command``, so that every ``--help`` answers at once.

Exit codes: 0 done, 1 failed, 2 wrong usage or bad input, 130 interrupted.
"""

from __future__ import annotations

import errno
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Annotated, Any

import typer

from moesaic.errors import MoesaicError, Told, UsageError, did_you_mean

# Command -> its line in `moesaic --help`; the module is cli/<command>.py.
COMMANDS: dict[str, str] = {
    "train": "Train a model by a recipe; resume an interrupted run.",
    "finetune": "Fine-tune a model on text into an adapter of it.",
    "generate": "Continue a prompt with a model on disk.",
    "eval": "Measure a model's perplexity on text.",
    "convert": "Make a mixture from a dense model; merge models; prune experts.",
    "inspect": "Write a report of how a model routes text to its experts.",
    "export": "Write a model as a plain Qwen3-MoE checkpoint.",
    "quantize": "Write a model with its experts in 8 or 4 bits.",
    "place": "Place experts on ranks by the affinity between layers.",
    "batch": "Compute a file of requests offline.",
    "serve": "Serve a model and its adapters by OpenAI's API, with a page.",
    "plan": "Estimate each strategy's time on a cluster on paper.",
    "bench": "Measure expert layers side by side, correctness beside speed.",
    "doctor": "Say what this machine can do: versions, CPU, backends, speed.",
}
# typer gives no name to the parent of its complaints about arguments.
_UsageError: Any = typer.BadParameter.__base__
_DISK_FULL = {errno.ENOSPC, errno.EDQUOT}
# What an operating system says about the user's files and disk rather than about our code.
_USERS_ERRNOS = {
    *_DISK_FULL,
    errno.EACCES,
    errno.EISDIR,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EPERM,
    errno.EROFS,
}


def main() -> None:
    """Entry point of ``moesaic``: runs ``sys.argv`` and exits."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Run one command line; the exit code. ``MOESAIC_TRACEBACK=1`` lets every error through with its traceback."""
    try:
        code = _invoke(list(arguments) or ["--help"])
        sys.stdout.flush()
        return code
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except BrokenPipeError:
        # Whoever read our output has left. Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        told = None if os.environ.get("MOESAIC_TRACEBACK") == "1" else _tell(error)
        if told is None:
            raise
        message, code = told
        if not isinstance(error, Told):
            print(f"moesaic: error: {message}", file=sys.stderr)
        return code


def _invoke(arguments: list[str]) -> int:
    chosen = arguments[0]
    if not chosen.startswith("-") and chosen not in COMMANDS:
        raise UsageError(f"no such command {chosen!r}: {did_you_mean(chosen, COMMANDS)}")
    # Not standalone: typer then raises its usage errors instead of drawing them in boxes. A command returns nothing,
    # so what comes back is the code of an early exit (--help, --version) or None.
    return app(chosen)(args=arguments, prog_name="moesaic", standalone_mode=False) or 0


def app(chosen: str) -> typer.Typer:
    """The application with every command named and only ``chosen`` imported."""
    root = typer.Typer(
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    root.callback()(_root)
    for name, line in COMMANDS.items():
        function: Callable[..., None] = _not_imported
        if name == chosen:
            function = importlib.import_module(f"moesaic.cli.{name}").command
        root.command(name, short_help=line)(function)
    return root


def _not_imported() -> None:
    raise AssertionError("a command that was not chosen does not run")


def _print_version(wanted: bool) -> None:
    if wanted:
        try:
            version = metadata.version("moesaic")
        except metadata.PackageNotFoundError:
            version = "(not installed, run from its source)"
        print(f"moesaic {version}")
        raise typer.Exit


def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Mixture-of-experts models that adapt while they run."""


def _tell(error: Exception) -> tuple[str, int] | None:
    """One line and an exit code for an error that the user can act on; None for a defect of ours."""
    if isinstance(error, MoesaicError):
        return _one_line(str(error)), error.exit_code
    if isinstance(error, _UsageError):
        message = error.format_message().rstrip(".")
        path = error.ctx.command_path if error.ctx else "moesaic"
        return _one_line(f"{message} (see {path} --help)"), UsageError.exit_code
    if isinstance(error, OSError) and error.errno in _USERS_ERRNOS:
        where = f"{error.filename}: " if error.filename is not None else ""
        code = UsageError.exit_code if error.errno in _DISK_FULL else 1
        return f"{where}{os.strerror(error.errno or 0)}", code
    return None


def _one_line(message: str) -> str:
    return " ".join(message.split())
