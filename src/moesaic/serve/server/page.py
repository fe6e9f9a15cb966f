"""The files of the page at ``/``, read once; no path of a client's reaches the file system."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources

from fastapi import APIRouter
from fastapi.responses import Response

from moesaic.serve.server.errors import ApiError

INDEX = "index.html"
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
_KINDS = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}


@dataclass(frozen=True)
class PageFile:
    """A file as it is sent."""

    content: bytes
    media_type: str

    def response(self) -> Response:
        """The answer that holds it."""
        return Response(self.content, media_type=self.media_type, headers=HEADERS)


def read_page() -> dict[str, PageFile]:
    """Every file of the page by its name."""
    folder = resources.files("moesaic.serve.server") / "page_files"
    return {
        file.name: PageFile(file.read_bytes(), _KINDS[ending])
        for file in folder.iterdir()
        if (ending := file.name.rpartition(".")[2]) in _KINDS
    }


def page_routes() -> APIRouter:
    """``/`` and ``/page/NAME``; no part of the API."""
    router = APIRouter(include_in_schema=False)
    files = read_page()

    @router.get("/")
    async def index() -> Response:
        return files[INDEX].response()

    @router.get("/page/{name}")
    async def file(name: str) -> Response:
        if name not in files:
            raise ApiError(404, f"the page has no file {name!r}")
        return files[name].response()

    return router
