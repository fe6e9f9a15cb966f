"""Address ranges in the memory of a CUDA device, through the driver's virtual memory management.

Addresses are reserved once; physical memory is made, mapped and opened granule by granule (2 MiB on today's cards) as
rows are committed, and unmapped and released as they go (CUDA Driver API, "Virtual Memory Management").
"""

from __future__ import annotations

import contextlib
import ctypes
from abc import ABC, abstractmethod
from ctypes import byref, c_int, c_size_t, c_ubyte, c_uint64, c_ushort, c_void_p
from typing import Any

import torch
from torch import Tensor

from moesaic.errors import UnsupportedError, UsageError
from moesaic.experts.ranges import AddressRange

# From <cuda.h>.
_OUT_OF_MEMORY = 2
_PINNED, _DEVICE, _READ_WRITE, _MINIMUM = 1, 1, 3, 0


class Driver(ABC):
    """The calls of a driver that a range is built on; sizes and addresses are multiples of the granularity.

    Raises:
        UsageError: from any call, where memory or addresses run out. UnsupportedError: where it fails otherwise.
    """

    @abstractmethod
    def granularity(self) -> int: ...

    @abstractmethod
    def reserve(self, size: int) -> int: ...

    @abstractmethod
    def free(self, address: int, size: int) -> None: ...

    @abstractmethod
    def create(self, size: int) -> int: ...

    @abstractmethod
    def release(self, handle: int) -> None: ...

    @abstractmethod
    def map(self, address: int, size: int, handle: int) -> None: ...

    @abstractmethod
    def unmap(self, address: int, size: int) -> None: ...

    @abstractmethod
    def open(self, address: int, size: int) -> None:
        """Let the device read and write what is mapped there."""

    @abstractmethod
    def synchronize(self) -> None:
        """Wait until the device has done all that it was asked for."""

    @abstractmethod
    def tensor(self, address: int, size: int, owner: object) -> Tensor:
        """``[size]`` uint8 over an address, of which the first byte is mapped; keeps ``owner`` alive."""


class _Reservation:
    """Addresses and what is mapped there; given back when the range and all tensors over it are gone."""

    def __init__(self, driver: Driver, size: int) -> None:
        self.driver, self.size, self.granule = driver, size, driver.granularity()
        self.handles: dict[int, int] = {}  # by the granule's offset
        self.address = driver.reserve(size)

    def commit(self, begin: int, end: int) -> None:
        try:
            for offset in range(begin, end, self.granule):
                self._map(offset)
            self.driver.open(self.address + begin, end - begin)
        except Exception:
            self.release(begin, end)
            raise

    def _map(self, offset: int) -> None:
        handle = self.driver.create(self.granule)
        try:
            self.driver.map(self.address + offset, self.granule, handle)
        except Exception:
            self.driver.release(handle)
            raise
        self.handles[offset] = handle

    def release(self, begin: int, end: int) -> None:
        for offset in range(begin, end, self.granule):
            handle = self.handles.pop(offset, None)
            if handle is not None:
                self.driver.unmap(self.address + offset, self.granule)
                self.driver.release(handle)

    def __del__(self) -> None:
        # At the end of the process the driver may be gone before; it has given everything back itself then.
        with contextlib.suppress(Exception):
            self.driver.synchronize()
            self.release(0, self.size)
            self.driver.free(self.address, self.size)


class DeviceRange(AddressRange):
    """:class:`AddressRange` on a CUDA device. Not yet run on one: tested against a driver that checks the protocol."""

    def __init__(self, rows: int, row_bytes: int, device: torch.device, driver: Driver | None = None) -> None:
        self._driver = driver or CudaDriver(device)
        super().__init__(rows, row_bytes, self._driver.granularity())
        self._reservation = _Reservation(self._driver, self.reserved)

    def view(self, rows: int, dtype: torch.dtype) -> Tensor:
        memory = self._driver.tensor(self._reservation.address, rows * self.row_bytes, self._reservation)
        return memory.view(dtype).view(rows, -1)

    def _commit(self, begin: int, end: int) -> None:
        self._reservation.commit(begin, end)

    def _release(self, begin: int, end: int) -> None:
        # Kernels that were launched may still read there: a host that runs ahead does not know.
        self._driver.synchronize()
        self._reservation.release(begin, end)


class _Location(ctypes.Structure):
    _fields_ = (("type", c_int), ("id", c_int))


class _AllocationFlags(ctypes.Structure):
    _fields_ = (("compression", c_ubyte), ("rdma", c_ubyte), ("usage", c_ushort), ("reserved", c_ubyte * 4))


class _Properties(ctypes.Structure):
    _fields_ = (
        ("type", c_int),
        ("handle_types", c_int),
        ("location", _Location),
        ("win32", c_void_p),
        ("flags", _AllocationFlags),
    )


class _Access(ctypes.Structure):
    _fields_ = (("location", _Location), ("flags", c_int))


class CudaDriver(Driver):
    """NVIDIA's driver, through ``libcuda``.

    Raises:
        UnsupportedError: where the library is missing or lacks these calls.
    """

    def __init__(self, device: torch.device) -> None:
        try:
            self._library: Any = ctypes.CDLL("libcuda.so.1")
            self._library.cuMemAddressReserve.restype = c_int  # raises where a driver is too old to have it
        except (OSError, AttributeError) as error:
            raise UnsupportedError(
                f"expert slots on {device} need NVIDIA's driver from CUDA 10.2 on: {error}"
            ) from error
        torch.cuda.init()
        index = torch.cuda.current_device() if device.index is None else device.index
        self._device = torch.device("cuda", index)
        torch.zeros(1, device=self._device)  # makes the device's primary context
        self._location = _Location(_DEVICE, index)
        self._properties = _Properties(type=_PINNED, location=self._location)

    def granularity(self) -> int:
        size = c_size_t()
        self._call("cuMemGetAllocationGranularity", byref(size), byref(self._properties), c_int(_MINIMUM))
        return size.value

    def reserve(self, size: int) -> int:
        address = c_uint64()
        self._call("cuMemAddressReserve", byref(address), c_size_t(size), c_size_t(0), c_uint64(0), c_uint64(0))
        return address.value

    def free(self, address: int, size: int) -> None:
        self._call("cuMemAddressFree", c_uint64(address), c_size_t(size))

    def create(self, size: int) -> int:
        handle = c_uint64()
        self._call("cuMemCreate", byref(handle), c_size_t(size), byref(self._properties), c_uint64(0))
        return handle.value

    def release(self, handle: int) -> None:
        self._call("cuMemRelease", c_uint64(handle))

    def map(self, address: int, size: int, handle: int) -> None:
        self._call("cuMemMap", c_uint64(address), c_size_t(size), c_size_t(0), c_uint64(handle), c_uint64(0))

    def unmap(self, address: int, size: int) -> None:
        self._call("cuMemUnmap", c_uint64(address), c_size_t(size))

    def open(self, address: int, size: int) -> None:
        access = _Access(self._location, _READ_WRITE)
        self._call("cuMemSetAccess", c_uint64(address), c_size_t(size), byref(access), c_size_t(1))

    def synchronize(self) -> None:
        torch.cuda.synchronize(self._device)

    def tensor(self, address: int, size: int, owner: object) -> Tensor:
        return torch.as_tensor(_Array(address, size, owner), device=self._device)

    def _call(self, name: str, *arguments: object) -> None:
        with torch.cuda.device(self._device):
            status = getattr(self._library, name)(*arguments)
        if status == _OUT_OF_MEMORY:
            raise UsageError(f"{self._device} has not enough free memory for expert slots ({name})")
        if status:
            message = ctypes.c_char_p()
            self._library.cuGetErrorString(c_int(status), byref(message))
            said = (message.value or b"unknown error").decode()
            raise UnsupportedError(f"{name} failed on {self._device}: {said} ({status})")


class _Array:
    """Memory as other libraries hand it to PyTorch, which keeps this object as long as the tensor lives."""

    def __init__(self, address: int, size: int, owner: object) -> None:
        self._owner = owner
        self.__cuda_array_interface__ = {
            "shape": (size,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 2,
        }
