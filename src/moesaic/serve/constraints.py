"""Text that has to match a JSON schema, a regular expression or a grammar: which tokens may come next."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Hashable
from typing import Any

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerFast

from moesaic.errors import ConfigError, MissingDependencyError
from moesaic.serve.request import FinishReason, SamplingParams
from moesaic.serve.schemas import endless_part
from moesaic.serve.vocabulary import Vocabulary

_KEPT = 32  # compiled grammars per tokenizer
_KEPT_TOKENIZERS = 4
# Characters. Compiling takes up to the square of it, on a thread that all requests with a constraint share.
_LONGEST = 1 << 17
# llguidance's own limits, 250,000 lexer states and a fuel of 1,000,000, allow hundreds of megabytes for one grammar:
# "(a{1000}){1000}" takes 200 of them.
_LEXER_STATES = 25_000
_LEXER_FUEL = 250_000
# Between the parts of a JSON document: enough for the usual layouts, and no endless run of spaces.
_JSON_SPACE = r"( |\n {0,32})?"
_KINDS = {"json_schema": "JSON schema", "regex": "regular expression", "grammar": "grammar"}


class Constraint:
    """What one continuation may still say. Made by :func:`constraint_of`; not shared between continuations."""

    def __init__(self, matcher: Any, vocabulary: Vocabulary) -> None:
        self._matcher = matcher
        self._size = vocabulary.size
        self._ends = frozenset(vocabulary.end_ids)

    def mask(self) -> npt.NDArray[np.bool_]:
        """[vocabulary size]: which tokens may come next; end tokens where the text may end here."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        return np.unpackbits(bits, count=self._size, bitorder="little").view(np.bool_)

    def accept(self, token: int) -> FinishReason | None:
        """Take in a chosen token; whether the text has ended with it.

        "stop" where the text is complete and nothing may follow; "length" where it can not be completed because the
        grammar became too large to follow.
        """
        accepted = self._matcher.consume_token(token)
        if self._matcher.is_error() or not accepted:
            return "length"
        return "stop" if self._matcher.is_stopped() or token in self._ends else None


def compile_constraint(params: SamplingParams, vocabulary: Vocabulary) -> None:
    """Compile what ``params`` demand of the text, so that :func:`constraint_of` finds it; may take a second.

    Raises:
        ConfigError: for a schema, expression or grammar that is wrong, not supported or cannot be met.
        MissingDependencyError: without llguidance.
    """
    _prototype(params, vocabulary)


def constraint_of(params: SamplingParams, vocabulary: Vocabulary) -> Constraint | None:
    """A new constraint for one continuation; None where ``params`` demand none. Raises as compile_constraint."""
    prototype = _prototype(params, vocabulary)
    return None if prototype is None else Constraint(prototype.deep_copy(), vocabulary)


def constraints_in(params: SamplingParams) -> dict[str, str]:
    """Those of ``json_schema``, ``regex`` and ``grammar`` that are set."""
    return {kind: text for kind in _KINDS if (text := getattr(params, kind)) is not None}


class _Compiler:
    """The compiled grammars of one tokenizer; those used last are kept."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._llguidance = _import_llguidance()
        self._tokenizer = self._read(vocabulary)
        self._ends = vocabulary.end_ids
        self._limits = self._llguidance.LLParserLimits(
            max_lexer_states=_LEXER_STATES, initial_lexer_fuel=_LEXER_FUEL, verbose_errors=False
        )
        self._compiled: OrderedDict[tuple[str, str], Any] = OrderedDict()
        self._lock = threading.Lock()

    def compiled(self, kind: str, text: str) -> Any:
        if len(text) > _LONGEST:
            raise ConfigError(f"the {_KINDS[kind]} has {len(text)} characters: it may have at most {_LONGEST}")
        key = kind, text
        with self._lock:
            if key in self._compiled:
                self._compiled.move_to_end(key)
                return self._compiled[key]
        # Not under the lock: another thread's grammar does not wait for a slow one.
        matcher = self._compile(kind, text)
        with self._lock:
            self._compiled[key] = matcher
            while len(self._compiled) > _KEPT:
                self._compiled.popitem(last=False)
        return matcher

    def _compile(self, kind: str, text: str) -> Any:
        library = self._llguidance.LLMatcher
        if kind == "json_schema":
            _check_schema(text)
            options = {"whitespace_pattern": _JSON_SPACE, "lenient": False}
            try:
                grammar = library.grammar_from_json_schema(text, overrides=options)
            except ValueError as error:  # of what Python reads as JSON, and Rust does not
                raise ConfigError(f"the JSON schema cannot be used: {_reason(str(error))}") from error
        elif kind == "regex":
            grammar = library.grammar_from_regex(text)
        else:
            grammar = library.grammar_from_lark(text)
        wrong, messages = library.validate_grammar_with_warnings(grammar, self._tokenizer, limits=self._limits)
        if wrong:
            raise ConfigError(f"the {_KINDS[kind]} cannot be used: {_reason(messages[0])}")
        matcher = library(self._tokenizer, grammar, log_level=0, limits=self._limits)
        matcher.compute_bitmask()  # that no text matches shows only when the first token is asked for
        if matcher.is_error() and "NoExtension" in matcher.get_error():
            raise ConfigError(f"the {_KINDS[kind]} cannot be met: there is no text that matches it")
        if matcher.is_error():
            raise ConfigError(f"the {_KINDS[kind]} cannot be used: {_reason(matcher.get_error())}")
        if self._is_too_large(matcher):
            raise ConfigError(f"the {_KINDS[kind]} cannot be used: it is too large to be followed")
        return matcher

    def _is_too_large(self, matcher: Any) -> bool:
        """Whether it cannot take the first token of a text: a grammar's size shows only when it is gone through."""
        ahead = matcher.deep_copy()
        allowed = np.unpackbits(np.frombuffer(ahead.compute_bitmask(), np.uint8), bitorder="little")
        allowed[list(self._ends)] = 0
        ahead.consume_tokens([int(allowed.argmax())] if allowed.any() else [])
        return bool(ahead.is_error())

    def _read(self, vocabulary: Vocabulary) -> Any:
        if not vocabulary.end_ids:
            raise ConfigError("constrained output needs a model with an end token, and this one names none")
        if not isinstance(vocabulary.tokenizer, PreTrainedTokenizerFast):
            raise ConfigError("constrained output needs a tokenizer.json, and this model has none")
        try:
            return self._llguidance.hf.from_tokenizer(
                vocabulary.tokenizer, n_vocab=vocabulary.size, eos_token=list(vocabulary.end_ids)
            )
        except ValueError as error:
            raise ConfigError(f"this model's tokenizer cannot be constrained: {_reason(str(error))}") from error


_compilers: OrderedDict[Hashable, _Compiler] = OrderedDict()
_opening = threading.Lock()


def _prototype(params: SamplingParams, vocabulary: Vocabulary) -> Any:
    wanted = constraints_in(params)
    if not wanted:
        return None
    [(kind, text)] = wanted.items()
    return _compiler(vocabulary).compiled(kind, text)


def _compiler(vocabulary: Vocabulary) -> _Compiler:
    """The one of this vocabulary, whichever copy of its tokenizer is asked for: a server has several."""
    with _opening:
        if vocabulary.key not in _compilers:
            _compilers[vocabulary.key] = _Compiler(vocabulary)
            while len(_compilers) > _KEPT_TOKENIZERS:
                _compilers.popitem(last=False)
        _compilers.move_to_end(vocabulary.key)
        return _compilers[vocabulary.key]


def _check_schema(text: str) -> None:
    try:
        schema = json.loads(text)
        endless = endless_part(schema)  # by recursion, too
    except ValueError as error:
        raise ConfigError(f"the JSON schema is no JSON: {error}") from error
    except RecursionError:
        raise ConfigError("the JSON schema is nested too deeply") from None
    if not isinstance(schema, dict):
        raise ConfigError("the JSON schema must be an object")
    if endless is not None:
        raise ConfigError(f"the JSON schema cannot be met: {endless} requires itself, so that no document would end")


def _import_llguidance() -> Any:
    try:
        import llguidance
        import llguidance.hf
    except ImportError as error:
        raise MissingDependencyError(
            "constrained output needs llguidance: pip install 'moesaic[serve]'",
        ) from error
    return llguidance


def _reason(message: str) -> str:
    """The line of a message that says what is wrong; others show where, with a drawing."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    told = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    reason = (told or lines or ["unknown reason"])[0]
    return reason if len(reason) <= 200 else f"{reason[:197]}..."
