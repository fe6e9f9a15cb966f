"""Files of offline batches: requests in, results out, a line each, as OpenAI's batch API has them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from moesaic.errors import DataError, UsageError
from moesaic.serve.openai import ChatBody, CompletionBody, GenerationBody, complaint

_BODIES: dict[str, type[GenerationBody]] = {"/v1/completions": CompletionBody, "/v1/chat/completions": ChatBody}
_FIELDS = {"custom_id", "method", "url", "body"}
_SHOWN = 10


@dataclass(frozen=True)
class Line:
    """A request of a batch.

    Attributes:
        number: of the line in its file, from 1.
        result_id: of its result; another request, or the same with another seed, has another one.
        adapter: that its ``model`` names; None: the base model.
    """

    number: int
    custom_id: str
    result_id: str
    body: GenerationBody
    adapter: str | None


def read_lines(path: Path, base: str, adapters: Collection[str] = (), seed: int = 0) -> list[Line]:
    """The requests of a file.

    A line is ``{"custom_id": ..., "method": "POST", "url": "/v1/completions", "body": {...}}``, or only a body with
    ``prompt`` or ``messages``, in which ``model`` and ``custom_id`` may be missing (it is ``line-N`` then). Empty lines
    are passed over.

    Args:
        base, adapters: what ``model`` may be.
        seed: of requests that say none; each gets its own, by this and its ``custom_id``.

    Raises:
        DataError: that names every bad line, up to ten, by its number; or where there is no request at all.
    """
    lines: list[Line] = []
    bad: dict[int, str] = {}
    numbers: dict[str, int] = {}
    try:
        raw = path.read_bytes().splitlines()
    except OSError as error:
        raise DataError(f"{str(path)!r} cannot be read: {error.strerror}") from error
    for number, text in enumerate(raw, start=1):
        if not text.strip():
            continue
        try:
            line = _read(number, text, base, adapters, seed)
            if (first := numbers.setdefault(line.custom_id, number)) != number:
                raise DataError(f"custom_id {line.custom_id!r} is that of line {first} already")
            lines.append(line)
        except UsageError as error:
            bad[number] = str(error)
    refuse(path, bad)
    if not lines:
        raise DataError(f"there is no request in {str(path)!r}: write one a line, as JSON")
    return lines


def refuse(path: Path, bad: Mapping[int, str]) -> None:
    """Raise DataError for the bad lines of a file, number to reason, where there are any."""
    if not bad:
        return
    told = "; ".join(f"line {number}: {reason}" for number, reason in list(bad.items())[:_SHOWN])
    more = f"; and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
    count = "1 bad line" if len(bad) == 1 else f"{len(bad)} bad lines"
    raise DataError(f"{str(path)!r} has {count}, so nothing was run: {told}{more}")


def finished(out: Path, lines: Iterable[Line]) -> set[str]:
    """The ``custom_id`` of each result that ``out`` holds; a last line that was not written to its end is removed.

    Raises:
        DataError: where a line of it is no result, or is one of another request than the line with its ``custom_id``.
    """
    if not out.exists():
        return set()
    results = {line.custom_id: line.result_id for line in lines}
    text = out.read_bytes()
    whole = text.rfind(b"\n") + 1
    done = set()
    for number, row in enumerate(text[:whole].splitlines(), start=1):
        found = _result(row)
        if found is None:
            raise DataError(f"line {number} of {str(out)!r} is no result of a batch: give another --out")
        custom_id, result_id = found
        if results.get(custom_id) != result_id:
            raise DataError(
                f"{str(out)!r} has a result for {custom_id!r} of another request (or seed, or model) than asked for "
                "now: give another --out, or remove it"
            )
        done.add(custom_id)
    if whole < len(text):
        with out.open("rb+") as file:
            file.truncate(whole)
    return done


def result_line(line: Line, reply: Mapping[str, Any]) -> str:
    """A result as it stands in a file, with its end of line."""
    response = {"status_code": 200, "request_id": line.result_id, "body": reply}
    result = {"id": line.result_id, "custom_id": line.custom_id, "response": response, "error": None}
    return json.dumps(result, ensure_ascii=False) + "\n"


def _read(number: int, text: bytes, base: str, adapters: Collection[str], seed: int) -> Line:
    fields = _parse(text)
    if "body" in fields:
        custom_id, url, asked = _request(fields)
    else:
        custom_id = fields.pop("custom_id", f"line-{number}")
        url = "/v1/chat/completions" if "messages" in fields else "/v1/completions"
        asked = {"model": base, **fields}
    if not isinstance(custom_id, str) or not custom_id:
        raise DataError("custom_id must be a string that is not empty")
    if any("\ud800" <= character <= "\udfff" for character in custom_id):  # the file of results could not hold it
        raise DataError("custom_id: half of a surrogate pair is no text")
    kind = _BODIES[url]
    try:
        body = kind.model_validate(asked)
    except ValidationError as error:
        raise DataError(complaint(error.errors(), kind.model_fields)[1]) from error
    if body.stream:
        raise DataError("stream: a batch has no streams")
    if body.model != base and body.model not in adapters:
        raise DataError(f"there is no model {body.model!r}; given: {', '.join([base, *adapters])}")
    digest = _digest(custom_id, url, asked, seed)
    if body.seed is None:
        body = body.model_copy(update={"seed": int(digest, 16) >> 65})
    return Line(number, custom_id, f"batch_req_{digest}", body, None if body.model == base else body.model)


def _parse(text: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(text)
    except UnicodeDecodeError:
        raise DataError("it is no UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"it is no JSON: {error}") from None
    if not isinstance(fields, dict):
        raise DataError("it must be a JSON object")
    return fields


def _request(fields: Mapping[str, Any]) -> tuple[Any, str, dict[str, Any]]:
    if unknown := sorted(fields.keys() - _FIELDS):
        raise DataError(f"there is no field {unknown[0]!r}; allowed: {', '.join(sorted(_FIELDS))}")
    if missing := sorted(_FIELDS - fields.keys()):
        raise DataError(f"{missing[0]} is missing")
    if fields["method"] != "POST":
        raise DataError("method must be 'POST'")
    if not isinstance(fields["url"], str) or fields["url"] not in _BODIES:
        raise DataError(f"url must be one of {', '.join(_BODIES)}")
    if not isinstance(fields["body"], dict):
        raise DataError("body must be a JSON object")
    return fields["custom_id"], fields["url"], fields["body"]


def _digest(*asked: Any) -> str:
    """128 bits, in hex."""
    return hashlib.blake2b(json.dumps(asked, sort_keys=True).encode(), digest_size=16).hexdigest()


def _result(row: bytes) -> tuple[str, str] | None:
    try:
        result = json.loads(row)
        return str(result["custom_id"]), str(result["id"])
    except (ValueError, TypeError, KeyError):
        return None


def unfinished(lines: Sequence[Line], done: Collection[str]) -> list[Line]:
    """The lines without a result."""
    return [line for line in lines if line.custom_id not in done]
