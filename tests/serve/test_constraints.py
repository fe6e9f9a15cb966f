"""Whatever the logits, the text matches; what no text could match is refused before anything runs."""

from __future__ import annotations

import copy
import json
import re
import resource
import sys
from pathlib import Path
from typing import Any

import jsonschema_rs
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.serve.test_text import sentence_piece, word_piece
from transformers import PreTrainedTokenizerFast

from moesaic.data import train_tokenizer
from moesaic.data.documents import Document
from moesaic.errors import ConfigError, MissingDependencyError
from moesaic.serve import constraints, schemas
from moesaic.serve.constraints import compile_constraint, constraint_of
from moesaic.serve.request import SamplingParams
from moesaic.serve.sampling import Sampler, make_state
from moesaic.serve.schemas import endless_part
from moesaic.serve.text import TextStream
from moesaic.serve.vocabulary import Vocabulary

TEXT = 'the quick brown fox {"name": "a b", "size": [1, 2.5, true, null]} größer 🙂 2026-11-23 ' * 20


def vocabulary(tokenizer: PreTrainedTokenizerFast, padding: int = 13) -> Vocabulary:
    """With columns of logits that no token stands for, as models have them."""
    return Vocabulary(tokenizer, len(tokenizer) + padding, (tokenizer.eos_token_id,))


VOCABULARIES = {
    "byte level": vocabulary(train_tokenizer([Document("a", "a", TEXT)], 350)),
    "sentence piece": vocabulary(sentence_piece()),
}
each = pytest.mark.parametrize("name", VOCABULARIES)


def write(params: SamplingParams, vocabulary: Vocabulary, seed: int, limit: int = 600) -> tuple[str, str]:
    """(text, why it ended) of a continuation by random logits."""
    state = make_state(params, [], vocabulary, 0)
    stream = TextStream(vocabulary.tokenizer)
    random = torch.Generator().manual_seed(seed)
    text = ""
    for _ in range(limit):
        logits_1V = torch.randn(1, vocabulary.size, generator=random) * 3
        token = Sampler().sample(logits_1V, [state])[0].token
        state.output_ids.append(token)
        reason = state.accept(token)
        if token not in vocabulary.end_ids:
            text += stream.push([token])
        if reason is not None:
            return text + stream.finish(), reason
    return text + stream.finish(), "limit"


SCHEMAS: list[dict[str, Any]] = [
    {"type": "integer", "minimum": -5, "maximum": 1200},
    {"type": "string", "minLength": 2, "maxLength": 12},
    {"enum": ["größer", 3, None, {"a": [1]}]},
    {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 8},
            "day": {"type": "string", "format": "date"},
            "tags": {"type": "array", "items": {"enum": ["x", "y"]}, "minItems": 1, "maxItems": 3},
            "size": {"anyOf": [{"type": "boolean"}, {"type": "null"}]},
        },
        "required": ["name", "tags"],
        "additionalProperties": False,
    },
    {
        "$ref": "#/$defs/list",
        "$defs": {
            "list": {
                "type": "object",
                "properties": {"v": {"type": "boolean"}, "next": {"anyOf": [{"$ref": "#/$defs/list"}, {"const": 0}]}},
                "required": ["v", "next"],
                "additionalProperties": False,
            }
        },
    },
]


@each
@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: next(iter(schema)))
def test_sampled_text_is_valid_by_its_schema(name: str, schema: dict[str, Any]) -> None:
    validator = jsonschema_rs.validator_for(schema, validate_formats=True)
    params = SamplingParams(json_schema=json.dumps(schema), seed=1)
    ended = 0
    for seed in range(8):
        text, reason = write(params, VOCABULARIES[name], seed)
        if reason == "stop":
            ended += 1
            validator.validate(json.loads(text))
    assert ended >= 6  # a list may be long


# Of classes that Python and Rust define alike: there, \w and \d are more.
REGEXES = [
    r"([0-9]{3}-){1,9}[0-9]{4}",
    r"[a-f]{2,30}|größer|🙂+",
    r"(yes|no)(, (yes|no)){0,3}\.",
    r"[^@\n]{1,20}@x(\.y)?",
]


@each
@pytest.mark.parametrize("regex", REGEXES)
def test_sampled_text_matches_its_regex(name: str, regex: str) -> None:
    for seed in range(6):
        text, reason = write(SamplingParams(regex=regex, seed=2), VOCABULARIES[name], seed)
        assert reason == "stop" and re.fullmatch(regex, text), text


@settings(max_examples=25, deadline=None)
@given(
    choices=st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=9), min_size=1), seed=...
)
def test_any_choice_of_texts_is_kept_to(choices: list[str], seed: int) -> None:
    schema = json.dumps({"enum": choices})
    text, reason = write(SamplingParams(json_schema=schema, seed=seed), VOCABULARIES["byte level"], seed % 2**32)
    assert reason == "stop" and json.loads(text) in choices


@each
def test_sampled_text_follows_its_grammar(name: str) -> None:
    grammar = 'start: sum\nsum: NUMBER (" + " sum)?\nNUMBER: /[0-9]{1,3}/'
    for seed in range(6):
        text, reason = write(SamplingParams(grammar=grammar, seed=3), VOCABULARIES[name], seed)
        assert reason == "stop" and re.fullmatch(r"\d{1,3}( \+ \d{1,3})*", text)


def test_greedy_choice_keeps_to_it_too() -> None:
    text, reason = write(SamplingParams(temperature=0, regex="[0-9]{4}"), VOCABULARIES["byte level"], 0)
    assert reason == "stop" and re.fullmatch("[0-9]{4}", text)


def test_a_text_that_is_complete_ends_without_an_end_token() -> None:
    words = VOCABULARIES["byte level"]
    made = constraint_of(SamplingParams(regex="ab+|c"), words)
    assert made is not None
    letter = {character: words.tokenizer(character)["input_ids"][0] for character in "abc"}
    assert not made.mask()[words.end_ids[0]]
    assert made.accept(letter["a"]) is None and made.accept(letter["b"]) is None
    mask = made.mask()
    assert mask[words.end_ids[0]] and mask[letter["b"]] and mask.shape == (words.size,)
    assert made.accept(words.end_ids[0]) == "stop"
    other = constraint_of(SamplingParams(regex="ab+|c"), words)
    assert other is not None and other.accept(letter["c"]) == "stop"


def test_every_end_token_may_end_a_text() -> None:
    words = VOCABULARIES["byte level"]
    several = Vocabulary(words.tokenizer, words.size, (words.end_ids[0], 40))
    made = constraint_of(SamplingParams(regex="a*"), several)
    assert made is not None and set(several.end_ids) <= set(np.flatnonzero(made.mask()))
    assert made.accept(40) == "stop"


def test_a_token_that_does_not_fit_ends_the_text_as_incomplete() -> None:
    words = VOCABULARIES["byte level"]
    made = constraint_of(SamplingParams(regex="abc"), words)
    assert made is not None and made.accept(words.tokenizer("x")["input_ids"][0]) == "length"


def test_a_grammar_is_compiled_once_and_those_used_last_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []
    compile_one = constraints._Compiler._compile

    def counting(self: Any, kind: str, text: str) -> Any:
        compiled.append(text)
        return compile_one(self, kind, text)

    monkeypatch.setattr(constraints._Compiler, "_compile", counting)
    monkeypatch.setattr(constraints, "_KEPT", 2)
    words, twice = VOCABULARIES["sentence piece"], SamplingParams(regex="twice")
    for regex in ["once", "once", "twice", "once", "thrice", "once", "twice"]:
        compile_constraint(SamplingParams(regex=regex), words)
    assert compiled == ["once", "twice", "thrice", "twice"]
    assert constraint_of(SamplingParams(regex="twice"), words) is not constraint_of(
        SamplingParams(regex="twice"), words
    )
    assert compiled == ["once", "twice", "thrice", "twice"]
    assert constraint_of(SamplingParams(), words) is None
    copied = Vocabulary(copy.deepcopy(words.tokenizer), words.size, words.end_ids)  # a server's own tokenizer
    assert constraint_of(twice, copied) is not None
    assert compiled == ["once", "twice", "thrice", "twice"]
    other_size = Vocabulary(words.tokenizer, words.size + 1, words.end_ids)
    made = constraint_of(twice, other_size)
    assert made is not None and len(made.mask()) == words.size + 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"json_schema": "not json"}, "the JSON schema is no JSON: Expecting value: line 1 column 1 (char 0)"),
        ({"json_schema": "[1]"}, "the JSON schema must be an object"),
        ({"json_schema": "false"}, "the JSON schema must be an object"),
        ({"json_schema": '{"type": "int"}'}, "the JSON schema cannot be used: Invalid type: int"),
        ({"json_schema": '{"type": "integer", "minimum": 5, "maximum": 3}'}, "minimum (5) is greater than maximum (3)"),
        ({"json_schema": '{"enum": []}'}, "the JSON schema cannot be used: Unsatisfiable schema: anyOf is empty"),
        ({"json_schema": '{"not": {"type": "null"}}'}, 'the JSON schema cannot be used: Unimplemented keys: ["not"]'),
        ({"json_schema": '{"x-guidance": {"lenient": true}, "not": {}}'}, 'Unimplemented keys: ["not"]'),
        ({"json_schema": '{"$ref": "http://a.b/c"}'}, "Default retriever does not fetch resources"),
        ({"json_schema": '{"$ref": "#"}'}, "cannot be met: # requires itself, so that no document would end"),
        ({"json_schema": '{"enum": ["\\ud800"]}'}, "the JSON schema cannot be used: "),
        ({"json_schema": '{"a":' * 9999 + "1" + "}" * 9999}, "the JSON schema is nested too deeply"),
        ({"json_schema": '{"a": "' + "b" * (1 << 17) + '"}'}, "it may have at most 131072"),
        (
            {"json_schema": json.dumps({"type": "object", "properties": {f"p{i}": {} for i in range(2000)}})},
            "the JSON schema cannot be used: it is too large to be followed",
        ),
        ({"regex": "("}, "the regular expression cannot be used: unclosed group"),
        ({"regex": "(a{1000}){1000}"}, "the regular expression cannot be used: it is too large to be followed"),
        ({"regex": "(?=a)b"}, "look-around, including look-ahead and look-behind, is not supported"),
        ({"regex": r"[^\x00-\U0010ffff]"}, "the regular expression cannot be met: there is no text that matches it"),
        ({"grammar": "start: other"}, 'the grammar cannot be used: at 1(8): unknown name: "other"'),
        ({"grammar": 'start: start "a"'}, "the grammar cannot be met: there is no text that matches it"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_what_is_wrong_or_impossible_is_refused_in_a_line(options: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as raised:
        compile_constraint(SamplingParams(**options), VOCABULARIES["byte level"])  # type: ignore[arg-type]
    assert len(str(raised.value).splitlines()) == 1


def node(**following: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {"next": following}, "required": ["next"]}


@pytest.mark.parametrize(
    ("schema", "endless"),
    [
        ({"$ref": "#/$defs/a", "$defs": {"a": node(**{"$ref": "#/$defs/a"})}}, "#/$defs/a"),
        (node(**{"$ref": "#"}), "#"),
        (node(anyOf=[{"$ref": "#"}, {"type": "null"}]), None),
        (node(oneOf=[{"$ref": "#"}, node(**{"$ref": "#"})]), "#"),
        (node(allOf=[{"type": "object"}, {"$ref": "#"}]), "#"),
        (node(type="array", items={"$ref": "#"}), None),
        (node(type="array", items={"$ref": "#"}, minItems=1), "#"),
        (node(type="array", prefixItems=[{"type": "null"}], items={"$ref": "#"}, minItems=1), None),
        (node(type="array", prefixItems=[{"$ref": "#"}], minItems=1), "#"),
        (node(type=["array", "string"], items={"$ref": "#"}, minItems=1), None),
        ({"type": "object", "properties": {"next": {"$ref": "#"}}}, None),
        ({"type": "object", "additionalProperties": {"$ref": "#"}, "required": ["x"]}, "#"),
        ({"properties": {"next": {"$ref": "#"}}, "required": ["next"]}, None),
        (
            {
                "$ref": "#/$defs/a~1b",
                "$defs": {"a/b": node(**{"$ref": "#/$defs/c"}), "c": node(**{"$ref": "#/$defs/a~1b"})},
            },
            "#/$defs/a~1b",
        ),
        ({"$ref": "#/$defs/a", "$defs": {"a": node(**{"$ref": "#/$defs/b"}), "b": {"type": "null"}}}, None),
        ({"$ref": "other.json"}, None),
        (True, None),
    ],
    ids=lambda value: str(value)[:60],
)
def test_documents_that_would_not_end_are_found(schema: Any, endless: str | None) -> None:
    assert endless_part(schema) == endless


def test_a_long_chain_of_references_takes_no_longer_than_its_length(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = 0
    ends = schemas._ends

    def counting(*arguments: Any) -> bool:
        nonlocal asked
        asked += 1
        return ends(*arguments)

    monkeypatch.setattr(schemas, "_ends", counting)
    chain: dict[str, Any] = {f"p{link}": {"$ref": f"#/$defs/p{link + 1}"} for link in range(1000)}
    schema = {"$ref": "#/$defs/p0", "$defs": chain | {"p1000": {"type": "null"}}}
    assert endless_part(schema) is None and asked < 3000
    assert endless_part(schema | {"$defs": chain | {"p1000": {"$ref": "#/$defs/p7"}}}) == "#/$defs/p0"


def test_short_expressions_do_not_fill_the_memory() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    compile_constraint(SamplingParams(regex="a"), VOCABULARIES["byte level"])
    before = resident()
    for count in range(1000, 1004):
        with pytest.raises(ConfigError, match="too large"):
            compile_constraint(SamplingParams(regex=f"(a{{1000}}){{{count}}}"), VOCABULARIES["byte level"])
    # What is compiled is kept, and a client may ask for one after the other.
    assert resident() - before < 150 << 20


def test_a_model_without_an_end_token_and_other_tokenizers_are_refused() -> None:
    words = VOCABULARIES["byte level"]
    with pytest.raises(ConfigError, match="needs a model with an end token, and this one names none"):
        compile_constraint(SamplingParams(regex="a"), Vocabulary(words.tokenizer, words.size, ()))
    with pytest.raises(ConfigError, match="this model's tokenizer cannot be constrained: "):
        compile_constraint(SamplingParams(regex="a"), Vocabulary(word_piece(), 300, (1,)))


def test_without_llguidance_the_line_that_installs_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(MissingDependencyError, match=re.escape("pip install 'moesaic[serve]'")):
        compile_constraint(SamplingParams(regex="a"), vocabulary(train_tokenizer([Document("a", "a", TEXT)], 300)))
