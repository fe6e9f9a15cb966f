"""The memory that weights lie in: its order, and the size of its pages."""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable

from torch import Tensor

# From Linux's <asm-generic/mman-common.h>.
_MADV_HUGEPAGE, _MADV_COLLAPSE = 14, 25
_HUGE_PAGE = 2 << 20


def inputs_last(matrix_EIO: Tensor) -> Tensor:
    """The values and the shape of a contiguous ``matrix``, in the same memory with its inputs contiguous: strides of
    ``[E, O, I]``, seen transposed.

    The memory of ``matrix`` itself is overwritten, expert by expert; one expert's matrix is held twice meanwhile.
    """
    num_experts, inputs, outputs = matrix_EIO.shape
    reordered_EOI = matrix_EIO.view(num_experts, outputs, inputs)
    for expert in range(num_experts):
        reordered_EOI[expert] = matrix_EIO[expert].t().contiguous()
    return reordered_EOI.transpose(1, 2)


def use_huge_pages(tensor: Tensor) -> None:
    """Ask Linux to hold the tensor's memory in pages of 2 MiB: where we measured, reading was a tenth faster so.

    A wish: memory on another device, other systems, and memory that cannot be had so are left as they are.
    """
    if _is_linux_memory(tensor):
        storage = tensor.untyped_storage()
        # Collapsing is for what is there already; kernels before 6.1 only do it by and by.
        _advise(storage.data_ptr(), storage.nbytes(), _MADV_HUGEPAGE, _MADV_COLLAPSE)


def filled_by_huge_pages(tensor: Tensor) -> Tensor:
    """``tensor`` itself, new and not written to yet: Linux is asked to bring in its memory by pages of 2 MiB.

    A page comes in, zeroed, when it is first touched. By pages of 4 KiB that took 0.4 ms a MiB where we measured, six
    times as long as by large ones, and longer than computing a large gradient from few rows.
    """
    if tensor.nbytes >= 2 * _HUGE_PAGE and _is_linux_memory(tensor):
        _advise(tensor.data_ptr(), tensor.nbytes, _MADV_HUGEPAGE)
    return tensor


def _is_linux_memory(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and sys.platform.startswith("linux")


def _advise(address: int, num_bytes: int, *advice: int) -> None:
    """Tell Linux so of the whole large pages that lie in a range of memory."""
    start = -(-address // _HUGE_PAGE) * _HUGE_PAGE
    size = (address + num_bytes) // _HUGE_PAGE * _HUGE_PAGE - start
    if size > 0:
        for each in advice:
            _madvise()(start, size, each)


@functools.cache
def _madvise() -> Callable[[int, int, int], int]:
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return madvise
