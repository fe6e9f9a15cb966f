"""The default corpus: the standard library of the running Python, as the domains ``code`` and ``prose``.

``code`` is the sources without their docstrings; ``prose`` is the help topics and the docstrings. So no text
is in both domains, and a domain is one kind of text. Nothing is downloaded, and one Python always gives one
corpus.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import re
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from moesaic.data.documents import Document, Skipped, SourceFile
from moesaic.data.files import decode
from moesaic.errors import DataError

CODE = "code"
PROSE = "prose"

# Other people's code, tests, and tables of code points: no text that a reader of the library would miss.
LEFT_OUT = {
    "__pycache__",
    "_bundled",
    "dist-packages",
    "encodings",
    "idlelib",
    "lib-dynload",
    "lib2to3",
    "pydoc_data",
    "site-packages",
    "test",
    "tests",
}

# Written in C, so their docstrings are in no source file. Each imports without side effects; one that this
# interpreter lacks is passed over.
BUILT_IN = """
    _asyncio _bisect _bz2 _collections _contextvars _csv _ctypes _curses _datetime _decimal _functools
    _hashlib _heapq _io _json _lzma _operator _pickle _queue _random _signal _socket _sqlite3 _ssl _struct
    _thread _tracemalloc _weakref array atexit binascii builtins cmath errno fcntl gc grp itertools marshal
    math mmap posix pwd pyexpat resource select sys termios time unicodedata zlib
"""

SHORTEST_DOCSTRING = 120
"""Characters. Shorter ones say little more than the name ("Return the size.") and have no context."""

SHORTEST_SHARED_PARAGRAPH = 60
"""Characters. A shorter paragraph may occur often without being a copy (a heading, "For example:")."""


def find_library(root: Path | None = None) -> list[SourceFile]:
    """The source files of the standard library, sorted; ``root`` is where it lies (default: this Python's).

    Raises :class:`DataError` where the interpreter came without sources.
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    found = []
    for folder, subfolders, names in os.walk(root):
        kept = (name for name in subfolders if name not in LEFT_OUT and not name.startswith("config-"))
        subfolders[:] = sorted(kept)
        for name in sorted(names):
            if name.endswith(".py"):
                path = Path(folder, name)
                relative = path.relative_to(root).as_posix()
                found.append(SourceFile("stdlib", f"stdlib/{relative}", path, library=True))
    if not found:
        raise DataError(
            f"this Python has no sources of its standard library in {root}; name your own text instead, "
            "as PATH or DOMAIN=PATH"
        )
    return found


def read_library(source_files: Sequence[SourceFile]) -> Iterator[Document | Skipped]:
    """Code and prose documents of the files that :func:`find_library` found, and of what has no file."""
    written = Paragraphs()
    # Topics first, the longest first: a long one contains short ones whole, and should not be left with
    # holes.
    for name, text in sorted(_help_topics().items(), key=lambda topic: (-len(topic[1]), topic[0])):
        if fresh := written.fresh(text):
            yield Document(PROSE, f"help/{name}", fresh)
    for file in source_files:
        try:
            source = decode(file.path.read_bytes())
            module = ast.parse(source)
        except OSError as error:
            yield Skipped(str(file.path), f"cannot be read: {error.strerror or error}")
        except (ValueError, SyntaxError) as error:
            yield Skipped(str(file.path), str(error))
        else:
            yield from _read_module(file.name, source, module, written)
    for name in BUILT_IN.split():
        try:
            built_in = importlib.import_module(name)
        except ImportError:
            continue
        if text := written.join(_built_in_docstrings(built_in)):
            yield Document(PROSE, f"builtin/{name}", text)


class Paragraphs:
    """Leaves out the paragraphs that were seen before: topics quote each other, and ``_io`` quotes ``_pyio``."""

    def __init__(self) -> None:
        self._seen: set[str] = set()

    def fresh(self, text: str) -> str:
        """``text`` without paragraphs that earlier texts had; empty when less than half of it is left."""
        kept = []
        for paragraph in re.split(r"\n\s*\n", text):
            words = " ".join(paragraph.split())
            if len(words) >= SHORTEST_SHARED_PARAGRAPH:
                if words in self._seen:
                    continue
                self._seen.add(words)
            kept.append(paragraph.rstrip())
        left = "\n\n".join(kept).strip("\n")
        return left if 2 * len(left) > len(text) else ""

    def join(self, docstrings: Iterator[str]) -> str:
        """One text of all docstrings that are long enough and new."""
        fresh = (self.fresh(text) for text in docstrings if len(text) >= SHORTEST_DOCSTRING)
        return "\n\n".join(text for text in fresh if len(text) >= SHORTEST_DOCSTRING)


def _help_topics() -> dict[str, str]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions leave the topics out
        return {}
    return dict(topics)


def _read_module(name: str, source: str, module: ast.Module, written: Paragraphs) -> Iterator[Document]:
    found = list(_docstrings(module))
    only_a_docstring = len(module.body) == 1 and bool(found) and found[0].statement is module.body[0]
    if module.body and not only_a_docstring and not _is_a_table(source, module):
        yield Document(CODE, name, _without(source, found))
    if text := written.join(inspect.cleandoc(docstring.text) for docstring in found):
        yield Document(PROSE, f"{name}::docstrings", text)


@dataclass(frozen=True)
class _Docstring:
    """A docstring and where it stands. ``alone``: the body has no other statement."""

    statement: ast.stmt
    text: str
    alone: bool


def _docstrings(scope: ast.AST) -> Iterator[_Docstring]:
    """Docstrings in the order of the source, nested scopes included."""
    if isinstance(scope, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and scope.body:
        match scope.body[0]:
            case ast.Expr(value=ast.Constant(value=str(text))) as statement:
                yield _Docstring(statement, text, alone=len(scope.body) == 1)
    # Only statements hold scopes: walking the expressions too would take most of the time.
    for block in ("body", "handlers", "orelse", "finalbody"):
        statements = getattr(scope, block, None)
        if isinstance(statements, list):
            for statement in statements:
                yield from _docstrings(statement)


def _without(source: str, docstrings: Sequence[_Docstring]) -> str:
    """``source`` without its docstrings, still valid Python."""
    # ast counts columns in UTF-8 bytes, and ends lines at "\n" only.
    lines = source.encode().split(b"\n")
    for docstring in reversed(docstrings):
        statement = docstring.statement
        first, last = statement.lineno - 1, (statement.end_lineno or statement.lineno) - 1
        before, after = lines[first][: statement.col_offset], lines[last][statement.end_col_offset :]
        if docstring.alone or before.strip() or after.strip():
            lines[first : last + 1] = [before + b"pass" + after]
            continue
        last += 1
        while last < len(lines) and not lines[last].strip():
            last += 1
        lines[first:last] = []
    return b"\n".join(lines).decode()


def _is_a_table(source: str, module: ast.Module) -> bool:
    """Whether more than half of the lines are long literal containers (character names, build settings)."""
    lines = 0
    for statement in module.body:
        if isinstance(statement, (ast.Assign, ast.AnnAssign)) and statement.value is not None:
            value = statement.value
            if isinstance(value, ast.Call) and value.args:
                value = value.args[0]
            entries = value.keys if isinstance(value, ast.Dict) else getattr(value, "elts", ())
            if len(entries) > 50:
                lines += (statement.end_lineno or statement.lineno) - statement.lineno + 1
    return lines > 0.5 * source.count("\n")


def _built_in_docstrings(module: ModuleType) -> Iterator[str]:
    """Docstrings of a module written in C, of its functions and classes, and of the methods of these."""
    yield _doc(module)
    for _, member in sorted(vars(module).items()):
        if isinstance(member, type):
            yield _doc(member)
            for _, method in sorted(vars(member).items()):
                if inspect.isroutine(method):
                    yield _doc(method)
        elif inspect.isbuiltin(member):
            yield _doc(member)


def _doc(thing: object) -> str:
    text = getattr(thing, "__doc__", None)
    return inspect.cleandoc(text) if isinstance(text, str) else ""
