"""Address ranges: what is committed and given back, who keeps the mapping; a driver that checks its callers."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moesaic.errors import UnsupportedError, UsageError
from moesaic.experts import ranges, ranges_cuda
from moesaic.experts.ranges import AddressRange, HostRange, reserve
from moesaic.experts.ranges_cuda import CudaDriver, DeviceRange, Driver

PAGE = mmap.PAGESIZE
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks Linux which pages are there")


def resident(tensor: Tensor) -> int:
    """Bytes of the pages of a tensor's storage that are in memory."""
    start = tensor.data_ptr() // PAGE * PAGE
    size = tensor.data_ptr() + tensor.untyped_storage().nbytes() - start
    found = (ctypes.c_ubyte * (-(-size // PAGE)))()
    mincore = ctypes.CDLL(None).mincore
    mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
    assert mincore(start, size, found) == 0
    return PAGE * sum(page & 1 for page in found)


def needed(live: set[int], row_bytes: int, granule: int) -> int:
    """Bytes of the granules that some live row lies in, one by one."""
    return granule * len(
        {at for row in live for at in range(row * row_bytes // granule, ((row + 1) * row_bytes - 1) // granule + 1)}
    )


@st.composite
def histories(draw: st.DrawFn) -> tuple[int, int, list[tuple[int, int]]]:
    """Rows, bytes of one, and runs each of which is committed where it is free, released where it is committed."""
    rows = draw(st.integers(1, 12))
    row_bytes = draw(st.sampled_from([4, 100, 2048, 4096, 4100, 8192, 10000, 20480]))
    run = st.integers(0, rows - 1).flatmap(lambda first: st.tuples(st.just(first), st.integers(first + 1, rows)))
    return rows, row_bytes, draw(st.lists(run, max_size=20))


def follow(memory: AddressRange, history: list[tuple[int, int]]) -> Iterator[int]:
    """Commit and release; live rows keep what was written to them. After each step the bytes that they need."""
    written: dict[int, int] = {}
    for number, (first, last) in enumerate(history):
        run = set(range(first, last))
        if not run & set(written):
            memory.commit(first, last)
            memory.view(last, torch.uint8)[first:last] = number + 1
            written |= dict.fromkeys(run, number + 1)
        elif run <= set(written):
            memory.release(first, last)
            written = {row: value for row, value in written.items() if row not in run}
        for row, value in written.items():
            assert (memory.view(row + 1, torch.uint8)[row] == value).all()
        yield needed(set(written), memory.row_bytes, memory.granule)


@linux
@given(histories())
def test_exactly_the_pages_of_committed_rows_are_in_memory(told: tuple[int, int, list[tuple[int, int]]]) -> None:
    rows, row_bytes, history = told
    memory = reserve(rows, row_bytes, "cpu")
    for bytes_needed in follow(memory, history):
        assert memory.committed == bytes_needed == resident(memory.view(rows, torch.uint8))


def test_views_are_one_tensor_with_a_storage_that_ends_with_them() -> None:
    memory = reserve(10, 24, "cpu")
    memory.commit(0, 10)
    three, ten = memory.view(3, torch.float32), memory.view(10, torch.float32)
    assert three.shape == (3, 6) and ten.shape == (10, 6) and ten.is_contiguous()
    assert three.data_ptr() == ten.data_ptr() and three.untyped_storage().nbytes() == 72
    three.fill_(2)
    assert (ten[:3] == 2).all()
    assert memory.view(10, torch.bfloat16).shape == (10, 12)


@linux
def test_the_mapping_lives_as_long_as_a_tensor_over_it() -> None:
    memory = reserve(4, 3 * ranges.HUGE_PAGE, "cpu")
    memory.commit(0, 1)
    view = memory.view(4, torch.uint8)
    address = view.data_ptr()
    first = view[0, :10]
    first.fill_(7)
    del memory, view
    assert (first == 7).all() and is_mapped(address)
    del first
    assert not is_mapped(address)


def is_mapped(address: int) -> bool:
    spans = (line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines())
    return any(int(begin, 16) <= address < int(end, 16) for begin, end in spans)


@linux
def test_only_rows_that_fill_huge_pages_may_have_them() -> None:
    """Else a few bytes of an adapter would take two megabytes, where a system gives huge pages unasked."""
    wide, odd = reserve(4, ranges.HUGE_PAGE, "cpu"), reserve(4, ranges.HUGE_PAGE + 4096, "cpu")
    odd.use_huge_pages(2)
    assert "hg" in flags(wide.view(4, torch.uint8)[3])
    assert "hg" in flags(odd.view(4, torch.uint8)[0])
    assert "nh" in flags(odd.view(4, torch.uint8)[3])


def flags(tensor: Tensor) -> list[str]:
    """What Linux was advised of the memory of a tensor."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = line.split()[0]
        if "-" in head:
            begin, end = (int(part, 16) for part in head.split("-"))
            inside = begin <= tensor.data_ptr() < end
        elif inside and head == "VmFlags:":
            return line.split()[1:]
    raise AssertionError("no such mapping")


@linux
def test_systems_that_take_no_advice_map_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    memory = HostRange(3, 2 * PAGE)
    memory.commit(0, 3)
    rows = memory.view(3, torch.uint8)
    rows.fill_(5)
    memory.release(1, 2)
    assert resident(rows) == 4 * PAGE and memory.committed == 4 * PAGE
    assert (rows[0] == 5).all() and (rows[1] == 0).all() and (rows[2] == 5).all()


def test_systems_without_private_mappings_keep_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.delattr(mmap, "MAP_PRIVATE")
    memory = HostRange(3, 2 * PAGE)
    memory.commit(0, 3)
    rows = memory.view(3, torch.uint8)
    rows.fill_(5)
    memory.release(1, 2)
    memory.commit(1, 2)
    assert (rows[0] == 5).all() and (rows[2] == 5).all()


@pytest.mark.parametrize("row_bytes", [1 << 40, 1 << 60])
def test_more_addresses_than_there_are(row_bytes: int) -> None:
    with pytest.raises(UsageError, match="cannot be reserved"):
        reserve(1 << 12, row_bytes, "cpu")


def test_other_devices_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="not on meta"):
        reserve(1, 1, "meta")


class _Owned(np.ndarray):
    owner: object


class StrictDriver(Driver):
    """Host memory behind the calls of a device's driver, which refuses whatever the real one would."""

    def __init__(self, granule: int = 1024, memory: int = 1 << 30) -> None:
        self.granule, self.free_memory = granule, memory
        self.reserved: dict[int, Any] = {}
        self.created: set[int] = set()
        self.mapped: dict[int, int] = {}  # address to handle
        self.opened: set[int] = set()
        self.log: list[str] = []
        self._next = 1

    def granularity(self) -> int:
        return self.granule

    def reserve(self, size: int) -> int:
        self._whole(size)
        memory = np.zeros(size, dtype=np.uint8)
        self.reserved[memory.ctypes.data] = memory
        return memory.ctypes.data

    def free(self, address: int, size: int) -> None:
        assert len(self.reserved[address]) == size
        assert not [at for at in self.mapped if address <= at < address + size], "still mapped"
        del self.reserved[address]

    def create(self, size: int) -> int:
        self._whole(size)
        if size > self.free_memory:
            raise UsageError("not enough free memory")
        self.free_memory -= size
        self._next += 1
        self.created.add(self._next)
        return self._next

    def release(self, handle: int) -> None:
        assert handle not in self.mapped.values(), "still mapped"
        self.created.remove(handle)
        self.free_memory += self.granule

    def map(self, address: int, size: int, handle: int) -> None:
        assert size == self.granule and handle in self.created and handle not in self.mapped.values()
        inside = [base for base, memory in self.reserved.items() if base <= address < base + len(memory)]
        assert len(inside) == 1 and (address - inside[0]) % self.granule == 0
        assert address not in self.mapped
        self.mapped[address] = handle

    def unmap(self, address: int, size: int) -> None:
        assert size == self.granule
        del self.mapped[address]
        self.opened.discard(address)
        self.log.append("unmap")

    def open(self, address: int, size: int) -> None:
        self._whole(size)
        every = set(range(address, address + size, self.granule))
        assert every <= set(self.mapped) and not every & self.opened
        self.opened |= every

    def synchronize(self) -> None:
        self.log.append("synchronize")

    def tensor(self, address: int, size: int, owner: object) -> Tensor:
        array = self.reserved[address][:size].view(_Owned)
        array.owner = owner
        return torch.from_numpy(array)

    def _whole(self, size: int) -> None:
        assert size > 0 and size % self.granule == 0


CUDA = torch.device("cuda", 0)


@given(histories())
def test_granules_of_a_device_are_shared_by_rows_and_returned_with_the_last(
    told: tuple[int, int, list[tuple[int, int]]],
) -> None:
    rows, row_bytes, history = told
    driver = StrictDriver()
    memory = DeviceRange(rows, row_bytes, CUDA, driver)
    for bytes_needed in follow(memory, history):
        assert memory.committed == bytes_needed == driver.granule * len(driver.created)
        assert set(driver.mapped) == driver.opened
    del memory
    assert not driver.created and not driver.reserved


def test_a_device_is_waited_for_before_its_memory_goes() -> None:
    driver = StrictDriver()
    memory = DeviceRange(4, 1024, CUDA, driver)
    memory.commit(0, 4)
    memory.release(1, 3)
    assert driver.log == ["synchronize", "unmap", "unmap"]


def test_the_reservation_lives_as_long_as_a_tensor_over_it() -> None:
    driver = StrictDriver()
    memory = DeviceRange(4, 1024, CUDA, driver)
    memory.commit(0, 4)
    view = memory.view(2, torch.bfloat16)
    del memory
    view.fill_(3)
    assert driver.reserved and len(driver.created) == 4
    del view
    assert not driver.reserved and not driver.created


def test_a_device_without_memory_changes_nothing() -> None:
    driver = StrictDriver(memory=5 * 1024)
    memory = DeviceRange(8, 1500, CUDA, driver)
    memory.commit(0, 2)
    before = memory.committed, set(driver.mapped)
    with pytest.raises(UsageError, match="not enough"):
        memory.commit(2, 8)
    assert (memory.committed, set(driver.mapped)) == before and len(driver.created) == 3
    memory.commit(2, 3)
    assert memory.committed == 5 * 1024


def test_a_mapping_that_fails_leaves_no_memory_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = StrictDriver()
    memory = DeviceRange(8, 1024, CUDA, driver)

    def refuse(*_: object) -> None:
        raise UnsupportedError("no")

    with monkeypatch.context() as patch:
        patch.setattr(driver, "map", refuse)
        with pytest.raises(UnsupportedError):
            memory.commit(0, 2)
        patch.undo()
        patch.setattr(driver, "open", refuse)
        with pytest.raises(UnsupportedError):
            memory.commit(0, 2)
    assert not driver.created and not driver.mapped and memory.committed == 0


def test_a_machine_without_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> None:
        raise OSError("libcuda.so.1: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    with pytest.raises(UnsupportedError, match=r"need NVIDIA's driver.*libcuda\.so\.1"):
        reserve(4, 1024, "cuda")


class FakeLibrary:
    """``libcuda`` with one status for every call; it keeps what it was given."""

    def __init__(self, status: int) -> None:
        self.status, self.calls = status, []  # type: ignore[var-annotated]

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> int:
            self.calls.append((name, arguments))
            if name == "cuGetErrorString":
                ctypes.cast(arguments[1], ctypes.POINTER(ctypes.c_char_p))[0] = b"illegal state"
                return 0
            return self.status

        return call


@pytest.fixture
def no_context(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch without CUDA cannot make a device the current one."""
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())


def cuda_driver(status: int) -> tuple[CudaDriver, FakeLibrary]:
    driver, library = CudaDriver.__new__(CudaDriver), FakeLibrary(status)
    driver._library, driver._device = library, torch.device("cuda", 3)
    driver._location = ranges_cuda._Location(1, 3)
    driver._properties = ranges_cuda._Properties(type=1, location=driver._location)
    return driver, library


@pytest.mark.parametrize(
    ("status", "error", "said"),
    [(2, UsageError, "not enough free memory"), (4, UnsupportedError, r"illegal state \(4\)")],
)
@pytest.mark.usefixtures("no_context")
def test_what_a_driver_refuses_is_told(status: int, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=f"cuMemCreate.*{said}|{said}.*cuMemCreate"):
        cuda_driver(status)[0].create(1 << 21)


@pytest.mark.usefixtures("no_context")
def test_structs_are_those_of_the_driver() -> None:
    """Sizes and offsets by <cuda.h> on 64-bit systems."""
    properties = ranges_cuda._Properties
    assert ctypes.sizeof(properties) == 32 and ctypes.sizeof(ranges_cuda._Access) == 12
    assert (properties.location.offset, properties.win32.offset, properties.flags.offset) == (8, 16, 24)
    driver, library = cuda_driver(0)
    driver.open(1 << 21, 2 << 21)
    name, (address, size, access, count) = library.calls[0]
    told = access._obj
    assert (name, address.value, size.value, count.value) == ("cuMemSetAccess", 1 << 21, 2 << 21, 1)
    assert (told.location.type, told.location.id, told.flags) == (1, 3, 3)
