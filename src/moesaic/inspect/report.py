"""The report folder: made aside, then put in place as a whole."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from moesaic.errors import UsageError
from moesaic.inspect.analysis import analyze
from moesaic.inspect.figures import write_figures
from moesaic.inspect.findings import find
from moesaic.inspect.page import render_page
from moesaic.inspect.trace import RoutingTrace

PAGE = "index.html"
NUMBERS = "report.json"
TRACE = "trace.npz"


def write_report(trace: RoutingTrace, folder: str | Path) -> dict[str, Any]:
    """Write ``index.html`` (needs no other file), ``report.json``, ``trace.npz`` and pictures into ``folder``.

    The folder appears when it is complete. An earlier report in its place is replaced; a folder with anything
    else in it is left alone. The same trace gives the same files. Returns what ``report.json`` holds: the keys of
    :func:`moesaic.inspect.analyze`, and ``findings``: a list of {title, text, layer, expert}, where the last two are
    null in a finding that is not about one expert, and ``layer`` counts the MoE layers from 0.

    Raises:
        UsageError: where the folder is taken, or the disk does not allow it.
    """
    folder = check_out(folder)
    report = analyze(trace)
    findings = find(report)
    report["findings"] = [vars(finding) for finding in findings]
    aside: Path | None = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        made = aside / "report"
        made.mkdir()
        (made / PAGE).write_text(render_page(trace, report, findings), encoding="utf-8", errors="replace")
        (made / NUMBERS).write_text(json.dumps(report, allow_nan=False, indent=1), encoding="utf-8")
        trace.save(made / TRACE)
        write_figures(report, made)
        _swap(made, folder, aside / "before")
    except OSError as error:
        raise UsageError(f"cannot write the report to {str(folder)!r}: {error.strerror or error}") from error
    finally:
        if aside is not None:
            shutil.rmtree(aside, ignore_errors=True)
    return report


def check_out(folder: str | Path) -> Path:
    """``folder`` as an absolute path, where a report may be put: nothing is there, or an empty folder, or a report.

    Raises:
        UsageError: where it is a file, or a folder with something else in it.
    """
    folder = Path(folder).resolve()
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"cannot write the report to {str(folder)!r}: that is a file; name a folder")
    if folder.is_dir() and any(folder.iterdir()) and not all((folder / name).is_file() for name in (PAGE, NUMBERS)):
        raise UsageError(
            f"cannot write the report to {str(folder)!r}: it holds other files; name a folder that is new, empty, "
            "or an earlier report"
        )
    return folder


def _swap(made: Path, folder: Path, before: Path) -> None:
    """Put ``made`` in place; what was there goes to ``before``, and comes back if the last step fails."""
    if not folder.exists():
        made.rename(folder)
        return
    folder.rename(before)
    try:
        made.rename(folder)
    except OSError:
        before.rename(folder)
        raise
