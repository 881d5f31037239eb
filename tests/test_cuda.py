"""The GPU as the runtime uses it: sentences for what fails, and a stand-in that forgives nothing."""

from __future__ import annotations

from collections.abc import Iterator
from ctypes.util import find_library
from enum import IntEnum
from typing import Any

import fake_cuda
import numpy as np
import pytest
from fake_cuda import CUresult, FakeGpu

from vlm_edge.errors import (
    DeviceUnavailable,
    DriverTooOld,
    EngineFailure,
    ExtraMissing,
    GpuFailure,
    OutOfDeviceMemory,
)
from vlm_edge.runtime import cuda
from vlm_edge.runtime.cuda import Gpu


@pytest.fixture(params=[False, True], ids=["discrete", "integrated"])
def fake(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    driver = FakeGpu(integrated=request.param)
    monkeypatch.setattr(cuda, "load_driver", lambda: driver)
    return driver


@pytest.fixture
def gpu(fake: FakeGpu) -> Iterator[Gpu]:
    opened = Gpu("tensorrt")
    yield opened
    opened.settle()
    opened.close()
    assert fake.clean


def fill(gpu: Gpu, memory: cuda.DeviceMemory, value: int) -> None:
    array = np.full(memory.size, value, np.uint8)
    gpu.copy_in(memory.address, array.ctypes.data, array.nbytes)


def read(gpu: Gpu, memory: cuda.DeviceMemory) -> np.ndarray:
    found = np.empty(memory.size, np.uint8)
    gpu.copy_out(found.ctypes.data, memory.address, found.nbytes)
    gpu.synchronize()
    return found


def test_what_it_says_of_itself(fake: FakeGpu, gpu: Gpu) -> None:
    assert (gpu.name, gpu.compute_capability, gpu.driver) == ("Fake GPU", "8.6", "12.6")
    assert gpu.integrated == fake.integrated
    gpu.allocate(1000, "something")
    assert gpu.memory() == (fake.total - 1000, fake.total)


def test_copies_and_zeros(gpu: Gpu) -> None:
    one, rows = gpu.allocate(6, "six"), gpu.allocate(40, "rows")
    fill(gpu, one, 3)
    gpu.zero(rows)
    gpu.copy_rows(rows.address + 2, 20, one.address, 3, 3, 2)
    expected = np.zeros((2, 20), np.uint8)
    expected[:, 2:5] = 3
    np.testing.assert_array_equal(read(gpu, rows).reshape(2, 20), expected)


def test_page_locked_memory_is_mapped_where_it_is_the_gpus_own(fake: FakeGpu, gpu: Gpu) -> None:
    host = gpu.host(8, "inputs")
    host.array[:] = range(8)
    assert (host.mapped is not None) == fake.integrated
    if host.mapped is not None:
        np.testing.assert_array_equal(fake.view(host.mapped, 8), range(8))


def test_a_graph_runs_again_on_what_its_addresses_hold(gpu: Gpu) -> None:
    host, device = gpu.host(4, "inputs"), gpu.allocate(4, "inputs")
    host.array[:] = 0
    graph = gpu.capture(lambda: gpu.copy_in(device.address, host.address, 4))
    assert graph is not None
    for value in (7, 9):
        host.array[:] = value
        graph.launch()
        assert read(gpu, device).tolist() == [value] * 4
    graph.close()
    graph.close()


def test_what_cannot_be_captured(fake: FakeGpu, gpu: Gpu) -> None:
    fake.uncapturable = True
    assert gpu.capture(lambda: fake.enqueue(lambda: None)) is None

    def refuse() -> None:
        raise EngineFailure("llm", "it does not run")

    assert gpu.capture(refuse) is None
    gpu.synchronize()  # the stream goes on


def test_memory_that_is_missing_is_told_with_its_size(fake: FakeGpu, gpu: Gpu) -> None:
    fake.total = 5_000_000
    gpu.allocate(3_000_000, "weights")
    with pytest.raises(
        OutOfDeviceMemory, match=r"Fake GPU has no room for the cache: it takes 4 MB, 2 of 5 MB"
    ):
        gpu.allocate(4_000_000, "the cache")


def test_a_failure_of_the_work_is_named(fake: FakeGpu, gpu: Gpu) -> None:
    fake.failing["cuStreamSynchronize"] = CUresult.CUDA_ERROR_ILLEGAL_ADDRESS
    with pytest.raises(GpuFailure, match=r"GPU Fake GPU failed: .*CUDA_ERROR_ILLEGAL_ADDRESS"):
        gpu.synchronize()
    fake.failing.clear()


@pytest.mark.parametrize(
    ("differs", "error", "sentence"),
    [
        ({"installed": False}, DeviceUnavailable, "'tensorrt' is not available: no NVIDIA driver"),
        ({"count": 0}, DeviceUnavailable, "no NVIDIA GPU.*CUDA_ERROR_NO_DEVICE"),
        ({"version": 11040}, DriverTooOld, "serves CUDA 11.4, this library needs 12.0"),
    ],
)
def test_no_gpu_that_can_be_used(
    differs: dict[str, Any],
    error: type[Exception],
    sentence: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    driver = FakeGpu(**differs)
    monkeypatch.setattr(cuda, "load_driver", lambda: driver)
    with pytest.raises(error, match=sentence):
        Gpu("tensorrt")
    assert driver.clean


def test_no_such_gpu(fake: FakeGpu) -> None:
    with pytest.raises(DeviceUnavailable, match="no GPU 1; this machine has 1"):
        Gpu("tensorrt", ordinal=1)


def test_a_stream_that_is_refused_leaves_nothing(fake: FakeGpu) -> None:
    fake.failing["cuStreamCreate"] = CUresult.CUDA_ERROR_OUT_OF_MEMORY
    with pytest.raises(GpuFailure, match="a stream"):
        Gpu("tensorrt")
    assert fake.clean


def test_cuda_bindings_are_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> Any:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(cuda.importlib, "import_module", absent)
    with pytest.raises(ExtraMissing, match=r"cuda-bindings.*pip install 'vlm-edge\[tensorrt\]'"):
        cuda.load_driver()


def test_the_last_user_closes_it(fake: FakeGpu) -> None:
    gpu = Gpu("tensorrt")
    gpu.enter()
    gpu.enter()
    gpu.allocate(10, "activations")
    gpu.leave()
    assert not fake.clean
    gpu.leave()
    assert fake.clean


# -- the stand-in finds mistakes --------------------------------------------------------------------


def test_nothing_runs_before_it_is_waited_for(gpu: Gpu) -> None:
    memory, found = gpu.allocate(3, "three"), np.zeros(3, np.uint8)
    fill(gpu, memory, 5)
    gpu.copy_out(found.ctypes.data, memory.address, 3)
    assert not found.any()
    gpu.synchronize()
    assert found.tolist() == [5, 5, 5]


def test_page_locked_inputs_are_read_when_their_turn_comes(gpu: Gpu) -> None:
    host, memory = gpu.host(3, "inputs"), gpu.allocate(3, "inputs")
    host.array[:] = 1
    gpu.copy_in(memory.address, host.address, 3)
    host.array[:] = 2  # too early
    assert read(gpu, memory).tolist() == [2, 2, 2]


@pytest.mark.parametrize("mistake", ["freed", "beyond", "never"])
def test_wrong_addresses_are_found(mistake: str, gpu: Gpu) -> None:
    memory = gpu.allocate(16, "sixteen")
    address = {"freed": memory.address, "beyond": memory.address + 8, "never": 4096}[mistake]
    if mistake == "freed":
        gpu.free(memory)
    array = np.zeros(16, np.uint8)
    gpu.copy_in(address, array.ctypes.data, 16)
    with pytest.raises(AssertionError, match="not in live memory"):
        gpu.synchronize()


# -- the stand-in is like the real module -----------------------------------------------------------


def real() -> Any:
    return pytest.importorskip("cuda.bindings.driver", reason="cuda-bindings is not installed")


def test_the_real_module_has_every_name() -> None:
    driver = real()
    functions = [name for name in dir(FakeGpu) if name.startswith("cu")]
    assert len(functions) > 25
    for name in functions:
        assert callable(getattr(driver, name))
    for kind in vars(fake_cuda).values():
        if isinstance(kind, type) and issubclass(kind, IntEnum) and kind is not IntEnum:
            for member in kind:
                assert int(getattr(getattr(driver, kind.__name__), member.name)) == member
    assert driver.CU_MEMHOSTALLOC_DEVICEMAP == FakeGpu().CU_MEMHOSTALLOC_DEVICEMAP


@pytest.mark.skipif(find_library("cuda") is not None, reason="a driver would take the addresses")
def test_the_real_module_takes_the_arguments(fake: FakeGpu) -> None:
    """Without a driver a call fails, but not before its arguments were read."""
    driver = real()
    gpu = Gpu("tensorrt")
    memory, host = gpu.allocate(16, "x"), gpu.host(16, "y")
    gpu.copy_in(memory.address, host.address, 16)
    gpu.copy_out(host.address, memory.address, 16)
    gpu.copy_rows(memory.address, 8, memory.address, 8, 8, 2)
    gpu.zero(memory)
    gpu.memory()
    gpu.synchronize()
    graph = gpu.capture(lambda: None)
    assert graph is not None
    graph.launch()
    graph.close()
    fake.failing["cuMemsetD8Async"] = CUresult.CUDA_ERROR_ILLEGAL_ADDRESS
    with pytest.raises(GpuFailure):
        gpu.zero(memory)
    gpu.settle()
    gpu.close()
    assert (
        not {name for name in dir(FakeGpu) if name.startswith("cu")}
        - fake.arguments.keys()
        - (set() if fake.integrated else {"cuMemHostGetDevicePointer"})
    )
    for name, arguments in fake.arguments.items():
        given = [_as_real(driver, argument) for argument in arguments]
        with pytest.raises(RuntimeError, match="cuda"):
            getattr(driver, name)(*given)


def _as_real(driver: Any, argument: Any) -> Any:
    if isinstance(argument, IntEnum):
        return getattr(getattr(driver, type(argument).__name__), argument.name)
    if isinstance(argument, fake_cuda.SimpleNamespace):
        copy = driver.CUDA_MEMCPY2D()
        for name, value in vars(argument).items():
            assert hasattr(driver.CUDA_MEMCPY2D, name)
            setattr(copy, name, _as_real(driver, value))
        return copy
    return argument
