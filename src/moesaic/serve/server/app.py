"""The application: routes, errors, gate and page around one service."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib import metadata
from typing import Any

from fastapi import FastAPI

from moesaic.serve.server.errors import install_handlers
from moesaic.serve.server.gate import OPEN, Gate
from moesaic.serve.server.page import page_routes
from moesaic.serve.server.routes import router
from moesaic.serve.server.service import Service


def create_app(service: Service) -> FastAPI:
    """The ASGI application of a service; its lifespan starts and stops the service."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        service.stop()

    app = FastAPI(
        title="moesaic",
        version=metadata.version("moesaic"),
        description="A mixture-of-experts model and its adapters, by OpenAI's API.",
        lifespan=lifespan,
        redirect_slashes=False,
        docs_url=None,  # FastAPI's pages load their scripts from elsewhere
        redoc_url=None,
    )
    app.state.service = service
    app.include_router(router)
    app.include_router(page_routes())
    app.add_middleware(Gate, settings=service.settings, metrics=service.metrics)
    install_handlers(app)
    if service.settings.keys:
        _tell_of_keys(app)
    return app


def _tell_of_keys(app: FastAPI) -> None:
    """Put into the OpenAPI document that a key is needed, and where not."""
    describe = app.openapi

    def described() -> dict[str, Any]:
        document = describe()
        document.setdefault("components", {})["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        for path, operations in document["paths"].items():
            for operation in operations.values():
                operation["security"] = [] if path in OPEN else [{"key": []}]
        return document

    app.openapi = described  # type: ignore[method-assign]  # FastAPI's documented way to extend it
