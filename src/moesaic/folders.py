"""Where things of the user's live."""

from __future__ import annotations

import os
from pathlib import Path

from moesaic.errors import UsageError


def cache_folder() -> Path:
    """``$MOESAIC_CACHE``, or ``~/.cache/moesaic``: tokens, and the tuner's timings.

    Raises:
        UsageError: where neither is known, as for a container's user without a name.
    """
    if chosen := os.environ.get("MOESAIC_CACHE"):
        return Path(chosen)
    try:
        return Path.home() / ".cache" / "moesaic"
    except RuntimeError as error:
        raise UsageError(
            "this user has no home folder, so there is no folder for the cache: set MOESAIC_CACHE to one"
        ) from error
