"""What models and adapters are called on the command line and in requests."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from moesaic.errors import UsageError

ADAPTER_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"


def parse_adapters(pairs: Iterable[str], base: str) -> dict[str, Path]:
    """``name=path`` of the command line.

    Raises:
        UsageError: for another form, a name that cannot be one, a name twice, or a path without a folder.
    """
    adapters: dict[str, Path] = {}
    for pair in pairs:
        name, separator, path = pair.partition("=")
        if not separator or not path:
            raise UsageError(f"--adapter {pair!r}: write name=path")
        check_name(name, base)
        if name in adapters:
            raise UsageError(f"--adapter {name!r} is given twice: names must differ")
        if not Path(path).is_dir():
            raise UsageError(f"--adapter {name!r}: there is no folder at {path!r}")
        adapters[name] = Path(path)
    return adapters


def default_name(model: str) -> str:
    """What a model is called whose folder is ``model``: the folder's name, or that of the training run around it."""
    folder = Path(model).resolve()
    return folder.parent.name if folder.name == "model" and (folder.parent / "run.json").is_file() else folder.name


def check_name(name: str, base: str) -> None:
    """Refuse what cannot name an adapter."""
    if not re.fullmatch(ADAPTER_NAME, name):
        raise UsageError(
            f"{name!r} cannot name an adapter: allowed are 1 to 64 letters, digits, '.', '_' and '-', "
            "of which the first is a letter or a digit"
        )
    if name == base:
        raise UsageError(f"an adapter cannot be called {name!r}: that is the base model's name")
