"""What kind of token it is: told from its characters, where they stand in their passage, and the document's name.

One set of kinds for code and for prose, so that they can be compared. It is a rule of thumb, not a parser: a passage
begins anywhere in its document, and no language is asked for.
"""

from __future__ import annotations

import keyword
import re
from collections.abc import Iterator
from pathlib import PurePosixPath

import numpy as np
import numpy.typing as npt

from moesaic.inspect.trace import IntArray, Passage, RoutingTrace

KINDS = {
    "keyword": "keywords",
    "name": "the first pieces of names",
    "word": "the first pieces of words",
    "capitalized": "the first pieces of capitalized words",
    "continuation": "the later pieces of words and names",
    "number": "numbers",
    "punctuation": "operators and punctuation",
    "quoted": "comments and strings in code",
    "space": "line breaks and indentation",
    "other": "special tokens and parts of characters",
}
"""Every kind, and how a sentence calls its tokens.

A token is of the kind of its first letter or digit, or of its first visible character where it has neither. In code a
word is a ``keyword`` or a ``name``, and all that stands in comments and string literals is ``quoted`` (but for white
space); in prose a word is a ``word`` or, with an upper-case first letter, ``capitalized``. ``continuation``: it goes
on with a word or name that an earlier token began. ``other``: it adds no character of its own.
"""

_PYTHON = frozenset(keyword.kwlist)
_OTHERS = frozenset(
    re.findall(
        r"\w+",
        """
        abstract alignas async auto await bool boolean break byte case catch chan char class const constexpr continue
        default defer delete do done double elif else end enum esac except export extends extern false fi final finally
        float fn for foreach from func function go goto if impl implements import in inline instanceof int interface
        let local long loop match mod module mut namespace new nil null nullptr of operator override package private
        protected pub public range return select self short signed sizeof static struct super switch template then this
        throw throws trait true try type typedef typename typeof undefined union unsafe unsigned until use using val var
        virtual void volatile when where while with yield
        """,
    )
)
_CODE = frozenset(
    re.findall(
        r"\S+",
        """
        .py .pyi .pyx .c .h .cc .cpp .cxx .hpp .hh .cu .cuh .java .kt .scala .js .jsx .mjs .ts .tsx .go .rs .rb .php .cs
        .swift .m .mm .lua .pl .r .jl .sh .bash .zsh .sql .zig .hs .ml .f90 .vue .proto .css
        """,
    )
)
_PROSE = frozenset([".txt", ".md", ".rst", ".tex", ".html", ".htm", ".adoc", ".org"])
_SIGNS_OF_CODE = re.compile(r"[(){}\[\]=;_<>]")
_CODE_SHARE = 0.05
"""Of a text's visible characters: from this share of brackets, ``=``, ``;`` and ``_`` on it is called code. Nine in ten
windows of Python's own library have more, nine in ten of its docstrings less."""

_WORD = re.compile(r"\w+")
_TRIPLE = re.compile(r'"""|\'\'\'')
_QUOTED = re.compile(
    r'"""(?:\\.|[^\\])*?(?:"""|\Z)'
    r"|'''(?:\\.|[^\\])*?(?:'''|\Z)"
    r'|"(?:\\.|[^"\\\n])*"'
    r"|'(?:\\.|[^'\\\n])*'"
    r"|(?P<hash>(?<!\S)#[^\n]*)"
    r"|(?P<slashes>(?<![:/])//[^\n]*|/\*.*?(?:\*/|\Z))",
    re.DOTALL,
)


def token_kinds(trace: RoutingTrace) -> IntArray:
    """``[N]``: for each token the index of its kind in :data:`KINDS`."""
    names = {kind: i for i, kind in enumerate(KINDS)}
    kinds = [
        names[kind]
        for passage in trace.passages
        for kind in passage_kinds(passage, trace.spans[passage.start : passage.stop].tolist())
    ]
    return np.asarray(kinds, dtype=np.int64)


def passage_kinds(passage: Passage, spans: list[list[int]]) -> Iterator[str]:
    """The kinds of the tokens of one passage, whose characters are those of ``spans`` (pairs of start and stop)."""
    text, suffix = passage.text, _suffix(passage.document)
    is_code = _is_code(text, suffix)
    keywords = _PYTHON if suffix == ".py" else _OTHERS | _PYTHON
    words = {match.start(): match.group() for match in _WORD.finditer(text)}
    begin_of = np.zeros(len(text), dtype=np.int64)  # of the word that a character belongs to
    for start, word in words.items():
        begin_of[start : start + len(word)] = start
    quoted = _quoted(text, suffix) if is_code else np.zeros(len(text), dtype=bool)
    for start, stop in spans:
        piece = text[start:stop]
        found = _first_seen(piece)
        if found is None:
            yield "space" if piece else "other"
            continue
        at = start + found
        if quoted[at]:
            yield "quoted"
        elif not _is_word(text[at]):
            yield "punctuation"
        else:
            begin = int(begin_of[at])
            yield _word_kind(words[begin], keywords if is_code else None, begins=begin >= start)


def _word_kind(word: str, keywords: frozenset[str] | None, *, begins: bool) -> str:
    """Of a token in ``word``, which it begins or goes on with; ``keywords`` of code, None in prose."""
    if word[0].isdigit():
        return "number"
    if not begins:
        return "continuation"
    if keywords is not None:
        return "keyword" if word in keywords else "name"
    return "capitalized" if word[0].isupper() else "word"


def _first_seen(piece: str) -> int | None:
    """Where the first letter or digit of a token is, or its first visible character; None for white space alone."""
    first = None
    for i, character in enumerate(piece):
        if _is_word(character):
            return i
        if first is None and not character.isspace():
            first = i
    return first


def _is_word(character: str) -> bool:
    return _WORD.match(character) is not None


def _suffix(document: str) -> str:
    """Of the file that a document is, or is from (see :class:`moesaic.data.Document`)."""
    file, _, part = document.partition("::")
    return ".txt" if part.startswith("docstrings") else PurePosixPath(file.partition("#")[0]).suffix.lower()


def _is_code(text: str, suffix: str) -> bool:
    """By the document's name where that tells, else by how many of its characters prose seldom has."""
    if suffix in _CODE or suffix in _PROSE:
        return suffix in _CODE
    visible = sum(not character.isspace() for character in text)
    return visible > 0 and len(_SIGNS_OF_CODE.findall(text)) >= _CODE_SHARE * visible


def _quoted(text: str, suffix: str) -> npt.NDArray[np.bool_]:
    """``[characters]``: whether each stands in a comment or a string literal, its quotes and signs included."""
    inside = np.zeros(len(text), dtype=bool)
    begin = 0
    triple = _TRIPLE.search(text)
    if triple and _closes(text, triple):
        # The passage begins within a string of several lines, whose end this is.
        begin = triple.end()
        inside[:begin] = True
    is_python = suffix in (".py", ".pyi", ".pyx")
    for match in _QUOTED.finditer(text, begin):
        if not (is_python and match["slashes"]):
            inside[match.start() : match.end()] = True
    return inside


def _closes(text: str, triple: re.Match[str]) -> bool:
    """Whether the first triple quote of a passage ends a string: nothing follows on its line, and what stands before it
    is neither an opening nor the line on which a definition ends."""
    line_rest = text[triple.end() :].partition("\n")[0].strip(" \t)],.")
    before = text[: triple.start()].rstrip(" \t")
    if line_rest or before.endswith(("=", "(", "[", ",", "{", ":")):
        return False
    return not before.rstrip().endswith(":")
