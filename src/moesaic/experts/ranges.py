"""Reserved address ranges: one tensor of many rows, of which only those in use take memory.

A range holds the experts of a base model in its first rows and has room behind them, so that the experts of an adapter
may come and go while every kernel goes on seeing one contiguous ``[slots, ...]`` tensor (ExpertWeave, "Virtual Weight
Tensor"). Nothing is padded: rows follow one another, and a page that two of them share stays until both are gone.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import sys
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from moesaic.errors import UnsupportedError, UsageError

HUGE_PAGE = 2 << 20
# From <asm-generic/mman.h>; Python before 3.13 does not name it.
_MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)
_MAP_FIXED = 0x10  # the same on Linux and macOS


class AddressRange(ABC):
    """``rows`` rows of ``row_bytes`` bytes at consecutive addresses; made by :func:`reserve`.

    Rows are committed in runs ``[first, last)`` before they are written, and released in any others. The memory behind
    a row that is not committed must not be read.

    Attributes:
        rows, row_bytes: what was reserved.
        granule: the unit in which memory comes and goes, in bytes.
        committed: bytes of all granules that a committed row lies in.
    """

    def __init__(self, rows: int, row_bytes: int, granule: int) -> None:
        self.rows, self.row_bytes, self.granule = rows, row_bytes, granule
        self.committed = 0
        self._live = bytearray(rows)

    @property
    def reserved(self) -> int:
        """Bytes of addresses: all rows in whole granules."""
        return _up(self.rows * self.row_bytes, self.granule)

    @abstractmethod
    def view(self, rows: int, dtype: torch.dtype) -> Tensor:
        """``[rows, row_bytes / itemsize]``, the first rows; a storage of its own, which ends with them.

        The mapping lives as long as any such tensor. Committed rows only may be read and written.
        """

    def use_huge_pages(self, rows: int) -> None:
        """Hold the first rows in huge pages, as far as they fill them; to be called before they are written."""
        return  # where there is nothing to choose

    def commit(self, first: int, last: int) -> None:
        """Make the rows ``[first, last)``, none of which is committed, usable; they hold anything.

        Raises:
            UsageError: where there is not enough memory; nothing is changed then.
        """
        assert not any(self._live[first:last])
        begin, end = self._own(first, last)
        if begin < end:
            self._commit(begin, end)
        self._live[first:last] = b"\1" * (last - first)
        self.committed += end - begin

    def release(self, first: int, last: int) -> None:
        """Give the memory of the committed rows ``[first, last)`` back; nothing may be reading them."""
        assert all(self._live[first:last])
        self._live[first:last] = bytes(last - first)
        begin, end = self._own(first, last)
        if begin < end:
            self._release(begin, end)
        self.committed -= end - begin

    def _own(self, first: int, last: int) -> tuple[int, int]:
        """The bytes of the granules in which the rows ``[first, last)`` lie, and no other committed row."""
        before, after = self._live.rfind(1, 0, first), self._live.find(1, last)
        begin = max(
            first * self.row_bytes // self.granule * self.granule, _up((before + 1) * self.row_bytes, self.granule)
        )
        end = _up(last * self.row_bytes, self.granule)
        if after >= 0:
            end = min(end, after * self.row_bytes // self.granule * self.granule)
        return begin, max(begin, end)

    @abstractmethod
    def _commit(self, begin: int, end: int) -> None:
        """Make bytes ``[begin, end)`` usable; multiples of the granule."""

    @abstractmethod
    def _release(self, begin: int, end: int) -> None:
        """Give them back."""


class HostRange(AddressRange):
    """One anonymous private mapping: the system commits a page when it is first written.

    Where each row fills whole huge pages, in which reading is faster, the system is asked for those; else it is asked
    for small ones, so that no more memory is committed than the rows need.
    """

    def __init__(self, rows: int, row_bytes: int) -> None:
        super().__init__(rows, row_bytes, mmap.PAGESIZE)
        flags = {"flags": mmap.MAP_PRIVATE | _reserve_flag()} if hasattr(mmap, "MAP_PRIVATE") else {}
        try:
            self._map = mmap.mmap(-1, self.reserved + HUGE_PAGE, **flags)
        except (OSError, OverflowError) as error:
            raise UsageError(
                f"{self.reserved / 2**30:.1f} GiB of addresses cannot be reserved for {rows} expert slots of "
                f"{row_bytes} bytes ({error}): ask for fewer slots"
            ) from error
        address = torch.frombuffer(self._map, dtype=torch.uint8).data_ptr()
        self._offset = -address % HUGE_PAGE
        self._start = address + self._offset
        self._advise("MADV_HUGEPAGE" if row_bytes % HUGE_PAGE == 0 else "MADV_NOHUGEPAGE", 0, self.reserved)

    def view(self, rows: int, dtype: torch.dtype) -> Tensor:
        count = rows * self.row_bytes // dtype.itemsize
        return torch.frombuffer(self._map, dtype=dtype, count=count, offset=self._offset).view(rows, -1)

    def use_huge_pages(self, rows: int) -> None:
        self._advise("MADV_HUGEPAGE", 0, rows * self.row_bytes // HUGE_PAGE * HUGE_PAGE)

    def _commit(self, begin: int, end: int) -> None:
        """Writing does it."""

    def _release(self, begin: int, end: int) -> None:
        # Other systems take this advice late or not at all, and none takes it for locked memory: a new mapping in the
        # old one's place works there.
        if not (sys.platform.startswith("linux") and self._advise("MADV_DONTNEED", begin, end)):
            if hasattr(mmap, "MAP_PRIVATE"):
                _map_anew(self._start + begin, end - begin)

    def _advise(self, advice: str, begin: int, end: int) -> bool:
        """Whether the system took it. Not mmap.madvise, which would keep every other thread of Python waiting."""
        if begin >= end or not hasattr(mmap, advice):
            return False
        taken: int = _libc().madvise(self._start + begin, end - begin, getattr(mmap, advice))
        return taken == 0


def reserve(rows: int, row_bytes: int, device: torch.device | str) -> AddressRange:
    """Addresses for ``rows`` rows of ``row_bytes`` bytes on a device; no memory yet.

    Raises:
        UsageError: where the system has not as many addresses.
        UnsupportedError: on devices other than the CPU and CUDA's.
    """
    device = torch.device(device)
    if device.type == "cpu":
        return HostRange(rows, row_bytes)
    if device.type == "cuda":
        from moesaic.experts.ranges_cuda import DeviceRange

        return DeviceRange(rows, row_bytes, device)
    raise UnsupportedError(f"address ranges are reserved on the CPU and on CUDA devices, not on {device}")


def _up(size: int, granule: int) -> int:
    return -(-size // granule) * granule


def _reserve_flag() -> int:
    return _MAP_NORESERVE if sys.platform.startswith("linux") else 0


@functools.cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
    libc.mmap.restype = ctypes.c_void_p
    return libc


def _map_anew(address: int, size: int) -> None:
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANON | _MAP_FIXED | _reserve_flag()
    _libc().mmap(address, size, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
