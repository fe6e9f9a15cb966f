"""Offline batches: a file of requests, computed in the order that shares most, results written as they come."""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TextIO

import torch
from transformers import PreTrainedTokenizerBase

from moesaic.errors import Interrupted, UsageError
from moesaic.serve.batch_file import Line, finished, read_lines, refuse, result_line, unfinished
from moesaic.serve.batch_order import batch_order
from moesaic.serve.engine import Engine
from moesaic.serve.openai import requests_of, within
from moesaic.serve.opening import open_model
from moesaic.serve.replies import Reply
from moesaic.serve.request import EngineSettings, Output, Request
from moesaic.serve.text import token_bytes
from moesaic.train.signals import StopRequest

_USUAL_LENGTH = 256
"""New tokens that are expected of a request without a limit."""


@dataclass(frozen=True)
class Totals:
    """What came of a batch.

    Attributes:
        requests: of the file. found: had results already. done: got theirs now.
        prompt_tokens, cached_tokens, new_tokens: of the requests done now; cached ones were found in the prefix tree.
    """

    requests: int
    found: int
    done: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    new_tokens: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Batch:
    """What a batch is run with.

    Attributes:
        file, out: of requests and of results. model: its folder. base: what ``model`` of a request calls it.
        adapters: name to folder. dtype: of the weights; None: as saved.
        seed: of requests that say none.
    """

    file: Path
    out: Path
    model: Path
    base: str
    adapters: Mapping[str, Path]
    settings: EngineSettings
    dtype: torch.dtype | None = None
    seed: int = 0


def run_batch(batch: Batch, on_progress: Callable[[Totals], object] = lambda totals: None) -> Totals:
    """Compute the requests of a file that have no result yet, and append theirs as they come.

    Every line is read and checked before anything runs. Results are in the order in which they were complete; as in
    OpenAI's batches, ``custom_id`` says whose they are. The same file gives the same results, whether it was run in one
    go or in several.

    Args:
        on_progress: called after every step.

    Raises:
        DataError: for bad lines, by number, and for an ``out`` that does not belong to them.
        Interrupted: on SIGINT or SIGTERM; what is complete is in ``out``, and the same call goes on from there.
        MoesaicError: where the model or an adapter cannot be used.
    """
    if batch.out.exists() and batch.out.samefile(batch.file):
        raise UsageError(f"--out is the file of requests itself, {str(batch.file)!r}: give another")
    lines = read_lines(batch.file, batch.base, list(batch.adapters), batch.seed)
    left = unfinished(lines, finished(batch.out, lines))
    totals = Totals(len(lines), len(lines) - len(left))
    with batch.out.open("a", encoding="utf-8") as out:
        if not left:
            return totals
        engine, tokenizer = _open(batch)
        run = _Run(engine, tokenizer, batch.file, left, totals)
        with StopRequest() as stop:
            for totals in run.steps(out):
                on_progress(totals)
                if stop.received and totals.found + totals.done < totals.requests:
                    raise Interrupted(
                        f"stopped with {totals.found + totals.done} of {totals.requests} results in "
                        f"{str(batch.out)!r}: the same command goes on from there"
                    )
    return totals


def _open(batch: Batch) -> tuple[Engine, PreTrainedTokenizerBase]:
    opened = open_model(batch.model, batch.adapters, dtype=batch.dtype)
    return Engine(opened.model, opened.tokenizer, batch.settings, opened.pool), opened.tokenizer


@dataclass(frozen=True)
class _Open:
    """A line whose reply is in the making."""

    line: Line
    reply: Reply
    request_ids: list[str]


class _Run:
    """The requests of some lines on their way through an engine."""

    def __init__(
        self, engine: Engine, tokenizer: PreTrainedTokenizerBase, file: Path, lines: Sequence[Line], totals: Totals
    ) -> None:
        self._engine = engine
        self._totals = totals
        self._open: dict[str, _Open] = {}
        requests = self._check(tokenizer, file, lines)
        order = batch_order(
            [request.prompt_ids for request in requests],
            [_expected(request, engine.max_context) for request in requests],
            [request.adapter or "" for request in requests],
            engine.settings.page_size,
        )
        # The engine takes them in this order. No more of them than keep it busy, so that it holds only these.
        self._waiting = [requests[place] for place in reversed(order)]
        self._most = 2 * engine.settings.max_batch

    def _check(self, tokenizer: PreTrainedTokenizerBase, file: Path, lines: Sequence[Line]) -> list[Request]:
        spelled = token_bytes(tokenizer)
        requests: list[Request] = []
        bad: dict[int, str] = {}
        for line in lines:
            try:
                of_line = requests_of(line.body, tokenizer, request_id=line.result_id, adapter=line.adapter)
                of_line = within(of_line, line.body, self._engine.max_context)
                for request in of_line:
                    self._engine.check(request)
            except UsageError as error:
                bad[line.number] = str(error)
                continue
            # A list takes four times as much, and all prompts are held at once.
            of_line = [replace(request, prompt_ids=array("q", request.prompt_ids)) for request in of_line]
            requests += of_line
            reply = Reply(line.body, of_line, reply_id=line.result_id, token_bytes=spelled)
            opened = _Open(line, reply, [request.id for request in of_line])
            self._open |= dict.fromkeys(opened.request_ids, opened)
        refuse(file, bad)
        return requests

    def steps(self, out: TextIO) -> Iterator[Totals]:
        """Step until all is done, and tell after each step what came of it so far."""
        start = time.perf_counter()
        open_sequences = 0
        while self._waiting or self._engine.has_work:
            while self._waiting and open_sequences < self._most:
                request = self._waiting.pop()
                self._engine.add(request)
                open_sequences += request.sampling.n
            for output in self._engine.step():
                open_sequences -= output.finish_reason is not None
                self._take(output, out)
            out.flush()
            self._totals = replace(self._totals, seconds=time.perf_counter() - start)
            yield self._totals

    def _take(self, output: Output, out: TextIO) -> None:
        opened = self._open[output.request_id]
        opened.reply.take(output)
        if not opened.reply.done:
            return
        out.write(result_line(opened.line, opened.reply.whole().model_dump()))
        for request_id in opened.request_ids:
            del self._open[request_id]
        totals, usage = self._totals, opened.reply.usage()
        self._totals = replace(
            totals,
            done=totals.done + 1,
            prompt_tokens=totals.prompt_tokens + usage.prompt_tokens,
            cached_tokens=totals.cached_tokens + usage.prompt_tokens_details.cached_tokens,
            new_tokens=totals.new_tokens + usage.completion_tokens,
        )


def _expected(request: Request, max_context: int) -> int:
    params = request.sampling
    room = max_context - len(request.prompt_ids)
    return params.n * min(room, params.max_tokens or _USUAL_LENGTH)
