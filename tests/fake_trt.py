"""A stand-in for `tensorrt` whose plans name ONNX graphs, which ONNX Runtime runs at the addresses that are bound.

It refuses what TensorRT refuses: shapes outside the profile, addresses that are not set, a cache that is not
updated in place. `tests/test_trt_runtime.py` compares every name here with the real module.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from dataclasses import replace
from enum import IntEnum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
from fake_cuda import FakeGpu

from vlm_edge.runtime.trt_engine import Tensor

SCRATCH = 4096
OWN = frozenset(
    {"aliases", "cache", "config", "kernels", "strategy"}
)  # what the stand-in adds to the real classes
NUMPY = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64,
         "tensor(int32)": np.int32}  # fmt: skip
Shapes = dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]


def write_plan(
    path: Path, graph: Path, profiles: tuple[Shapes, ...], refusal: str | None = None
) -> Path:
    """A plan that the stand-in reads.

    Args:
        refusal: what it says instead.
    """
    path.write_text(json.dumps({"graph": str(graph), "profiles": profiles, "refusal": refusal}))
    return path


def shortened(tensor: Tensor, longest: int) -> Tensor:
    """An input [batch, s, width] as of an engine built for s = `longest` at most."""
    most = tuple((batch, min(s, longest), width) for batch, s, width in tensor.most)
    return replace(tensor, most=most)


class Severity(IntEnum):
    INTERNAL_ERROR = 0
    ERROR = 1
    WARNING = 2


class ILogger:
    INTERNAL_ERROR, ERROR, WARNING = Severity

    def log(self, severity: Severity, message: str) -> None: ...


class TensorIOMode(IntEnum):
    INPUT = 1
    OUTPUT = 2


class TensorLocation(IntEnum):
    DEVICE = 0
    HOST = 1


class ExecutionContextAllocationStrategy(IntEnum):
    USER_MANAGED = 2


class CudaGraphStrategy(IntEnum):
    DISABLED = 0
    WHOLE_GRAPH_CAPTURE = 1


class DynamicShapesKernelSpecializationStrategy(IntEnum):
    LAZY = 0
    EAGER = 1


def module(gpu: FakeGpu, kind: str, version: str = "10.16.0") -> Any:
    """What `import tensorrt` gives.

    Args:
        kind: "tensorrt", "tensorrt-rtx", or "tensorrt-10.3", which knows no aliases.
    """
    names: dict[str, Any] = {
        "__version__": version,
        "ILogger": ILogger,
        "TensorIOMode": TensorIOMode,
        "TensorLocation": TensorLocation,
        "ExecutionContextAllocationStrategy": ExecutionContextAllocationStrategy,
        "nptype": lambda dtype: dtype,
        "Runtime": lambda log: Runtime(gpu, log, kind, version),
    }
    if kind == "tensorrt-rtx":
        names["CudaGraphStrategy"] = CudaGraphStrategy
        names["DynamicShapesKernelSpecializationStrategy"] = (
            DynamicShapesKernelSpecializationStrategy
        )
    return SimpleNamespace(**names)


class Runtime:
    def __init__(self, gpu: FakeGpu, log: ILogger, kind: str, version: str) -> None:
        self._gpu, self._log, self._kind, self._version = gpu, log, kind, version

    def deserialize_cuda_engine(self, blob: Any) -> Any:
        assert self._gpu.has_context, "weights would go to a context of TensorRT's own"
        try:
            plan = json.loads(memoryview(blob).tobytes())
        except ValueError:
            return self._refuse(
                "Serialization assertion header.magicTag == kEXPECTED_MAGIC_TAG failed"
            )
        if plan["refusal"] is not None:
            return self._refuse(plan["refusal"])
        engine = {"tensorrt": AliasingEngine, "tensorrt-rtx": RtxEngine}.get(self._kind, Engine)
        return engine(self._gpu, self._log, plan)

    def _refuse(self, message: str) -> None:
        self._log.log(ILogger.ERROR, message)


class Engine:
    """ICudaEngine of TensorRT 10.3."""

    device_memory_size_v2 = SCRATCH

    def __init__(self, gpu: FakeGpu, log: ILogger, plan: dict[str, Any]) -> None:
        self.gpu, self.log = gpu, log
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(
            plan["graph"], options, providers=["CPUExecutionProvider"]
        )
        self.profiles: list[Shapes] = plan["profiles"]
        self.num_optimization_profiles = len(self.profiles)
        self.inputs = {value.name: value for value in self.session.get_inputs()}
        self.outputs = {value.name: value for value in self.session.get_outputs()}
        self.values = {**self.inputs, **self.outputs}
        self.num_io_tensors = len(self.values)
        self.contexts: list[Context] = []

    def get_tensor_name(self, index: int) -> str:
        return list(self.values)[index]

    def get_tensor_location(self, name: str) -> TensorLocation:
        return TensorLocation.DEVICE

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if name in self.inputs else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> Any:
        return NUMPY[self.values[name].type]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(d if isinstance(d, int) else -1 for d in self.values[name].shape)

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[Any]:
        assert name in self.inputs
        return [tuple(shape) for shape in self.profiles[profile][name]]

    def create_execution_context(self, strategy: Any) -> Context:
        assert strategy is ExecutionContextAllocationStrategy.USER_MANAGED
        self.contexts.append(Context(self))
        return self.contexts[-1]

    def aliases(self) -> dict[str, str]:
        return {}


class AliasingEngine(Engine):
    """ICudaEngine from TensorRT 10.15 on."""

    def get_aliased_input_tensor(self, name: str) -> str | None:
        return self.aliases().get(name)

    def aliases(self) -> dict[str, str]:
        pasts = {
            name: name.replace("present.", "past.") for name in self.outputs if "present." in name
        }
        return {
            k: v for k, v in pasts.items() if self.get_tensor_shape(k) == self.get_tensor_shape(v)
        }


class RtxEngine(AliasingEngine):
    """ICudaEngine of TensorRT-RTX."""

    def create_runtime_config(self) -> RuntimeConfig:
        return RuntimeConfig()

    def create_execution_context(self, config: Any) -> Context:
        assert config.strategy is ExecutionContextAllocationStrategy.USER_MANAGED
        assert config.cuda_graph_strategy in CudaGraphStrategy
        self.contexts.append(RtxContext(self))
        self.contexts[-1].config = config
        config.cache.kernels.add(",".join(self.values))
        return self.contexts[-1]


class RuntimeConfig:
    cuda_graph_strategy: Any = None
    dynamic_shapes_kernel_specialization_strategy: Any = None
    strategy: Any = None
    cache: Any = None

    def create_runtime_cache(self) -> RuntimeCache:
        return RuntimeCache()

    def set_runtime_cache(self, cache: RuntimeCache) -> bool:
        self.cache = cache
        return True

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        self.strategy = strategy


class RuntimeCache:
    """IRuntimeCache: names of tensors stand for the kernels of an engine."""

    def __init__(self) -> None:
        self.kernels: set[str] = set()

    def deserialize(self, blob: bytes) -> bool:
        """What is not from here is not taken."""
        with contextlib.suppress(ValueError):
            self.kernels |= set(json.loads(blob))
            return True
        return False

    def serialize(self) -> bytes:
        return json.dumps(sorted(self.kernels)).encode()


class Context:
    """IExecutionContext. What it is told holds for the runs after it, those in a graph included."""

    config: Any = None

    def __init__(self, engine: Engine) -> None:
        self._engine, self._profile = engine, 0
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._scratch: tuple[int, int] | None = None
        self._ran: Any = None  # shapes of the last run outside a graph
        self.runs = 0

    def set_device_memory(self, memory: int, size: int) -> None:
        assert memory % 256 == 0 and size >= self._engine.device_memory_size_v2
        self._scratch = (memory, size)

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        assert self._engine.gpu.has_context
        if profile >= self._engine.num_optimization_profiles:
            self._refuse(f"Profile index {profile} is out of range")
            raise RuntimeError("Error in set optimization profile async.")  # as the bindings do
        self._profile, self._shapes = profile, {}
        return True

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self._addresses[name] = memory
        return name in self._engine.values and memory % 256 == 0

    def set_input_shape(self, name: str, shape: Any) -> bool:
        least, _, most = self._engine.profiles[self._profile][name]
        fits = len(shape) == len(least) and all(
            low <= size <= high for low, size, high in zip(least, shape, most, strict=True)
        )
        if not fits:
            return self._refuse(f"{name}: {list(shape)} is not within {least} and {most}")
        self._shapes[name] = tuple(int(size) for size in shape)
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        """Of outputs too: as running the graph on zeros shows."""
        if name in self._shapes:
            return self._shapes[name]
        inputs = {
            n: np.zeros(self._shapes[n], NUMPY[v.type]) for n, v in self._engine.inputs.items()
        }
        return self._engine.session.run([name], inputs)[0].shape

    def execute_async_v3(self, stream: int) -> bool:
        engine = self._engine
        assert engine.gpu.has_context, "this thread has no context"
        missing = sorted(engine.values.keys() - self._addresses.keys())
        missing += sorted(engine.inputs.keys() - self._shapes.keys())
        if missing:
            return self._refuse(f"no address or shape is set for {', '.join(missing)}")
        for output, source in engine.aliases().items():
            if self._addresses[output] != self._addresses[source]:
                return self._refuse(f"{output} should be at the address of {source}")
        if self._scratch is None:
            return self._refuse("no device memory is set")
        if engine.gpu.capturing and self._ran != self._shapes:
            raise AssertionError("a graph is recorded of shapes that never ran")
        if not engine.gpu.capturing:
            self._ran = dict(self._shapes)
        engine.gpu.enqueue(self._work())
        return not (engine.gpu.capturing and engine.gpu.uncapturable)

    def _work(self) -> Callable[[], None]:
        """The run, for the shapes and addresses of now."""
        shapes, addresses, scratch = dict(self._shapes), dict(self._addresses), self._scratch
        engine = self._engine
        assert scratch is not None

        def run() -> None:
            self.runs += 1
            engine.gpu.view(*scratch).fill(0xA5)  # whoever kept something there finds it gone
            inputs = {}
            for name, shape in shapes.items():
                dtype = np.dtype(NUMPY[engine.inputs[name].type])
                size = int(np.prod(shape)) * dtype.itemsize
                inputs[name] = (
                    engine.gpu.view(addresses[name], size).view(dtype).reshape(shape).copy()
                )
            found = engine.session.run(list(engine.outputs), inputs)
            for name, array in zip(engine.outputs, found, strict=True):
                flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
                engine.gpu.view(addresses[name], flat.size)[...] = flat

        return run

    def _refuse(self, message: str) -> bool:
        self._engine.log.log(ILogger.ERROR, message)
        return False


class RtxContext(Context):
    def is_stream_capturable(self, stream: int) -> bool:
        return True

    def execute_async_v3(self, stream: int) -> bool:
        if self._engine.gpu.capturing:
            config = self.config
            assert config.cuda_graph_strategy is CudaGraphStrategy.DISABLED, "a graph in a graph"
            eager = DynamicShapesKernelSpecializationStrategy.EAGER
            if config.dynamic_shapes_kernel_specialization_strategy is not eager:
                raise AssertionError("a graph would keep kernels that are exchanged later")
        return super().execute_async_v3(stream)
