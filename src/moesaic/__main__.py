"""``python -m moesaic`` is the same as ``moesaic``."""

from __future__ import annotations

from moesaic.cli.main import main

if __name__ == "__main__":
    main()
