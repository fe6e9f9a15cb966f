"""The HTTP API."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Path, Request
from fastapi.responses import Response, StreamingResponse
from pydantic import BaseModel, Field

from moesaic.serve.names import ADAPTER_NAME
from moesaic.serve.openai import Body, ChatBody, CompletionBody, GenerationBody
from moesaic.serve.replies import Chat, ChatChunk, Completion, Reply
from moesaic.serve.server.adapters import Adapter, AdapterState
from moesaic.serve.server.errors import ErrorReply, as_api_error
from moesaic.serve.server.gate import Receive, Scope, Send
from moesaic.serve.server.inbox import Inbox
from moesaic.serve.server.metrics import MEDIA_TYPE
from moesaic.serve.server.service import Service
from moesaic.serve.server.stats import State, Stats

log = logging.getLogger("moesaic.serve")

_CLIENT_LEFT = 499
"""As nginx calls it; nobody reads it but the log and the metrics."""
_ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorReply, "description": "The request cannot be answered."},
    "5XX": {"model": ErrorReply, "description": "The server cannot answer now."},
}
_STREAM: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The whole answer; with stream: true, server-sent events, of which the last is [DONE].",
        "content": {"text/event-stream": {}},  # a schema would be taken for that of each event
    }
}
router = APIRouter(responses=_ERRORS)


class ModelCard(BaseModel):
    """A name that ``model`` of a request may have. ``parent``: of an adapter, its base."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["moesaic"] = "moesaic"
    parent: str | None = None


class ModelList(BaseModel):
    """The base model first, then the adapters by name."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class AdapterCard(BaseModel):
    """An adapter of the running server. ``path``: the folder that it was read from."""

    id: str
    object: Literal["adapter"] = "adapter"
    state: AdapterState
    path: str
    created: int


class AdapterList(BaseModel):
    """By name."""

    object: Literal["list"] = "list"
    data: list[AdapterCard]


class AdapterBody(Body):
    """The body of ``POST /v1/adapters``."""

    name: str = Field(
        pattern=ADAPTER_NAME,
        description="a name of 1 to 64 letters, digits, '.', '_' and '-', beginning with a letter or a digit",
    )
    path: str = Field(
        min_length=1, max_length=4096, description="a folder inside the one that the server loads adapters from"
    )


class Unloaded(BaseModel):
    """``deleted``: false while requests that use it go on; it goes with the last of them."""

    id: str
    object: Literal["adapter"] = "adapter"
    deleted: bool


class Health(BaseModel):
    """Whether the server's process is in order."""

    status: Literal["ok", "failed"]


class Ready(BaseModel):
    """Whether requests are taken."""

    ready: bool
    state: State


def service_of(request: Request) -> Service:
    """The service of the application that a request came to."""
    service: Service = request.app.state.service
    return service


ServiceOf = Annotated[Service, Depends(service_of)]
AdapterName = Annotated[str, Path(description="Of a loaded adapter.")]


@router.post("/v1/completions", response_model=Completion, responses=_STREAM)
async def create_completion(request: Request, body: CompletionBody, service: ServiceOf) -> Response:
    """Continue a prompt."""
    return await _generate(request, body, service)


@router.post("/v1/chat/completions", response_model=Chat, responses=_STREAM)
async def create_chat_completion(request: Request, body: ChatBody, service: ServiceOf) -> Response:
    """Answer a conversation."""
    return await _generate(request, body, service)


@router.get("/v1/models")
async def list_models(service: ServiceOf) -> ModelList:
    """What ``model`` of a request may be."""
    return ModelList(data=_models(service))


@router.get("/v1/models/{model:path}")
async def retrieve_model(model: str, service: ServiceOf) -> ModelCard:
    """One of them."""
    service.adapter_of(model)
    return next(card for card in _models(service) if card.id == model)


@router.get("/v1/adapters")
async def list_adapters(service: ServiceOf) -> AdapterList:
    """The adapters that are loaded, and those that are leaving."""
    return AdapterList(data=[_card(adapter) for adapter in service.adapters.all()])


@router.post("/v1/adapters", status_code=201)
async def load_adapter(body: AdapterBody, service: ServiceOf) -> AdapterCard:
    """Load an adapter while requests run; it can be used when this answers."""
    return _card(await service.adapters.load(body.name, body.path))


@router.delete("/v1/adapters/{name}", responses={202: {"model": Unloaded, "description": "Requests still use it."}})
async def unload_adapter(name: AdapterName, service: ServiceOf, response: Response) -> Unloaded:
    """Refuse new requests for an adapter, and drop it when those that use it have ended."""
    deleted = await service.adapters.unload(name)
    response.status_code = 200 if deleted else 202
    return Unloaded(id=name, deleted=deleted)


@router.get("/stats")
async def read_stats(service: ServiceOf) -> Stats:
    """What the server does now."""
    return service.stats()


@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
async def read_metrics(service: ServiceOf) -> Response:
    """The same and more, for Prometheus."""
    return Response(service.metrics.text(), media_type=MEDIA_TYPE)


@router.get("/health", responses={503: {"model": Health, "description": "It must be restarted."}})
async def read_health(service: ServiceOf, response: Response) -> Health:
    """Whether the server can work, now or when it has loaded its model; 503 where it must be restarted."""
    failed = service.state == "failed"
    response.status_code = 503 if failed else 200
    return Health(status="failed" if failed else "ok")


@router.get("/ready", responses={503: {"model": Ready, "description": "It takes no requests."}})
async def read_ready(service: ServiceOf, response: Response) -> Ready:
    """Whether requests are taken; 503 while the model loads and while the server shuts down."""
    ready = service.state == "ready"
    response.status_code = 200 if ready else 503
    return Ready(ready=ready, state=service.state)


class EventStream(StreamingResponse):
    """Server-sent events; ``close`` is called at the end, also where the client has left before."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[str], close: Callable[[], object]) -> None:
        # Proxies that collect answers (nginx) would hold the pieces back.
        super().__init__(events, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._close()


async def _generate(request: Request, body: GenerationBody, service: Service) -> Response:
    service.adapter_of(body.model)
    with ExitStack() as stack:
        inbox = service.admit(body)
        stack.callback(service.close, inbox)
        reply = await service.send(inbox, body)
        if body.stream:
            return EventStream(_events(service, inbox, reply), stack.pop_all().close)
        answer = await _unless_gone(request, _collect(inbox, reply))
        return answer or Response(status_code=_CLIENT_LEFT)
    raise AssertionError("the stack lets every exception through")


async def _collect(inbox: Inbox, reply: Reply) -> Response:
    async for output in inbox.outputs():
        reply.add(output)
    return Response(reply.whole().model_dump_json(), media_type="application/json")


async def _events(service: Service, inbox: Inbox, reply: Reply) -> AsyncIterator[str]:
    for opening in reply.opening():
        yield _event(opening)
    try:
        async for output in inbox.outputs():
            event = reply.add(output)
            # A token may complete no character yet, or be held back as a possible beginning of a stop string.
            if output.text or output.logprobs or output.finish_reason is not None:
                yield _event(event)
    except Exception as error:
        told = as_api_error(error)
        if told.label == "internal_error":  # of an answer without a stream uvicorn logs it
            log.exception("a stream has failed")
        service.metrics.erred(told.label)
        yield f"data: {json.dumps(told.body())}\n\n"
        return
    for closing in reply.closing():
        yield _event(closing)
    yield "data: [DONE]\n\n"


def _event(event: Completion | ChatChunk) -> str:
    return f"data: {event.model_dump_json()}\n\n"


async def _unless_gone(request: Request, work: Any) -> Response | None:
    """The result of ``work``, or None where the client leaves before."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        working.cancel()
        leaving.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _models(service: Service) -> list[ModelCard]:
    base, now = service.settings.name, service.adapters.all()
    return [
        ModelCard(id=base, created=service.created),
        *(ModelCard(id=a.name, created=a.created, parent=base) for a in now if a.state == "ready"),
    ]


def _card(adapter: Adapter) -> AdapterCard:
    return AdapterCard(id=adapter.name, state=adapter.state, path=str(adapter.path), created=adapter.created)
