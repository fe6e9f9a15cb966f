"""What goes wrong, in the shape in which OpenAI's API says it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel

from moesaic.errors import MissingDependencyError, MoesaicError, UnsupportedError, UsageError
from moesaic.serve.openai import complaint
from moesaic.serve.request import UnknownAdapterError
from moesaic.serve.server.loop import EngineFailure

# Routing raises the parent of FastAPI's own, which FastAPI gives no name.
_HTTPException: Any = HTTPException.__base__
_KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_CODES = {401: "invalid_api_key", 404: "not_found", 405: "method_not_allowed", 413: "body_too_large"}


class ErrorDetail(BaseModel):
    """``param`` is the field that is wrong; ``code`` is for programs."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorReply(BaseModel):
    """The body of every answer that is no success."""

    error: ErrorDetail


class ApiError(Exception):
    """An answer that is no success.

    Args:
        status: the HTTP status. message: one line for the client. param: the field of the body that is wrong.
        code: a word for programs. headers: further ones of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        # Half of a surrogate pair, which JSON can spell and a message may repeat, cannot be sent.
        message = message.encode(errors="backslashreplace").decode()
        super().__init__(message)
        self.status, self.headers = status, dict(headers or {})
        kind = _KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")
        self.detail = ErrorDetail(message=message, type=kind, param=param, code=code or _CODES.get(status))

    @property
    def label(self) -> str:
        """What it is counted as: its code, or its status."""
        return self.detail.code or str(self.status)

    def reply(self) -> JSONResponse:
        """The answer."""
        return JSONResponse(self.body(), self.status, self.headers)

    def body(self) -> dict[str, Any]:
        """The JSON document."""
        return ErrorReply(error=self.detail).model_dump()


def as_api_error(error: Exception) -> ApiError:
    """What a client is told of ``error``; of a defect of ours, nothing but that there is one."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, UnknownAdapterError):
        return ApiError(404, _line(error), param="model", code="model_not_found")
    if isinstance(error, EngineFailure):
        return ApiError(500, _line(error), code="engine_failed")
    if isinstance(error, UnsupportedError | MissingDependencyError):
        return ApiError(501, _line(error), code="unsupported")
    if isinstance(error, UsageError):
        return ApiError(400, _line(error))
    if isinstance(error, _HTTPException):
        return ApiError(error.status_code, str(error.detail), headers=error.headers)
    return ApiError(500, "an error inside the server; its log says more", code="internal_error")


def install_handlers(app: FastAPI) -> None:
    """Let every error of ``app`` be answered in this shape."""
    for kind in (ApiError, MoesaicError, _HTTPException, Exception):
        app.add_exception_handler(kind, _answer)
    app.add_exception_handler(RequestValidationError, _answer_invalid)


async def _answer(request: Request, error: Exception) -> Response:
    return _count(request, as_api_error(error)).reply()


async def _answer_invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    route = request.scope.get("route")
    body = getattr(getattr(route, "body_field", None), "field_info", None)
    fields = getattr(getattr(body, "annotation", None), "model_fields", None)
    param, message = complaint(error.errors(), fields)
    return _count(request, ApiError(400, message, param=param)).reply()


def _count(request: Request, error: ApiError) -> ApiError:
    request.app.state.service.metrics.erred(error.label)
    return error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
