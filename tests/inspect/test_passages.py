"""Documents to passages: every token once, every character once, every domain alike."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import ByT5Tokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from moesaic.data import Document, train_tokenizer
from moesaic.errors import ConfigError, DataError
from moesaic.inspect import read_documents
from moesaic.inspect.passages import cut_passages, tokenize, vocabulary_of

TEXT = "def café(x):\n    return x + 1  # naïve 你好 🙂\n"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return train_tokenizer([Document("code", "a.py", TEXT * 20)], 300)


def documents(count: int = 6) -> list[Document]:
    made = [Document("code", f"f{i}.py", f"# file {i}\n" + TEXT * (i + 1)) for i in range(count)]
    return [*made, Document("prose", "p.txt", "All work and no play makes Jack a dull boy. " * 30)]


def test_spans_tile_the_text(tokenizer: PreTrainedTokenizerBase) -> None:
    text = TEXT + "🦉 🦉"  # no token of its own: bytes
    found = tokenize(tokenizer, text)
    assert found.token_ids.tolist() == tokenizer.encode(text, add_special_tokens=False)
    assert found.spans[0, 0] == 0
    assert np.array_equal(found.spans[1:, 0], found.spans[:-1, 1])
    assert "".join(found.text[a:b] for a, b in found.spans) == text
    assert (found.spans[:, 0] == found.spans[:, 1]).any()  # the later bytes of a character add none


def test_white_space_that_a_tokenizer_skips_belongs_to_the_next_token() -> None:
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "<s>": 2}, unk_token="<s>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    found = tokenize(PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<s>"), "a  b\n a")
    assert [found.text[x:y] for x, y in found.spans] == ["a", "  b", "\n a"]


def test_a_tokenizer_without_offsets() -> None:
    found = tokenize(ByT5Tokenizer(), "ab c")
    assert found.token_ids.tolist() == ByT5Tokenizer().encode("ab c")
    assert [found.text[a:b] for a, b in found.spans] == ["a", "b", " ", "c", "</s>"]


def test_domains_get_even_shares(tokenizer: PreTrainedTokenizerBase) -> None:
    found = cut_passages(tokenizer, documents(), max_tokens=200, sequence_length=32)
    assert found.passages[0].start == 0
    for before, after in zip(found.passages, found.passages[1:], strict=False):
        assert before.stop == after.start
    assert found.passages[-1].stop == len(found.token_ids) == len(found.spans) == 200
    for domain in ("code", "prose"):
        assert sum(p.stop - p.start for p in found.passages if p.domain == domain) == 100
    assert max(p.stop - p.start for p in found.passages) <= 32
    # Documents take turns before one gives a second passage.
    assert len({p.document for p in found.passages if p.domain == "code"}) >= 3
    for passage in found.passages:
        spans = found.spans[passage.start : passage.stop]
        assert "".join(passage.text[a:b] for a, b in spans) == passage.text
        assert passage.text in next(d.text for d in documents() if d.name == passage.document)


def test_no_part_of_a_document_is_taken_twice(tokenizer: PreTrainedTokenizerBase) -> None:
    found = cut_passages(tokenizer, documents(), max_tokens=1_000_000, sequence_length=32)
    for document in documents():
        own = [p for p in found.passages if p.document == document.name]
        tokens = sum(p.stop - p.start for p in own)
        assert tokens == len(tokenizer.encode(document.text, add_special_tokens=False))
        assert sum(len(p.text) for p in own) == len(document.text)


def test_the_order_of_documents_does_not_matter(tokenizer: PreTrainedTokenizerBase) -> None:
    one = cut_passages(tokenizer, documents(), max_tokens=150, sequence_length=16)
    two = cut_passages(tokenizer, documents()[::-1], max_tokens=150, sequence_length=16)
    assert one.passages == two.passages


def test_vocabulary(tokenizer: PreTrainedTokenizerBase) -> None:
    found = cut_passages(tokenizer, [Document("code", "a", TEXT + "🦉")], max_tokens=500, sequence_length=500)
    names = vocabulary_of(tokenizer, found)
    assert set(names) == set(found.token_ids.tolist())
    assert names[tokenizer.encode("def")[0]] == "def"
    # A token that is only a part of a character goes by the tokenizer's own name.
    first_byte = tokenizer.encode("🦉")[0]
    assert names[first_byte] == tokenizer.convert_ids_to_tokens(first_byte)


def test_bad_requests(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ConfigError, match=r"^tokens is 0: it must be at least 1$"):
        cut_passages(tokenizer, documents(), max_tokens=0, sequence_length=8)
    with pytest.raises(ConfigError, match=r"^sequence length is -1: it must be at least 1$"):
        cut_passages(tokenizer, documents(), max_tokens=8, sequence_length=-1)
    with pytest.raises(DataError, match="no text"):
        cut_passages(tokenizer, [], max_tokens=8, sequence_length=8)


def test_read_documents(tmp_path: Path) -> None:
    for i in range(40):
        (tmp_path / f"{i}.txt").write_text(f"text number {i}, long enough")
    everything = read_documents([f"notes={tmp_path}"])
    held_out = read_documents([f"notes={tmp_path}"], 0.3)
    assert len(everything.documents) == 40
    assert 0 < len(held_out.documents) < 40
    assert {d.name for d in held_out.documents} < {d.name for d in everything.documents}
