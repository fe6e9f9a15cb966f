"""The compiled kernels: found, loaded and called through their C ABI (``moesaic.h``).

The library is loaded when it is first needed, and always after torch: its OpenMP loops then run on the runtime that
torch has loaded already, which it finds under the same name.

Two environment variables, both read when the library is loaded: ``MOESAIC_ISA`` names the instruction-set variant to
use instead of the best one, ``MOESAIC_LIBRARY`` another library file (``make sanitize`` builds one).
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ctypes import POINTER, Structure, byref, c_char_p, c_double, c_float, c_int, c_int32, c_int64, c_uint64, c_void_p
from pathlib import Path
from typing import Any

import torch  # before the library: see above

from moesaic.errors import ConfigError, MoesaicError, UnsupportedError, did_you_mean

ABI = 4
_FOLDER = Path(__file__).parent
BUILT = _FOLDER / f"libmoesaic_experts{'.dylib' if sys.platform == 'darwin' else '.so'}"
# setup.py leaves one of the two: the library, or the reason why there is none.
NOT_BUILT = _FOLDER / "not_built.txt"

FLOATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
INT8, INT4 = 3, 4
SCORES = {"softmax": 0, "sigmoid": 1}
ACTIVATIONS = {"swiglu": 0, "geglu": 1, "geglu_tanh": 2, "relu": 3, "gelu": 4, "gelu_tanh": 5}


class Matrix(Structure):
    """``MoesaicMatrix``: E matrices; strides count elements."""

    _fields_ = (
        ("data", c_void_p),
        ("scale", c_void_p),
        ("bias", c_void_p),
        ("expert_stride", c_int64),
        ("out_stride", c_int64),
        ("in_stride", c_int64),
        ("format", c_int32),
        ("group", c_int32),
    )


class Layer(Structure):
    """``MoesaicLayer``: one call of an expert layer."""

    _fields_ = (
        ("tokens", c_int64),
        ("top_k", c_int64),
        ("num_experts", c_int64),
        ("d_model", c_int64),
        ("d_ff", c_int64),
        ("rows", c_int64),
        ("dtype", c_int32),
        ("weights_dtype", c_int32),
        ("activation", c_int32),
        ("threads", c_int32),
        ("x", c_void_p),
        ("x_stride", c_int64),
        ("permutation", c_void_p),
        ("offsets", c_void_p),
        ("weights", c_void_p),
        ("up", Matrix),
        ("down", Matrix),
        ("out", c_void_p),
        ("pre", c_void_p),
        ("row_invariant", c_int64),
    )


class Gate(Structure):
    """``MoesaicGate``: how a layer's tokens find their experts, and where their routes are written."""

    _fields_ = (
        *((name, c_void_p) for name in ("weight", "bias", "selection", "unit_scale", "mask")),
        ("kind", c_int32),
        ("normalize", c_int32),
        ("epsilon", c_float),
        ("scale", c_float),
        *((name, c_void_p) for name in ("logits", "scores", "expert_ids", "weights", "counts")),
    )


class Gradients(Structure):
    """``MoesaicGradients``: where backward writes; null for what is not wanted."""

    _fields_ = (
        ("grad_out", c_void_p),
        ("x", c_void_p),
        ("up", c_void_p),
        ("down", c_void_p),
        ("up_bias", c_void_p),
        ("down_bias", c_void_p),
        ("weights", c_void_p),
    )


class Linear(Structure):
    """``MoesaicLinear``: one call of linear layers of one shape."""

    _fields_ = (
        ("tokens", c_int64),
        ("inputs", c_int64),
        ("outputs", c_int64),
        ("groups", c_int64),
        ("dtype", c_int32),
        ("threads", c_int32),
        ("x", c_void_p),
        ("x_stride", c_int64),
        ("offsets", c_void_p),
        ("weight", Matrix),
        ("out", c_void_p),
        ("row_invariant", c_int64),
    )


class Attention(Structure):
    """``MoesaicAttention``: one call of attention over a paged cache."""

    _fields_ = (
        *((name, c_int64) for name in ("tokens", "heads", "kv_heads", "key_width", "value_width")),
        ("sequences", c_int64),
        ("table_width", c_int64),
        ("dtype", c_int32),
        ("threads", c_int32),
        ("query", c_void_p),
        ("keys", c_void_p),
        ("values", c_void_p),
        ("query_strides", c_int64 * 2),
        ("key_strides", c_int64 * 2),
        ("value_strides", c_int64 * 2),
        *((name, c_void_p) for name in ("slots", "tables", "starts", "contexts", "sinks")),
        *((name, c_void_p) for name in ("key_pool", "value_pool", "out")),
        ("window", c_int64),
        ("scaling", c_float),
        ("softcap", c_float),
    )


_FUNCTIONS: dict[str, tuple[object, tuple[object, ...]]] = {
    "moesaic_forward": (c_int, (POINTER(Layer),)),
    "moesaic_route_and_forward": (c_int, (POINTER(Gate), POINTER(Layer))),
    "moesaic_backward": (c_int, (POINTER(Layer), POINTER(Gradients))),
    "moesaic_linear": (c_int, (POINTER(Linear),)),
    "moesaic_attend": (c_int, (POINTER(Attention),)),
    "moesaic_isas": (c_char_p, ()),
    "moesaic_isa": (c_char_p, ()),
    "moesaic_choose_isa": (c_int, (c_char_p,)),
    "moesaic_has_openmp": (c_int, ()),
    "moesaic_read": (c_uint64, (c_void_p, c_int64, c_int32)),
    "moesaic_multiply_adds": (c_double, (c_int32, c_int64, c_int32)),
}


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def missing() -> str | None:
    """Why there is no library here, or None.

    Raises:
        ConfigError: where an environment variable asks for a variant or a file that is not there.
    """
    loaded = _load()
    return loaded if isinstance(loaded, str) else None


def forward(layer: Layer) -> None:
    """Compute ``layer.out``, and ``layer.pre`` where it is not null."""
    _done(_function("moesaic_forward")(byref(layer)))


def route_and_forward(gate: Gate, layer: Layer) -> None:
    """Decide the routes, and compute ``layer.out``."""
    _done(_function("moesaic_route_and_forward")(byref(gate), byref(layer)))


def backward(layer: Layer, gradients: Gradients) -> None:
    """Compute the gradients whose pointers are not null; ``layer.pre`` holds what forward wrote."""
    _done(_function("moesaic_backward")(byref(layer), byref(gradients)))


def linear(layer: Linear) -> None:
    """Compute ``layer.out``."""
    _done(_function("moesaic_linear")(byref(layer)))


def attend(attention: Attention) -> None:
    """Store the new keys and values, and compute ``attention.out``."""
    _done(_function("moesaic_attend")(byref(attention)))


def isas() -> list[str]:
    """Names of the instruction-set variants that this CPU can run, the best first."""
    return str(_function("moesaic_isas")().decode()).split(",")


def isa() -> str:
    """The variant in use."""
    return str(_function("moesaic_isa")().decode())


@contextmanager
def use_isa(name: str) -> Iterator[None]:
    """Run the calls of a ``with`` block, in all threads, on the variant ``name`` of :func:`isas`.

    Raises:
        ConfigError: for a name that this CPU cannot run.
    """
    before = isa()
    _choose(_library(), name, "isa")
    try:
        yield
    finally:
        _choose(_library(), before, "isa")


def has_openmp() -> bool:
    """Whether loops run on several threads."""
    return bool(_function("moesaic_has_openmp")())


def read(address: int, num_bytes: int, threads: int) -> None:
    """Read memory once, front to back on each thread."""
    _function("moesaic_read")(address, num_bytes, threads)


def multiply_adds(dtype: torch.dtype, steps: int, threads: int) -> float:
    """Run ``steps`` rounds of multiply-adds on values in registers; the number of operations done, two each."""
    return float(_function("moesaic_multiply_adds")(FLOATS[dtype], steps, threads))


def _done(status: int) -> None:
    if status:
        raise MoesaicError("the native kernels ran out of memory: fewer tokens a call need less")


def _library() -> ctypes.CDLL:
    loaded = _load()
    if isinstance(loaded, str):
        raise UnsupportedError(f"the native kernels cannot be used here: {loaded}")
    return loaded


@functools.cache
def _function(name: str) -> Callable[..., Any]:
    function: Callable[..., Any] = getattr(_library(), name)
    return function


@functools.cache
def _load() -> ctypes.CDLL | str:
    """The library, or why there is none."""
    asked = os.environ.get("MOESAIC_LIBRARY")
    if asked and not Path(asked).is_file():
        raise ConfigError(f"MOESAIC_LIBRARY={asked}: there is no such file")
    path = Path(asked) if asked else BUILT
    if not path.is_file():
        reason = NOT_BUILT.read_text().strip() if NOT_BUILT.is_file() else "moesaic was installed without building it"
        return f"{reason}; the library {path.name} is missing"
    try:
        library = ctypes.CDLL(str(path))
        found = library.moesaic_abi()
    except (OSError, AttributeError) as error:
        return f"{path} cannot be loaded: {error}"
    if found != ABI:
        return f"{path.name} was built for another version of moesaic (ABI {found}, not {ABI}): install moesaic again"
    for name, (result, arguments) in _FUNCTIONS.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    if wanted := os.environ.get("MOESAIC_ISA"):
        _choose(library, wanted, "MOESAIC_ISA")
    return library


def _choose(library: ctypes.CDLL, name: str, where: str) -> None:
    if library.moesaic_choose_isa(name.encode()):
        available = library.moesaic_isas().decode().split(",")
        raise ConfigError(f"{where}={name!r} cannot be run on this CPU: {did_you_mean(name, available)}")
