"""The memory that weights lie in: its order, and the size of its pages."""

from __future__ import annotations

import ctypes
import sys

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
    if tensor.device.type != "cpu" or not sys.platform.startswith("linux"):
        return
    storage = tensor.untyped_storage()
    start = -(-storage.data_ptr() // _HUGE_PAGE) * _HUGE_PAGE
    size = (storage.data_ptr() + storage.nbytes()) // _HUGE_PAGE * _HUGE_PAGE - start
    if size <= 0:
        return
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    madvise(start, size, _MADV_HUGEPAGE)
    madvise(start, size, _MADV_COLLAPSE)  # what is there already; kernels before 6.1 only do it by and by
