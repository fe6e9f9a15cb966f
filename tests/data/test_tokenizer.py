"""Training, loading and checking tokenizers."""

from __future__ import annotations

import argparse
import socket
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from moesaic.data import Document, check_fits, encode_documents, load_tokenizer, train_tokenizer
from moesaic.data import tokenizer as module
from moesaic.errors import CheckpointError, ConfigError, DataError

CODE = "def add(first, second):\n    if first:\n        return first + second\n    return None\n\n\n"
DOCUMENTS = [Document("code", "argparse.py", Path(argparse.__file__).read_text())] + [
    Document("prose", f"{n}.txt", f"The first {n} numbers are added, and the second ones are not. " * 9)
    for n in range(20)
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(DOCUMENTS, 400)


@given(st.text())
@example("")
@example(" leading, trailing \t\n ")
@example("\r\n\r\n  x\r\n")
@example("    indented\n\t\tcode  \n\n\n# naïve ↦ 漢字 \U0001f600 e\u0301 \0 \x85\u2028")
@example("it's 1234567890 don't , stop . <|endoftext|> a")
@settings(deadline=None)
def test_any_text_comes_back(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer.eos_token == tokenizer.bos_token == tokenizer.pad_token == "<|endoftext|>"
    assert tokenizer.eos_token_id == tokenizer.bos_token_id == tokenizer.pad_token_id == 0
    assert tokenizer("a")["input_ids"] == tokenizer("a", add_special_tokens=False)["input_ids"]
    assert tokenizer.decode([0, *tokenizer.encode("a")], skip_special_tokens=True) == "a"
    assert tokenizer.model_max_length > 10**9


def test_tokens_are_those_of_code(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer.tokenize("        return") == ["Ġ" * 7, "Ġreturn"]
    assert "".join(tokenizer.tokenize("return")) == "return"  # no space is put before the text
    digits = tokenizer.tokenize("1234567")
    assert max(map(len, digits)) <= 3


def test_the_order_of_documents_does_not_matter(tokenizer: PreTrainedTokenizerFast) -> None:
    again = train_tokenizer(DOCUMENTS[::-1], 400)
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()


def test_vocabulary_size(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(tokenizer) == 400
    assert len(train_tokenizer(DOCUMENTS, 257)) == 257
    with pytest.raises(ConfigError, match="vocab_size is 256; allowed: 257 or more"):
        train_tokenizer(DOCUMENTS, 256)
    with pytest.raises(DataError, match="no document"):
        train_tokenizer([], 400)


def test_a_sample_takes_from_every_domain(tokenizer: PreTrainedTokenizerFast) -> None:
    small = Document("prose", "p.txt", "seldom " * 50)
    large = [Document("code", f"{n}.py", "often " * 1000) for n in range(50)]
    # 350 characters of prose are all in, the rest of 2000 goes to the code.
    taken = list(module._sample([*large, small], 2000))
    assert taken[0] == small.text
    assert sum(map(len, taken)) == 2000
    trained = train_tokenizer([*large, small], 300, sample_size=2000)
    assert "seldom" in trained.get_vocab()


def test_a_long_document_is_encoded_in_pieces_that_change_nothing(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = [Document("code", "a.py", "x = 1\n" * 50), Document("code", "b.py", "y" * 100)]
    whole = [id for ids in encode_documents(tokenizer, documents) for id in ids]
    assert whole == [*tokenizer.encode(documents[0].text), 0, *tokenizer.encode(documents[1].text), 0]
    monkeypatch.setattr(module, "LONGEST_PIECE", 20)
    runs = list(encode_documents(tokenizer, documents))
    assert len(runs) > 2
    ids = [id for run in runs for id in run]
    assert tokenizer.decode(ids) == tokenizer.decode(whole)
    assert ids.count(0) == 2
    assert ids[: whole.index(0)] == whole[: whole.index(0)]


def test_settings_of_the_caller_neither_cut_the_text_nor_change(tokenizer: PreTrainedTokenizerFast) -> None:
    limited = train_tokenizer(DOCUMENTS, 300)
    limited("x y z", truncation=True, max_length=2, padding="max_length")
    truncation = limited.backend_tokenizer.truncation
    ids = next(encode_documents(limited, DOCUMENTS[1:2]))
    assert limited.decode(ids[:-1]) == DOCUMENTS[1].text
    assert limited.backend_tokenizer.truncation == truncation is not None


def test_saved_and_loaded_it_is_the_same(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    for loaded in (load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)):
        assert loaded.encode(CODE) == tokenizer.encode(CODE)
        assert loaded.eos_token_id == loaded.pad_token_id == loaded.bos_token_id == 0
        assert loaded.decode(loaded.encode(" a , b")) == " a , b"
        assert module.tokenizer_fingerprint(loaded) == module.tokenizer_fingerprint(tokenizer)
    assert module.tokenizer_fingerprint(train_tokenizer(DOCUMENTS, 399)) != module.tokenizer_fingerprint(tokenizer)


def test_a_folder_that_also_holds_a_model_of_an_unknown_type(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "not-yet-invented"}')
    assert load_tokenizer(tmp_path).encode(CODE) == tokenizer.encode(CODE)


def test_missing_and_broken_tokenizers(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_network(*args: object, **kwargs: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "create_connection", no_network)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    for name in ("nobody/nothing", "nothing", str(tmp_path / "no" / "where"), "a b/c/d"):
        with pytest.raises(CheckpointError, match="no tokenizer '"):
            load_tokenizer(name)
    (tmp_path / "bare").mkdir()
    with pytest.raises(CheckpointError, match="bare'"):
        load_tokenizer(tmp_path / "bare")
    tokenizer.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    with pytest.raises(CheckpointError, match="is a file"):
        load_tokenizer(path)
    path.write_text(path.read_text()[:1000])
    with pytest.raises(CheckpointError, match="cannot be read") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_without_end_of_text_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(DataError, match="no end-of-text token"):
        next(encode_documents(bare, DOCUMENTS))


def test_check_fits(tokenizer: PreTrainedTokenizerFast) -> None:
    check_fits(tokenizer, 400)
    check_fits(tokenizer, 512)
    with pytest.raises(DataError, match=r"ids go up to 399, the model's vocabulary has 399 entries"):
        check_fits(tokenizer, 399)
