"""Kinds of tokens: what a reader would say they are."""

from __future__ import annotations

import re

import numpy as np
import pytest
from tests.inspect.traces import made_up_trace

from moesaic.inspect import Passage
from moesaic.inspect.kinds import KINDS, passage_kinds, token_kinds

# As a byte-level tokenizer cuts text before it learns merges: words with the space before them.
PIECES = re.compile(r" ?[A-Za-z_]+| ?\d+| ?[^\sA-Za-z_\d]+|\s+")


def kinds_of(document: str, text: str) -> list[tuple[str, str]]:
    spans = [list(match.span()) for match in PIECES.finditer(text)]
    assert "".join(text[a:b] for a, b in spans) == text
    kinds = passage_kinds(Passage("any", document, text, 0, len(spans)), spans)
    return [(text[a:b], kind) for (a, b), kind in zip(spans, kinds, strict=True)]


def told(document: str, text: str) -> dict[str, str]:
    return dict(kinds_of(document, text))


def test_code() -> None:
    text = (
        "def half_of(x1, *rest):\n"
        '    """Half "of it\'s" kind."""\n'
        '    y = 10.5 if x1 else "no # it"  # so 7\n'
        "    return not y\n"
    )
    kinds = told("a.py", text)
    own = {kind: {piece.strip() for piece, of in kinds.items() if of == kind} for kind in KINDS}
    assert own["keyword"] == {"def", "if", "else", "return", "not"}
    assert own["name"] == {"half_of", "x", "rest", "y"}
    assert own["continuation"] == {"1"}  # of x1
    assert own["number"] == {"10", "5"}
    assert own["quoted"] == {'"""', "Half", '"', "of", "it", "'", "s", "kind", '."""', "no", "#", "so", "7"}
    assert own["space"] == {""}
    assert {"=", "(", ",", "*", "):", "."} == own["punctuation"]
    assert own["word"] == own["capitalized"] == own["other"] == set()


def test_a_comment_sign_in_a_string_begins_no_comment() -> None:
    kinds = kinds_of("a.py", 'f("# no", x) # yes\n')
    assert [kind for piece, kind in kinds if piece in (" x", " yes")] == ["name", "quoted"]


def test_prose() -> None:
    kinds = told("b.txt", "The cat, if it is 3, sat in Paris.\n")
    assert (kinds["The"], kinds[" Paris"]) == ("capitalized", "capitalized")
    assert {kinds[piece] for piece in (" cat", " if", " it", " in")} == {"word"}  # keywords of no language here
    assert (kinds[" 3"], kinds[","], kinds["\n"]) == ("number", "punctuation", "space")


def test_later_pieces_of_a_word() -> None:
    text = " unbelievably x1y 2024"
    spans = [[0, 3], [3, 9], [9, 13], [13, 15], [15, 16], [16, 17], [17, 19], [19, 22]]
    kinds = list(passage_kinds(Passage("any", "t.txt", text, 0, len(spans)), spans))
    assert kinds == ["word", "continuation", "continuation", "word", "continuation", "continuation", "number", "number"]


def test_tokens_of_several_signs_are_of_their_first_word() -> None:
    text = "f(self).g ()"
    spans = [[0, 1], [1, 6], [6, 9], [9, 12]]
    assert list(passage_kinds(Passage("any", "a.py", text, 0, 4), spans)) == ["name", "name", "name", "punctuation"]


def test_a_token_without_characters() -> None:
    assert list(passage_kinds(Passage("any", "a.py", "", 0, 1), [[0, 0]])) == ["other"]


@pytest.mark.parametrize(
    ("text", "inside"),
    [
        ('end of it.\n    """\n    x = 1\n', {"end", " of", " it"}),  # begins in a docstring
        ('def f():\n    """\n    of it.\n    """\n    x = 1\n', {"of", " it"}),
        ('def f():\n    """of it."""\n    x = 1\n', {"of", " it"}),
        ('t = """\nof it\n"""\nx = 1\n', {"of", " it"}),
        ("def f():\n    x = 1\n    # of it\n", {" of", " it"}),
        ("x = 1 // of\n", set()),
    ],
)
def test_strings_of_several_lines(text: str, inside: set[str]) -> None:
    kinds = kinds_of("a.py", text)
    assert {piece for piece, kind in kinds if kind == "quoted" and re.search(r"[a-z]", piece)} == inside


def test_other_languages() -> None:
    kinds = told("main.go", "func add(x int) int { // sum\n\treturn x /* of two */\n}\n")
    assert all(kinds[piece] == "keyword" for piece in ("func", " int", "return"))
    assert all(kinds[piece] == "quoted" for piece in (" sum", " of", " two"))
    assert kinds[" add"] == "name"
    assert told("page.js", 'open("https://x.org/if"); let y')[" let"] == "keyword"


def test_code_is_told_by_its_signs_where_the_name_does_not_tell() -> None:
    assert told("rows.jsonl#0af3", "for (int i = 0; i < n; i++) { total += a[i]; }")["for"] == "keyword"
    assert (
        told("rows.jsonl#0af3", "We looked for it (in vain) for three long days, and then for three more.")[" for"]
        == "word"
    )
    assert told("lib/ast.py::docstrings", "Look for the (x) in [y]; it is = {z}.")[" for"] == "word"
    assert told("lib/ast.py::head", "x = [y for y in z]")[" for"] == "keyword"


def test_every_token_has_a_kind() -> None:
    trace = made_up_trace()
    kinds = token_kinds(trace)
    assert kinds.shape == (trace.num_tokens,)
    names = np.asarray(list(KINDS))[kinds]
    assert set(names[trace.token_ids == 13]) == {"other"}  # the empty piece
    assert set(names[(trace.token_ids == 2) | (trace.token_ids == 3)]) == {"space"}
