"""Token ids to text, piece by piece: whole characters only, and nothing of a stop string."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Protocol
from weakref import WeakKeyDictionary

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

_SPACE = "▁"  # how SentencePiece writes a space
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TextStream:
    """The text of one continuation as its tokens come.

    The pieces together are ``tokenizer.decode`` of all tokens (special tokens skipped, spaces not "cleaned up"), up to
    a stop string: of several, the one that is complete first, whichever tokens it is spread over. A piece never ends
    within a character. Where tokens spell bytes that are no UTF-8, each wrong part becomes one U+FFFD; the tokenizers
    library does the same for byte-level tokenizers, but for SentencePiece's byte tokens it replaces each byte of the
    whole run. Costs the same for every token, however long the text is.

    Args:
        stop: strings that end the text; none of them is empty.
        prompt_ids: what stands before. A SentencePiece tokenizer's first space is dropped as by ``decode`` where a text
            begins, which is after a special token, and kept where one is continued.
        min_tokens: stop strings that are complete before that many tokens are text like any other.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stop: Sequence[str] = (),
        prompt_ids: Sequence[int] = (),
        min_tokens: int = 0,
    ) -> None:
        detokenizer = _detokenizer(tokenizer)
        begins = not prompt_ids or detokenizer.is_special(prompt_ids[-1])
        self._pieces = detokenizer.stream(begins)
        self._stop = tuple(stop)
        self._beginnings = {string[:length] for string in stop for length in range(1, len(string))}
        self._longest = max(map(len, stop), default=1) - 1
        self._held = ""
        self._unstoppable = min_tokens
        self.stopped = False
        """Whether a stop string was met: the text has ended."""

    def push(self, token_ids: Iterable[int]) -> str:
        """The text that is certain now and was not before."""
        new = []
        for token in token_ids:
            self._unstoppable -= 1
            new.append(self._cut(self._pieces.push(token)))
        return "".join(new)

    def finish(self) -> str:
        """What was held back, where no stop string was met; characters that remained incomplete become U+FFFD."""
        rest = self._cut(self._pieces.finish()) + self._held
        self._held = ""
        return rest

    def _cut(self, piece: str) -> str:
        if not self._stop or self.stopped:
            return "" if self.stopped else piece
        text = self._held + piece
        # Before the least number of tokens, too, beginnings are held back: they may be complete after it.
        found = [(at + len(string), at) for string in self._stop if (at := text.find(string)) >= 0]
        if found and self._unstoppable <= 0:
            self.stopped, self._held = True, ""
            return text[: min(found)[1]]
        for start in range(max(0, len(text) - self._longest), len(text)):
            if text[start:] in self._beginnings:
                self._held = text[start:]
                return text[:start]
        self._held = ""
        return text


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> Callable[[int], bytes]:
    """What gives a token's own part of the text, in UTF-8; it may be a part of a character. Special tokens: their name.

    The bytes of all tokens, one after another, are the text.
    """
    return _detokenizer(tokenizer).name


class _Pieces(Protocol):
    def push(self, token: int) -> str: ...
    def finish(self) -> str: ...


class _Detokenizer:
    """What one tokenizer's tokens spell, remembered for every stream of it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._spelled: dict[int, bytes | None] = {}
        self._spell, self._drop_space = _spelling(tokenizer)
        if isinstance(tokenizer, PreTrainedTokenizerFast):
            added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
            self._special = {token for token, entry in added.items() if entry.special}
        else:
            self._special = set(tokenizer.all_special_ids)

    def is_special(self, token: int) -> bool:
        return token in self._special

    def stream(self, begins: bool) -> _Pieces:
        if self._spell is None:
            return _Window(self._tokenizer)
        return _Bytes(self.spelled, self._drop_space if begins else None)

    def spelled(self, token: int) -> bytes | None:
        """A token's part of the text; None where it has none."""
        try:
            return self._spelled[token]
        except KeyError:
            pass
        name = None if token in self._special else self._tokenizer.convert_ids_to_tokens(token)
        self._spelled[token] = spelled = None if name is None or self._spell is None else self._spell(str(name))
        return spelled

    def name(self, token: int) -> bytes:
        if self._spell is not None and token not in self._special:
            return self.spelled(token) or b""
        return str(self._tokenizer.decode([token], clean_up_tokenization_spaces=False)).encode()


class _Bytes:
    """Tokens that each stand for some bytes, whatever is beside them."""

    def __init__(self, spelled: Callable[[int], bytes | None], drop_space: _DropSpace | None) -> None:
        self._spelled = spelled
        self._drop_space = drop_space
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        spelled = self._spelled(token)
        if spelled is None:
            return ""
        if self._drop_space is not None:
            spelled, self._drop_space = self._drop_space(spelled)
        return self._decoder.decode(spelled)

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


class _Window:
    """Any other tokenizer: decodes the last tokens with and without the new one; what is more, is new.

    The tokens before the new one always spell something, so that what a decoder does only at the start of a text
    happens to both.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._decode = partial(tokenizer.decode, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        self._old: list[int] = []
        self._new: list[int] = []

    def push(self, token: int) -> str:
        self._new.append(token)
        text = str(self._decode(self._old + self._new))
        if text.endswith("\ufffd"):
            return ""
        return self._take(text)

    def finish(self) -> str:
        return self._take(str(self._decode(self._old + self._new)))

    def _take(self, text: str) -> str:
        piece = text[len(str(self._decode(self._old))) :]
        # Once the new tokens spell something on their own, nothing before them is needed.
        if str(self._decode(self._new)).strip():
            self._old = self._new
        else:
            self._old = self._old + self._new
        self._new = []
        return piece


_DropSpace = Callable[[bytes], tuple[bytes, "_DropSpace | None"]]


def _spelling(tokenizer: PreTrainedTokenizerBase) -> tuple[Callable[[str], bytes] | None, Any]:
    """How a tokenizer's tokens spell bytes (None: not one by one), and what happens to a text's first space."""
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        return None, None
    decoder = json.loads(tokenizer.backend_tokenizer.to_str())["decoder"] or {}
    if decoder.get("type") == "ByteLevel":
        return partial(_byte_level, alphabet=_byte_alphabet()), None
    if decoder.get("type") == "Metaspace" and decoder["replacement"] == _SPACE:
        return _metaspace, None if decoder["prepend_scheme"] == "never" else _drop_spaces_of_first
    parts = decoder.get("decoders", [])
    kinds = [part["type"] for part in parts]
    if kinds in (["Replace", "ByteFallback", "Fuse"], ["Replace", "ByteFallback", "Fuse", "Strip"]):
        strips = parts[3:] and (parts[3]["content"], parts[3]["start"], parts[3]["stop"])
        if (parts[0]["pattern"], parts[0]["content"]) == ({"String": _SPACE}, " ") and strips in ([], (" ", 1, 0)):
            return _byte_fallback, _drop_one_space if strips else None
    return None, None


def _byte_level(token: str, alphabet: dict[str, int]) -> bytes:
    try:
        return bytes([alphabet[character] for character in token])
    except KeyError:  # an added token, as it stands
        return token.encode()


def _byte_fallback(token: str) -> bytes:
    if byte := _BYTE.fullmatch(token):
        return bytes([int(byte[1], 16)])
    return _metaspace(token)


def _metaspace(token: str) -> bytes:
    return token.replace(_SPACE, " ").encode()


def _drop_one_space(spelled: bytes) -> tuple[bytes, _DropSpace | None]:
    return spelled.removeprefix(b" "), None if spelled else _drop_one_space


def _drop_spaces_of_first(spelled: bytes) -> tuple[bytes, _DropSpace | None]:
    return spelled.replace(b" ", b""), None


def _byte_alphabet() -> dict[str, int]:
    """Character to byte, as GPT-2's encoder.py defines it: printable bytes stand for themselves, others from U+0100."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(256 + place): byte for place, byte in enumerate(others)}


_known: WeakKeyDictionary[PreTrainedTokenizerBase, _Detokenizer] = WeakKeyDictionary()


def _detokenizer(tokenizer: PreTrainedTokenizerBase) -> _Detokenizer:
    if (known := _known.get(tokenizer)) is None:
        known = _known[tokenizer] = _Detokenizer(tokenizer)
    return known
