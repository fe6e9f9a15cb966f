"""The HTTP server around an engine: OpenAI's API, adapters, metrics, and a page."""

from __future__ import annotations

from moesaic.errors import MissingDependencyError

try:
    import fastapi  # noqa: F401
    import prometheus_client  # noqa: F401
    import uvicorn  # noqa: F401
except ImportError as error:
    raise MissingDependencyError(f"the server needs {error.name}: pip install 'moesaic[serve]'") from error
