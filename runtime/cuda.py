"""An NVIDIA GPU through CUDA's driver API: its memory, one stream of work, and graphs of that work.

`cuda.bindings.driver` (package cuda-bindings) calls the driver that is installed and brings no CUDA
runtime of its own, so one version serves desktops, servers and Jetson.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlm_edge.errors import (
    DeviceUnavailable,
    DriverTooOld,
    EngineFailure,
    ExtraMissing,
    GpuFailure,
    OutOfDeviceMemory,
)

LEAST_DRIVER = 12000  # CUDA 12.0, as cuDriverGetVersion counts
NAME_BYTES = 256


def load_driver() -> Any:
    """The module `cuda.bindings.driver`.

    Raises:
        ExtraMissing: cuda-bindings is not installed.
    """
    try:
        return importlib.import_module("cuda.bindings.driver")
    except ImportError as error:
        raise ExtraMissing("tensorrt", "cuda-bindings", "running on an NVIDIA GPU") from error


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes on the GPU."""

    address: int
    size: int


@dataclass(frozen=True)
class HostMemory:
    """Page-locked bytes of the host, which the GPU copies from and to while the host goes on.

    Attributes:
        array: uint8 [size], valid until freed.
        mapped: the GPU's own address of these bytes, where it reads and writes them without a copy.
    """

    address: int
    array: np.ndarray
    mapped: int | None


class Graph:
    """Work that was recorded once, to be started by one call."""

    def __init__(self, gpu: Gpu, executable: Any) -> None:
        self._gpu, self._executable = gpu, executable

    def launch(self) -> None:
        """Queue it behind what the stream has to do."""
        self._gpu.check(
            "starting a graph", self._gpu.cu.cuGraphLaunch(self._executable, self._gpu.stream)
        )

    def close(self) -> None:
        if self._executable is not None:
            self._gpu.cu.cuGraphExecDestroy(self._executable)
        self._executable = None


class Gpu:
    """A GPU with one stream. Copies and zeros are queued on the stream; `synchronize` waits for all.

    The primary context is the one that libraries on CUDA's runtime API (TensorRT) use as well.

    Args:
        device: what was asked for ("tensorrt"), for errors.
        ordinal: which of the machine's GPUs, as CUDA_VISIBLE_DEVICES leaves them.

    Attributes:
        name: "Orin", "NVIDIA GeForce RTX 4090".
        compute_capability: "8.7".
        integrated: does it share the host's memory (Jetson)?
        driver: the CUDA version that the driver serves, "12.6".
        stream: handle, for libraries that queue work on it.

    Raises:
        DeviceUnavailable: no driver, no GPU, or no such one.
        DriverTooOld: the driver serves no CUDA 12.
        ExtraMissing: cuda-bindings is not installed.
    """

    def __init__(self, device: str = "cuda", ordinal: int = 0) -> None:
        self.device, self.cu = device, load_driver()
        self.name = device  # until it is known
        self._users = 0
        self._held: dict[int, DeviceMemory | HostMemory] = {}
        self._context = self._stream = None
        self._start()
        version = self.check("asking for its version", self.cu.cuDriverGetVersion())
        self.driver = _version(version)
        if version < LEAST_DRIVER:
            raise DriverTooOld(device, _version(LEAST_DRIVER), self.driver)
        count = self.check("counting GPUs", self.cu.cuDeviceGetCount())
        if not 0 <= ordinal < count:
            raise DeviceUnavailable(device, f"there is no GPU {ordinal}; this machine has {count}")
        self._device = self.check("opening it", self.cu.cuDeviceGet(ordinal))
        name = self.check("asking for its name", self.cu.cuDeviceGetName(NAME_BYTES, self._device))
        self.name = name.split(b"\0")[0].decode()
        attribute = self.cu.CUdevice_attribute
        major = self._attribute(attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)
        minor = self._attribute(attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)
        self.compute_capability = f"{major}.{minor}"
        self.integrated = bool(self._attribute(attribute.CU_DEVICE_ATTRIBUTE_INTEGRATED))
        self._context = self.check("its context", self.cu.cuDevicePrimaryCtxRetain(self._device))
        try:
            self.use()
            flags = self.cu.CUstream_flags.CU_STREAM_NON_BLOCKING
            self._stream = self.check("a stream", self.cu.cuStreamCreate(int(flags)))
        except BaseException:
            self.close()
            raise
        self.stream = int(self._stream)

    def use(self) -> None:
        """Make its context this thread's; every thread that calls the others has to."""
        self.check("choosing its context", self.cu.cuCtxSetCurrent(self._context))

    def memory(self) -> tuple[int, int]:
        """Bytes that are free, and all."""
        free, total = self.check("asking for its memory", self.cu.cuMemGetInfo())
        return free, total

    def allocate(self, size: int, what: str) -> DeviceMemory:
        """Bytes on the GPU, not zeroed, at an address that every dtype can have.

        Args:
            what: they are for, for the error.

        Raises:
            OutOfDeviceMemory: there are not as many.
        """
        size = max(size, 1)  # CUDA allocates no nothing
        result = self.cu.cuMemAlloc(size)
        memory = DeviceMemory(int(self.check(f"memory for {what}", result, size, what)), size)
        self._held[memory.address] = memory
        return memory

    def host(self, size: int, what: str) -> HostMemory:
        """Page-locked bytes of the host; on an integrated GPU mapped into its address space.

        Raises:
            OutOfDeviceMemory: there are not as many.
        """
        flags = self.cu.CU_MEMHOSTALLOC_DEVICEMAP if self.integrated else 0
        result = self.cu.cuMemHostAlloc(max(size, 1), flags)
        address = int(self.check(f"page-locked memory for {what}", result, size, what))
        mapped = None
        if self.integrated:
            mapped = int(self.check("mapping it", self.cu.cuMemHostGetDevicePointer(address, 0)))
        array = np.ctypeslib.as_array((ctypes.c_uint8 * max(size, 1)).from_address(address))
        memory = HostMemory(address, array, mapped)
        self._held[address] = memory
        return memory

    def free(self, memory: DeviceMemory | HostMemory) -> None:
        """Give memory back; all work on it is over (`synchronize`)."""
        if self._held.pop(memory.address, None) is None:
            return
        if isinstance(memory, DeviceMemory):
            self.cu.cuMemFree(memory.address)
        else:
            self.cu.cuMemFreeHost(memory.address)

    def copy_in(self, target: int, source: int, size: int) -> None:
        """Host to device. What is not page-locked is read before this returns."""
        result = self.cu.cuMemcpyHtoDAsync(target, source, size, self.stream)
        self.check(f"copying {size} bytes to it", result)

    def copy_out(self, target: int, source: int, size: int) -> None:
        """Device to host."""
        result = self.cu.cuMemcpyDtoHAsync(target, source, size, self.stream)
        self.check(f"copying {size} bytes from it", result)

    def copy_rows(
        self, target: int, target_pitch: int, source: int, source_pitch: int, width: int, rows: int
    ) -> None:
        """`rows` times `width` bytes within the device, each so many bytes behind the one before."""
        copy = self.cu.CUDA_MEMCPY2D()
        copy.srcMemoryType = copy.dstMemoryType = self.cu.CUmemorytype.CU_MEMORYTYPE_DEVICE
        copy.srcDevice, copy.srcPitch = source, source_pitch
        copy.dstDevice, copy.dstPitch = target, target_pitch
        copy.WidthInBytes, copy.Height = width, rows
        self.check(f"copying {rows} x {width} bytes", self.cu.cuMemcpy2DAsync(copy, self.stream))

    def zero(self, memory: DeviceMemory) -> None:
        result = self.cu.cuMemsetD8Async(memory.address, 0, memory.size, self.stream)
        self.check(f"zeroing {memory.size} bytes", result)

    def synchronize(self) -> None:
        """Wait for all that was queued.

        Raises:
            GpuFailure: some of it failed.
        """
        self.check("its work", self.cu.cuStreamSynchronize(self.stream))

    def settle(self) -> None:
        """Before memory is freed: from this thread, with nothing running, even if what ran has failed."""
        with contextlib.suppress(GpuFailure):
            self.use()
            self.synchronize()

    def capture(self, record: Callable[[], None]) -> Graph | None:
        """What `record` queues, as a graph, without running it; None where it cannot be captured.

        Args:
            record: queues work on the stream, that ran before in the same way: libraries prepare
                themselves in a first run, which no graph can hold.
        """
        cu = self.cu
        mode = cu.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        self.check("recording a graph", cu.cuStreamBeginCapture(self.stream, mode))
        recorded = True
        try:
            record()
        except (EngineFailure, GpuFailure):  # it asks for something that no graph can hold
            recorded = False
        finally:
            status, graph = cu.cuStreamEndCapture(self.stream)
        if status != cu.CUresult.CUDA_SUCCESS:
            return None
        try:
            if not recorded:
                return None
            status, executable = cu.cuGraphInstantiate(graph, 0)
            return Graph(self, executable) if status == cu.CUresult.CUDA_SUCCESS else None
        finally:
            cu.cuGraphDestroy(graph)

    def enter(self) -> None:
        """One more uses this GPU; each has to `leave`."""
        self._users += 1

    def leave(self) -> None:
        """One less uses it; the last one closes it."""
        self._users -= 1
        if self._users == 0:
            self.close()

    def close(self) -> None:
        """Give back the memory that is left, the stream and the context; nothing may be running."""
        for memory in list(self._held.values()):
            self.free(memory)
        if self._stream is not None:
            self.cu.cuStreamDestroy(self._stream)
        if self._context is not None:
            self.cu.cuDevicePrimaryCtxRelease(self._device)
        self._stream = self._context = None

    def check(self, what: str, result: tuple[Any, ...], size: int = 0, whose: str = "") -> Any:
        """The value of a driver call, or its values.

        Args:
            what: was tried, for the error.
            result: what the call returned: its status, then values.
            size, whose: of an allocation.
        """
        status, *values = result
        if status != self.cu.CUresult.CUDA_SUCCESS:
            self._fail(what, status, size, whose)
        return values[0] if len(values) == 1 else tuple(values)

    def _fail(self, what: str, status: Any, size: int, whose: str) -> None:
        codes = self.cu.CUresult
        if status == codes.CUDA_ERROR_OUT_OF_MEMORY and size:
            free = total = 0
            with contextlib.suppress(GpuFailure):
                free, total = self.memory()
            raise OutOfDeviceMemory(self.name, whose, size, free, total)
        _, name = self.cu.cuGetErrorName(status)
        _, text = self.cu.cuGetErrorString(status)
        said = f"{_text(text)} ({_text(name)})"
        absent = (codes.CUDA_ERROR_NO_DEVICE, codes.CUDA_ERROR_STUB_LIBRARY)
        if status in absent:
            raise DeviceUnavailable(self.device, f"this machine has no NVIDIA GPU: {said}")
        raise GpuFailure(self.name, f"{what}: {said}")

    def _start(self) -> None:
        try:
            status = self.cu.cuInit(0)
        except RuntimeError as error:  # the driver's library is not there
            why = "no NVIDIA driver is installed (libcuda.so.1 is not found)"
            raise DeviceUnavailable(self.device, why) from error
        self.check("starting the driver", status)

    def _attribute(self, attribute: Any) -> int:
        return self.check(
            f"asking for {attribute}", self.cu.cuDeviceGetAttribute(attribute, self._device)
        )


def _version(number: int) -> str:
    """ "12.6" of 12060."""
    return f"{number // 1000}.{number % 1000 // 10}"


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
