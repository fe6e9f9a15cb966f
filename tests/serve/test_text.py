"""Pieces of text as tokens come: nothing lost, no half characters, nothing of a stop string."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from moesaic.data import train_tokenizer
from moesaic.data.documents import Document
from moesaic.serve.text import TextStream, token_bytes

CORPUS = "the quick brown fox jumps over the lazy dog. the cat, l'été, größer, 你好 and 日本 🙂 ... 1 2 3 " * 5


def byte_level() -> PreTrainedTokenizerFast:
    """As our own training makes them, with an added token of each kind."""
    tokenizer = train_tokenizer([Document("a", "a", CORPUS)], 300)
    tokenizer.add_tokens([AddedToken("<think>", special=False), AddedToken("two words", special=False)])
    return tokenizer


def sentence_piece(strip: bool = True) -> PreTrainedTokenizerFast:
    """As Llama's and Mixtral's (strip), or Gemma's."""
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=specials, show_progress=False)
    tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog"] * 3, trainer)
    spec = tokenizer.to_str()
    # Trained as special so that they come first; in such tokenizers the byte tokens are ordinary entries.
    state = json.loads(spec)
    state["added_tokens"] = [entry for entry in state["added_tokens"] if not entry["content"].startswith("<0x")]
    tokenizer = Tokenizer.from_str(json.dumps(state))
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)] if strip else parts)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def metaspace() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=["<unk>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator([CORPUS], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


def word_piece() -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens spell nothing on their own: spaces depend on the neighbours."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=["[UNK]", "[SEP]"], show_progress=False)
    tokenizer.train_from_iterator([CORPUS], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", sep_token="[SEP]")


TOKENIZERS = {
    "byte level": byte_level(),
    "sentence piece": sentence_piece(),
    "sentence piece, no strip": sentence_piece(strip=False),
    "metaspace": metaspace(),
    "word piece": word_piece(),
}
each = pytest.mark.parametrize("name", TOKENIZERS)
unicode = st.text(st.characters(exclude_categories=["Cs"]), max_size=60) | st.text("the quick🙂é你 \n", max_size=60)


def decode(name: str, ids: Sequence[int]) -> str:
    return str(TOKENIZERS[name].decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def pieces(name: str, ids: Sequence[int], **options: object) -> list[str]:
    stream = TextStream(TOKENIZERS[name], **options)  # type: ignore[arg-type]
    found = [stream.push([token]) for token in ids]
    return [*found, stream.finish()]


@each
@settings(max_examples=60, deadline=None)
@given(text=unicode)
def test_pieces_of_a_text_are_the_text(name: str, text: str) -> None:
    ids = TOKENIZERS[name](text, add_special_tokens=False)["input_ids"]
    assert "".join(pieces(name, ids)) == decode(name, ids)
    if name == "byte level":
        assert decode(name, ids) == text


@pytest.mark.parametrize("name", ["byte level", "metaspace", "word piece"])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_pieces_of_any_tokens_are_what_decode_makes_of_them(name: str, data: st.DataObject) -> None:
    # Ids beyond the tokenizer's (a model's padded vocabulary) and special ones spell nothing.
    ids = data.draw(st.lists(st.integers(0, len(TOKENIZERS[name]) + 3), max_size=40))
    assert "".join(pieces(name, ids)) == decode(name, [token for token in ids if token < len(TOKENIZERS[name])])


@pytest.mark.parametrize("name", ["sentence piece", "sentence piece, no strip"])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_of_byte_tokens_that_are_no_text_only_what_is_wrong_is_replaced(name: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[name]
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=40))
    spelled = b"".join(token_bytes(tokenizer)(token) for token in ids if token >= 3)
    expected = spelled.decode(errors="replace")
    assert "".join(pieces(name, ids)) == (expected.removeprefix(" ") if name == "sentence piece" else expected)


@pytest.mark.parametrize("name", ["byte level", "sentence piece"])
def test_no_piece_holds_a_part_of_a_character(name: str) -> None:
    ids = TOKENIZERS[name]("é🙂你ö", add_special_tokens=False)["input_ids"]
    found = pieces(name, ids)
    assert len(ids) > 4  # so characters are spread over tokens
    assert [piece for piece in found if piece] == ["é", "🙂", "你", "ö"]


def test_a_character_that_stays_incomplete_is_told_at_the_end() -> None:
    tokenizer = TOKENIZERS["byte level"]
    ids = tokenizer("ok🙂")["input_ids"][:-1]
    assert pieces("byte level", ids)[-1] == "�"
    assert "".join(pieces("byte level", ids)) == decode("byte level", ids) == "ok�"


@pytest.mark.parametrize("name", ["sentence piece", "metaspace"])
def test_the_first_space_is_kept_where_a_text_is_continued(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    prompt, new = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("the quick", "brown fox"))
    assert "".join(pieces(name, new, prompt_ids=prompt)) == " brown fox"
    assert "".join(pieces(name, new, prompt_ids=[*prompt, tokenizer.eos_token_id])) == "brown fox"
    assert "".join(pieces(name, new)) == "brown fox"


def cut(text: str, stop: Sequence[str]) -> tuple[str, bool]:
    """The stop string that is complete first ends the text; of two at once, the longer."""
    for end in range(1, len(text) + 1):
        starts = [end - len(string) for string in stop if text[:end].endswith(string)]
        if starts:
            return text[: min(starts)], True
    return text, False


@settings(max_examples=300, deadline=None)
@given(text=st.text("ab é🙂", max_size=30), stop=st.lists(st.text("ab é🙂", min_size=1, max_size=4), max_size=3))
def test_stop_strings_end_the_text_wherever_tokens_divide_it(text: str, stop: list[str]) -> None:
    tokenizer = TOKENIZERS["byte level"]
    ids = tokenizer(text)["input_ids"]
    expected, stopped = cut(text, stop)
    stream = TextStream(tokenizer, stop)
    shown = ""
    for token in ids:
        shown += stream.push([token])
        assert expected.startswith(shown)  # nothing that would have to be taken back
    assert (stopped, "" if stopped else shown) == (stream.stopped, "" if stopped else shown)
    assert shown + stream.finish() == expected
    at_once = TextStream(tokenizer, stop)
    assert at_once.push(ids) + at_once.finish() == expected


def test_only_what_may_become_a_stop_string_is_held_back() -> None:
    tokenizer = TOKENIZERS["byte level"]
    stream = TextStream(tokenizer, ["\n\nEnd"])
    by_character = [stream.push(tokenizer(character)["input_ids"]) for character in "a\nb\n\n\nEn"]
    assert by_character == ["a", "", "\nb", "", "", "\n", "", ""]
    assert stream.push(tokenizer("d of it")["input_ids"]) == "" and stream.stopped
    assert stream.push(tokenizer("more")["input_ids"]) + stream.finish() == ""


def test_a_stop_string_before_the_least_number_of_tokens_is_text() -> None:
    tokenizer = TOKENIZERS["byte level"]
    stream = TextStream(tokenizer, ["z"], min_tokens=3)
    assert stream.push([*tokenizer("z")["input_ids"], *tokenizer("z")["input_ids"]]) == "zz"
    assert not stream.stopped
    assert stream.push(tokenizer("z")["input_ids"]) == "" and stream.stopped


def test_a_stop_string_counts_from_the_token_that_completes_it() -> None:
    tokenizer = TOKENIZERS["byte level"]
    stream = TextStream(tokenizer, ["ab", "xyz"], min_tokens=6)
    pieces = [stream.push(tokenizer(character)["input_ids"]) for character in "abxxyz"]
    assert ("".join(pieces), stream.stopped) == ("abx", True)
    unfinished = TextStream(tokenizer, ["ab"], min_tokens=9)
    assert unfinished.push(tokenizer("aba")["input_ids"]) + unfinished.finish() == "aba"


@each
def test_bytes_of_tokens_are_the_text(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    ids = tokenizer("the quick dog", add_special_tokens=False)["input_ids"]
    joined = b"".join(map(token_bytes(tokenizer), ids)).decode()
    assert joined.replace(" ", "") == "thequickdog" or name == "word piece"
    assert token_bytes(tokenizer)(0).decode() == tokenizer.convert_ids_to_tokens(0)


def test_a_long_text_costs_no_more_per_token() -> None:
    class Counting(PreTrainedTokenizerFast):
        decoded = 0

        def decode(self, token_ids, *args, **kwargs):  # type: ignore[no-untyped-def]
            Counting.decoded += len(token_ids)
            return super().decode(token_ids, *args, **kwargs)

    tokenizer = Counting(tokenizer_object=word_piece().backend_tokenizer, unk_token="[UNK]")
    draw = random.Random(0)
    ids = [draw.randrange(10, len(tokenizer)) for _ in range(1000)]
    stream = TextStream(tokenizer)
    assert len(stream.push(ids)) > 1000
    assert Counting.decoded < 10 * len(ids)
