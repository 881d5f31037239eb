"""A stand-in for `cuda.bindings.driver` on machines without a GPU; it finds what a GPU would not forgive.

Device memory is host memory at its real addresses, filled with bytes that are no number. A stream runs nothing
until it is synchronized, so a result that is read too early, or an input that is overwritten too early, is
wrong. Memory that was freed, or bytes beyond an allocation, raise AssertionError when work touches them.
`tests/test_cuda.py` compares every name here with the real module.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from types import SimpleNamespace
from typing import Any

import numpy as np

GUARD = 256


class CUresult(IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_STUB_LIBRARY = 34
    CUDA_ERROR_NO_DEVICE = 100
    CUDA_ERROR_INVALID_CONTEXT = 201
    CUDA_ERROR_ILLEGAL_ADDRESS = 700
    CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED = 900
    CUDA_ERROR_STREAM_CAPTURE_INVALIDATED = 901


class CUdevice_attribute(IntEnum):  # the real module's names
    CU_DEVICE_ATTRIBUTE_INTEGRATED = 18
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR = 75
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR = 76


class CUstream_flags(IntEnum):
    CU_STREAM_NON_BLOCKING = 1


class CUstreamCaptureMode(IntEnum):
    CU_STREAM_CAPTURE_MODE_THREAD_LOCAL = 1


class CUmemorytype(IntEnum):
    CU_MEMORYTYPE_DEVICE = 2


OK = CUresult.CUDA_SUCCESS


@dataclass
class FakeGpu:
    """The driver, as `vlm_edge.runtime.cuda` sees it.

    Attributes:
        failing: by function, the status it answers with.
        uncapturable: does work of libraries end a capture?
        calls: names of the functions called, in order.
        arguments: of the last call of each.
    """

    integrated: bool = False
    total: int = 1 << 30
    version: int = 12060
    count: int = 1
    capability: tuple[int, int] = (8, 6)
    installed: bool = True
    uncapturable: bool = False
    failing: dict[str, CUresult] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)
    arguments: dict[str, tuple[Any, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.device: dict[int, np.ndarray] = {}
        self.pinned: dict[int, np.ndarray] = {}
        self._freed: list[np.ndarray] = []  # kept, so that no new memory gets their addresses
        self._queue: list[Callable[[], None]] = []
        self._recorded: list[Callable[[], None]] | None = None
        self._broken = False  # the capture has met what cannot be captured
        self._current = dict[int, int]()  # context by thread
        self._retained = 0
        self.streams, self.graphs, self.executables = 0, set[int](), dict[int, list[Any]]()
        self._handles = iter(range(1000, 1_000_000))
        self.CUresult, self.CUdevice_attribute = CUresult, CUdevice_attribute
        self.CUstream_flags, self.CUstreamCaptureMode = CUstream_flags, CUstreamCaptureMode
        self.CUmemorytype, self.CUDA_MEMCPY2D = CUmemorytype, SimpleNamespace
        self.CU_MEMHOSTALLOC_DEVICEMAP = 2

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        if not name.startswith("cu"):
            return value
        return lambda *args: self._call(name, value, args)

    def _call(self, name: str, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        self.calls.append(name)
        self.arguments[name] = args
        if name in self.failing:
            return (self.failing[name], None)
        if name.startswith(("cuMem", "cuStream", "cuGraph")) and not self.has_context:
            return (CUresult.CUDA_ERROR_INVALID_CONTEXT, None)
        return function(*args)

    # -- what tests ask ---------------------------------------------------------------------------

    @property
    def clean(self) -> bool:
        """Has everything been given back?"""
        left = (
            self.device,
            self.pinned,
            self._retained,
            self.streams,
            self.graphs,
            self.executables,
        )
        return not any(left)

    def view(self, address: int, size: int, mapped: bool = True) -> np.ndarray:
        """uint8 [size], of live memory that the GPU may touch."""
        pools = [self.device, self.pinned] if mapped and self.integrated else [self.device]
        return _find(pools, address, size)

    def enqueue(self, work: Callable[[], None]) -> None:
        """As a library does on the stream."""
        if self._recorded is None:
            self._queue.append(work)
        elif self.uncapturable:
            self._broken = True
        else:
            self._recorded.append(work)

    @property
    def has_context(self) -> bool:
        """Has this thread a context?"""
        return threading.get_ident() in self._current

    @property
    def capturing(self) -> bool:
        return self._recorded is not None

    # -- the driver --------------------------------------------------------------------------------

    def cuInit(self, flags: int) -> Any:
        if not self.installed:
            raise RuntimeError("Failed to dlopen libcuda.so.1")
        return (OK,) if self.count else (CUresult.CUDA_ERROR_NO_DEVICE,)

    def cuDriverGetVersion(self) -> Any:
        return OK, self.version

    def cuDeviceGetCount(self) -> Any:
        return OK, self.count

    def cuDeviceGet(self, ordinal: int) -> Any:
        return OK, ordinal

    def cuDeviceGetName(self, length: int, device: int) -> Any:
        return OK, b"Fake GPU".ljust(length, b"\0")

    def cuDeviceGetAttribute(self, attribute: int, device: int) -> Any:
        values = {18: int(self.integrated), 75: self.capability[0], 76: self.capability[1]}
        return OK, values[attribute]

    def cuDevicePrimaryCtxRetain(self, device: int) -> Any:
        self._retained += 1
        return OK, 7

    def cuDevicePrimaryCtxRelease(self, device: int) -> Any:
        self._retained -= 1
        return (OK,)

    def cuCtxSetCurrent(self, context: int) -> Any:
        self._current[threading.get_ident()] = context
        return (OK,)

    def cuMemGetInfo(self) -> Any:
        return OK, self.total - sum(map(len, self.device.values())), self.total

    def cuMemAlloc(self, size: int) -> Any:
        assert size > 0
        if size > self.cuMemGetInfo()[1]:
            return CUresult.CUDA_ERROR_OUT_OF_MEMORY, None
        return OK, _allocate(self.device, size)

    def cuMemFree(self, address: int) -> Any:
        assert not self._queue, "memory is freed while work is queued"
        self._forget(self.device.pop(address))
        return (OK,)

    def cuMemHostAlloc(self, size: int, flags: int) -> Any:
        assert flags == (2 if self.integrated else 0)
        return OK, _allocate(self.pinned, size)

    def cuMemHostGetDevicePointer(self, address: int, flags: int) -> Any:
        assert self.integrated and address in self.pinned
        return OK, address

    def cuMemFreeHost(self, address: int) -> Any:
        assert not self._queue, "memory is freed while work is queued"
        self._forget(self.pinned.pop(address))
        return (OK,)

    def cuMemcpyHtoDAsync(self, target: int, source: int, size: int, stream: int) -> Any:
        if self._is_pinned(source):  # read when the copy's turn comes
            self._work(lambda: _copy(self.view(target, size), _find([self.pinned], source, size)))
        else:
            assert not self.capturing, "pageable memory is copied in a graph"
            staged = _raw(source, size).copy()
            self._work(lambda: _copy(self.view(target, size), staged))
        return (OK,)

    def cuMemcpyDtoHAsync(self, target: int, source: int, size: int, stream: int) -> Any:
        if self._is_pinned(target):
            self._work(lambda: _copy(_find([self.pinned], target, size), self.view(source, size)))
        else:
            assert not self.capturing, "pageable memory is copied in a graph"
            self._work(lambda: _copy(_raw(target, size), self.view(source, size)))
        return (OK,)

    def cuMemcpy2DAsync(self, copy: Any, stream: int) -> Any:
        assert copy.srcMemoryType == copy.dstMemoryType == CUmemorytype.CU_MEMORYTYPE_DEVICE
        assert copy.WidthInBytes <= min(copy.srcPitch, copy.dstPitch)
        for row in range(copy.Height):
            source, target = (
                copy.srcDevice + row * copy.srcPitch,
                copy.dstDevice + row * copy.dstPitch,
            )
            self._work(
                lambda s=source, t=target: _copy(
                    self.view(t, copy.WidthInBytes), self.view(s, copy.WidthInBytes)
                )
            )
        return (OK,)

    def cuMemsetD8Async(self, address: int, value: int, size: int, stream: int) -> Any:
        self._work(lambda: self.view(address, size).fill(value))
        return (OK,)

    def cuStreamCreate(self, flags: int) -> Any:
        self.streams += 1
        return OK, 99

    def cuStreamDestroy(self, stream: int) -> Any:
        self.streams -= 1
        return (OK,)

    def cuStreamSynchronize(self, stream: int) -> Any:
        assert not self.capturing, "a stream that records cannot be waited for"
        queue, self._queue = self._queue, []
        for work in queue:
            work()
        return (OK,)

    def cuStreamBeginCapture(self, stream: int, mode: int) -> Any:
        assert not self.capturing
        self._recorded, self._broken = [], False
        return (OK,)

    def cuStreamEndCapture(self, stream: int) -> Any:
        recorded, self._recorded = self._recorded, None
        if self._broken:
            return CUresult.CUDA_ERROR_STREAM_CAPTURE_INVALIDATED, None
        handle = next(self._handles)
        self.graphs.add(handle)
        self._last = recorded
        return OK, handle

    def cuGraphInstantiate(self, graph: int, flags: int) -> Any:
        handle = next(self._handles)
        self.executables[handle] = list(self._last or ())
        return OK, handle

    def cuGraphDestroy(self, graph: int) -> Any:
        self.graphs.remove(graph)
        return (OK,)

    def cuGraphExecDestroy(self, executable: int) -> Any:
        del self.executables[executable]
        return (OK,)

    def cuGraphLaunch(self, executable: int, stream: int) -> Any:
        self._queue.extend(self.executables[executable])
        return (OK,)

    def cuGetErrorName(self, status: CUresult) -> Any:
        return OK, status.name.encode()

    def cuGetErrorString(self, status: CUresult) -> Any:
        return OK, status.name.removeprefix("CUDA_ERROR_").lower().replace("_", " ").encode()

    def _forget(self, memory: np.ndarray) -> None:
        memory.fill(0xFF)  # whoever still reads it sees no numbers
        self._freed.append(memory)

    def _work(self, work: Callable[[], None]) -> None:
        (self._queue if self._recorded is None else self._recorded).append(work)

    def _is_pinned(self, address: int) -> bool:
        return any(start <= address < start + len(array) for start, array in self.pinned.items())


def _allocate(pool: dict[int, np.ndarray], size: int) -> int:
    """Bytes of 0xFF (NaN in every float type), at an address as CUDA aligns it, apart from all others."""
    whole = np.full(size + 3 * GUARD, 0xFF, np.uint8)
    skip = -whole.ctypes.data % GUARD + GUARD
    pool[whole.ctypes.data + skip] = whole[skip : skip + size]
    return whole.ctypes.data + skip


def _find(pools: list[dict[int, np.ndarray]], address: int, size: int) -> np.ndarray:
    for pool in pools:
        for start, array in pool.items():
            if start <= address and address + size <= start + len(array):
                return array[address - start :][:size]
    raise AssertionError(f"{size} bytes at {address:#x} are not in live memory")


def _raw(address: int, size: int) -> np.ndarray:
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))


def _copy(target: np.ndarray, source: np.ndarray) -> None:
    target[...] = source
