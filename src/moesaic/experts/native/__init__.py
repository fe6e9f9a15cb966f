"""Compiled kernels for CPUs: the C++ sources, what loads them, and the backend ``native``."""

from __future__ import annotations

from moesaic.experts.native.backend import NativeBackend

__all__ = ["NativeBackend"]
