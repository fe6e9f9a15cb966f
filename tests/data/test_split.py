"""Which side a document is on: by its file's name alone, or its row's text."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.data import Corpus, Document, load_corpus, split_corpus
from moesaic.errors import ConfigError


def corpus_of(names: list[str], domain: str = "d") -> Corpus:
    return Corpus([Document(domain, name, f"text of {name}") for name in names])


def held_out(corpus: Corpus, fraction: float = 0.05) -> set[str]:
    return {document.name for document in split_corpus(corpus, fraction)[1]}


def test_every_document_is_on_one_side_whatever_the_order() -> None:
    names = [f"file{number}.txt" for number in range(2000)]
    train, validation = split_corpus(corpus_of(names))
    assert sorted(d.name for d in train + validation) == sorted(names)
    assert 60 < len(validation) < 140
    random.Random(0).shuffle(names)
    assert split_corpus(corpus_of(names)) == (train, validation)


def test_a_document_stays_where_it_is_when_others_come_and_go() -> None:
    names = [f"file{number}.txt" for number in range(400)]
    assert held_out(corpus_of(names[:200])) == held_out(corpus_of(names)) & set(names[:200])


def test_the_split_is_the_same_for_ever() -> None:
    # Written down: a change would let old checkpoints be validated on text that they were trained on.
    names = [f"file{number}.txt" for number in range(60)]
    assert held_out(corpus_of(names), 0.05) == {"file25.txt", "file28.txt", "file32.txt"}


@given(st.sets(st.text(min_size=1), min_size=2, max_size=8), st.floats(0.01, 0.99))
@settings(deadline=None)
def test_both_sides_of_a_domain_get_something(names: set[str], fraction: float) -> None:
    train, validation = split_corpus(corpus_of(sorted(names)), fraction)
    assert train
    assert validation
    assert {d.name for d in train} | {d.name for d in validation} == names
    assert len(train) + len(validation) == len(names)


def test_each_domain_is_split() -> None:
    domains = ["a", "b", "c"]
    corpus = Corpus([Document(domain, f"{n}.txt", f"{domain} {n}") for domain in domains for n in range(2)])
    for side in split_corpus(corpus):
        assert [d.domain for d in side] == domains


def test_documents_of_one_file_stay_together() -> None:
    files = [f"{number}.py" for number in range(500)]
    code = corpus_of(files, "code").documents
    prose = corpus_of([f"{name}::docstrings" for name in files], "prose").documents
    train, validation = split_corpus(Corpus(code + prose))
    assert len(validation) > 10
    assert not {d.file for d in train} & {d.file for d in validation}


def test_an_inserted_row_moves_no_other(tmp_path: Path) -> None:
    def sides(rows: list[str]) -> tuple[set[str], set[str]]:
        path = tmp_path / "notes.jsonl"
        path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
        train, validation = split_corpus(load_corpus([str(path)]), 0.1)
        return {d.text for d in train}, {d.text for d in validation}

    rows = [f"note {number}" for number in range(300)]
    train, validation = sides(rows)
    assert 15 < len(validation) < 60
    more_train, more_validation = sides(["a new one", *rows])
    assert train <= more_train
    assert validation <= more_validation


def test_a_lone_document_is_cut_at_a_line_near_its_end() -> None:
    text = "".join(f"line {number}\n" for number in range(1000))
    train, validation = split_corpus(Corpus([Document("d", "book.txt", text)]), 0.1)
    assert [train[0].text + validation[0].text] == [text]
    assert train[0].text.endswith("\n")
    assert 0.09 < len(validation[0].text) / len(text) < 0.11
    assert (train[0].name, validation[0].name) == ("book.txt::head", "book.txt::tail")


def test_a_lone_document_of_one_line_is_cut_all_the_same() -> None:
    train, validation = split_corpus(Corpus([Document("d", "a.txt", "title\n" + "word " * 1000)]), 0.1)
    assert 0.09 < len(validation[0].text) / 5006 < 0.11
    assert len(train) == 1


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 1.5, float("nan")])
def test_the_fraction_must_lie_between_0_and_1(fraction: float) -> None:
    with pytest.raises(ConfigError, match="validation_fraction is"):
        split_corpus(corpus_of(["a", "b"]), fraction)
