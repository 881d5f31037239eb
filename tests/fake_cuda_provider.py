"""ONNX Runtime's CUDA provider without a GPU: its rules of binding, over graphs that the CPU runs.

What the runtime could get wrong is wrong here too. Memory of the device is never that of a host array. A
value bound to an input that the session reads in the other memory is copied while it is bound, and its
later contents are never seen (as IOBinding does). Every transfer is counted.
"""

from __future__ import annotations

import ctypes
from collections.abc import Set
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest

PROVIDER = "CUDAExecutionProvider"
RealSession, RealValue = onnxruntime.InferenceSession, onnxruntime.OrtValue


class FakeCuda:
    """Installed over `onnxruntime` for as long as `patch` lives.

    Args:
        host: inputs that sessions read from the host's memory, such as those of shapes.
        loads: does the provider load?

    Attributes:
        uploads, downloads: bytes of each transfer that a decoder made.
        made: values made on the device.
    """

    def __init__(
        self, patch: pytest.MonkeyPatch, host: Set[str] = frozenset(), loads: bool = True
    ) -> None:
        self.host, self.loads = host, loads
        self.uploads: list[int] = []
        self.downloads: list[int] = []
        self.made = 0
        patch.setattr(onnxruntime, "get_available_providers", self.providers)
        patch.setattr(onnxruntime, "preload_dlls", lambda **_: print("not found: libcurand"))
        patch.setattr(onnxruntime, "InferenceSession", self._session)
        made = SimpleNamespace(ortvalue_from_numpy=self._of, ortvalue_from_shape_and_type=self._new)
        patch.setattr(onnxruntime, "OrtValue", made)

    def providers(self) -> list[str]:
        return [PROVIDER, "CPUExecutionProvider"]

    def _session(self, graph: Any, options: Any, providers: Any, enable_fallback: int = 1) -> Any:
        if providers == ["CPUExecutionProvider"]:
            return RealSession(graph, options, providers=providers)
        ((name, _),) = providers
        assert (name, enable_fallback) == (PROVIDER, 0), "it would fall back to the CPU"
        return Session(self, RealSession(graph, options, providers=["CPUExecutionProvider"]))

    def _of(self, array: np.ndarray, device: str = "cpu", index: int = 0) -> Value:
        if device == "cpu":
            return Value(self, RealValue.ortvalue_from_numpy(array), device)
        value = self._new(array.shape, array.dtype.type, device, index)
        value.update_inplace(array)
        return value

    def _new(self, shape: Any, dtype: Any, device: str, index: int) -> Value:
        assert (device, index) == ("cuda", 0)
        self.made += 1
        return Value(self, RealValue.ortvalue_from_shape_and_type(shape, dtype), device)


class Value:
    """An OrtValue of the host or of the device."""

    def __init__(self, gpu: FakeCuda, real: Any, device: str) -> None:
        self.gpu, self.real, self.device = gpu, real, device

    def shape(self) -> Any:
        return self.real.shape()

    def data_ptr(self) -> int:
        return int(self.real.data_ptr())

    def numpy(self) -> np.ndarray:
        array: np.ndarray = self.real.numpy()
        if self.device == "cpu":
            return array
        self.gpu.downloads.append(array.nbytes)
        return array.copy()

    def update_inplace(self, array: np.ndarray) -> None:
        assert array.dtype == self.real.numpy().dtype
        self.gpu.uploads.append(array.nbytes)
        self.real.update_inplace(array)


class Session:
    def __init__(self, gpu: FakeCuda, real: Any) -> None:
        self.gpu, self.real = gpu, real

    def get_providers(self) -> list[str]:
        return self.gpu.providers()[0 if self.gpu.loads else 1 :]

    def get_inputs(self) -> Any:
        return self.real.get_inputs()

    def get_outputs(self) -> Any:
        return self.real.get_outputs()

    def get_input_memory_infos(self) -> list[Any]:
        names = ["Cpu" if spec.name in self.gpu.host else "Cuda" for spec in self.get_inputs()]
        return [SimpleNamespace(name=name) for name in names]

    def get_provider_graph_assignment_info(self) -> list[Any]:
        nodes = [SimpleNamespace(op_type=kind) for kind in ("Shape", "Gather")]
        return [SimpleNamespace(ep_name="CPUExecutionProvider", get_nodes=lambda: nodes)]

    def run(self, names: list[str], feeds: dict[str, np.ndarray]) -> Any:
        return self.real.run(names, feeds)

    def io_binding(self) -> Binding:
        return Binding(self)

    def run_with_iobinding(self, binding: Binding) -> None:
        self.real.run_with_iobinding(binding.real)
        for inner, outer in binding.back:
            outer.numpy()[...] = inner.numpy()
            self.gpu.downloads.append(inner.tensor_size_in_bytes())


class Binding:
    def __init__(self, session: Session) -> None:
        self.gpu, self.real = session.gpu, session.real.io_binding()
        self.kept: list[Any] = []
        self.back: list[tuple[Any, Value]] = []  # outputs of the device and where they are wanted

    def bind_ortvalue_input(self, name: str, value: Value) -> None:
        if (value.device == "cpu") != (name in self.gpu.host):
            value = Value(self.gpu, RealValue.ortvalue_from_numpy(value.real.numpy().copy()), "")
        self.kept.append(value)
        self.real.bind_ortvalue_input(name, value.real)

    def bind_input(
        self, name: str, device: str, index: int, dtype: Any, shape: list[int], address: int
    ) -> None:
        assert (device, index) == ("cuda", 0)
        if name in self.gpu.host:
            size = int(np.prod(shape)) * np.dtype(dtype).itemsize
            copy = np.frombuffer(ctypes.string_at(address, size), dtype).reshape(shape).copy()
            self.kept.append(copy)
            address = copy.ctypes.data
        self.real.bind_input(name, "cpu", 0, dtype, shape, address)

    def bind_ortvalue_output(self, name: str, value: Value) -> None:
        if value.device == "cpu":
            like = value.real.numpy()
            inner = RealValue.ortvalue_from_shape_and_type(like.shape, like.dtype.type)
            self.back.append((inner, value))
            self.real.bind_ortvalue_output(name, inner)
        else:
            self.real.bind_ortvalue_output(name, value.real)
