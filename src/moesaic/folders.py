"""Where things of the user's live."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """``$MOESAIC_CACHE``, or ``~/.cache/moesaic``: tokens, and the tuner's timings."""
    return Path(os.environ.get("MOESAIC_CACHE") or Path.home() / ".cache" / "moesaic")
