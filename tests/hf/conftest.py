"""Some tests of this folder run on several ranks."""

from tests.parallel.conftest import pools

__all__ = ["pools"]
