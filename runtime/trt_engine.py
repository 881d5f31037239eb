"""A TensorRT engine: what it says of its tensors, its execution contexts, and `engine.Engine` on it.

One file serves TensorRT from 10.3 on and TensorRT-RTX: what a version lacks is asked for with hasattr.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlm_edge.errors import CapacityExceeded, EngineFailure
from vlm_edge.runtime.cuda import DeviceMemory, Gpu
from vlm_edge.runtime.trt_kernels import KernelCache

Shape = tuple[int, ...]
ALIGNMENT = 256  # of what CUDA allocates, and of activations
# The option of `vlm build` that gives a symbolic axis of the manifest more room.
OPTIONS = {"tiles": "--tiles", "source": "--capacity", "sequence": "--chunk"}


@dataclass(frozen=True)
class Tensor:
    """An input or output of an engine.

    Attributes:
        shape: with -1 where it depends on the call.
        least, most: of an input, the limits of its shape by profile.
    """

    name: str
    dtype: np.dtype
    shape: Shape
    least: tuple[Shape, ...] = ()
    most: tuple[Shape, ...] = ()


class LoadedEngine:
    """An engine that TensorRT has deserialized.

    Args:
        trt: the module.
        engine: its ICudaEngine.
        log: gets what TensorRT says; `errors` is a list.
        kernels: where TensorRT-RTX keeps what it compiles.
    """

    def __init__(self, trt: Any, name: str, engine: Any, log: Any, kernels: KernelCache) -> None:
        self.trt, self.name, self.engine, self.log = trt, name, engine, log
        self.kernels = kernels
        self.profiles: int = engine.num_optimization_profiles
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}
        for index in range(engine.num_io_tensors):
            tensor_name = engine.get_tensor_name(index)
            if engine.get_tensor_location(tensor_name) != trt.TensorLocation.DEVICE:
                raise EngineFailure(name, f"{tensor_name} is not read from the GPU's memory")
            is_input = engine.get_tensor_mode(tensor_name) == trt.TensorIOMode.INPUT
            (self.inputs if is_input else self.outputs)[tensor_name] = self._tensor(
                tensor_name, range(self.profiles) if is_input else ()
            )

    def _tensor(self, name: str, profiles: Sequence[int]) -> Tensor:
        dtype = np.dtype(self.trt.nptype(self.engine.get_tensor_dtype(name)))
        spans = [self.engine.get_tensor_profile_shape(name, profile) for profile in profiles]
        least, most = (tuple(tuple(span[which]) for span in spans) for which in (0, 2))
        return Tensor(name, dtype, tuple(self.engine.get_tensor_shape(name)), least, most)

    def most(self, name: str) -> Shape:
        """The largest shape of an input in any profile."""
        shapes = self.inputs[name].most
        return tuple(max(sizes) for sizes in zip(*shapes, strict=True))

    def scratch_bytes(self) -> int:
        """That a context needs for activations while it runs, whatever its profile."""
        return self.engine.device_memory_size_v2

    def updates_in_place(self, output: str, source: str) -> bool:
        """Does `output` stand in the memory of the input `source`? TensorRT before 10.15 cannot say it and
        builds no such engine."""
        if not hasattr(self.engine, "get_aliased_input_tensor"):
            return False
        return self.engine.get_aliased_input_tensor(output) == source

    def close(self) -> None:
        """Give its weights back; its contexts are gone, and its GPU's context is this thread's."""
        if self.engine is not None:
            self.kernels.save()
        self.engine = None

    def failure(self, what: str) -> EngineFailure:
        """With what TensorRT has just said about it."""
        said = "; ".join(" ".join(line.split()) for line in self.log.errors[-2:])
        return EngineFailure(self.name, f"{what} ({said or 'TensorRT gives no reason'})")


class Context:
    """An execution context for one profile of an engine.

    Args:
        scratch: for activations, `LoadedEngine.scratch_bytes` or more; contexts that run one after
            another share it.
        fixed: do shapes stay as they are? Then TensorRT-RTX compiles kernels for them at once.
        repeats: do many runs of the same shapes follow one another?
    """

    def __init__(
        self,
        loaded: LoadedEngine,
        gpu: Gpu,
        scratch: DeviceMemory,
        profile: int,
        fixed: bool,
        repeats: bool = False,
    ) -> None:
        self._loaded, self._gpu, self._fixed = loaded, gpu, fixed
        self._context = _create(loaded, fixed, repeats)
        if self._context is None:
            raise loaded.failure("no execution context")
        self._context.set_device_memory(scratch.address, scratch.size)
        try:
            self._context.set_optimization_profile_async(profile, gpu.stream)
        except RuntimeError as error:  # its bindings make one of a refusal
            raise loaded.failure(f"profile {profile} is refused") from error
        gpu.synchronize()

    def bind(self, name: str, address: int) -> None:
        """Where a tensor is, until the next call of it."""
        if not self._context.set_tensor_address(name, address):
            raise self._loaded.failure(f"{name} at {address:#x} is refused")

    def shape(self, name: str, shape: Shape) -> None:
        """The shape of an input, until the next call of it."""
        if not self._context.set_input_shape(name, shape):
            raise self._loaded.failure(f"{name} of shape {list(shape)} is refused")

    def output_shape(self, name: str) -> Shape:
        """Of an output, for the inputs' shapes."""
        return tuple(self._context.get_tensor_shape(name))

    def capturable(self) -> bool:
        """May a graph of ours hold its runs? TensorRT cannot tell before it tries."""
        # It would keep kernels that are exchanged when better ones are compiled.
        if _compiles(self._loaded.trt) and not self._fixed:
            return False
        if not hasattr(self._context, "is_stream_capturable"):
            return True
        return self._context.is_stream_capturable(self._gpu.stream)

    def enqueue(self) -> None:
        """Queue a run on the GPU's stream."""
        self._loaded.log.errors.clear()
        if not self._context.execute_async_v3(self._gpu.stream):
            raise self._loaded.failure("it does not run")


def _compiles(trt: Any) -> bool:
    """Is it TensorRT-RTX, which compiles kernels while it runs? TensorRT's were chosen by the builder."""
    return hasattr(trt, "CudaGraphStrategy")


def _create(loaded: LoadedEngine, fixed: bool, repeats: bool) -> Any:
    """An execution context without memory for activations."""
    trt, engine = loaded.trt, loaded.engine
    ours = trt.ExecutionContextAllocationStrategy.USER_MANAGED
    if not _compiles(trt):
        return engine.create_execution_context(ours)
    config = engine.create_runtime_config()
    config.set_execution_context_allocation_strategy(ours)
    # A graph of ours holds the copies as well; TensorRT-RTX records its own once a shape's kernels are
    # compiled.
    graphs = trt.CudaGraphStrategy
    theirs = repeats and not fixed
    config.cuda_graph_strategy = graphs.WHOLE_GRAPH_CAPTURE if theirs else graphs.DISABLED
    # Compiling takes longer than a run: where every call may have another shape, a kernel for any shape
    # serves until it is done.
    special = trt.DynamicShapesKernelSpecializationStrategy
    config.dynamic_shapes_kernel_specialization_strategy = special.EAGER if fixed else special.LAZY
    loaded.kernels.attach(config)
    return engine.create_execution_context(config)


class TrtEngine:
    """One stateless graph (`engine.Engine`). Memory for its largest call is taken at once.

    Args:
        axes: by input, the manifest's shape with symbolic axes, for errors.
    """

    def __init__(
        self,
        loaded: LoadedEngine,
        gpu: Gpu,
        scratch: DeviceMemory,
        axes: Mapping[str, Sequence[int | str]],
    ) -> None:
        self._loaded, self._gpu, self._axes = loaded, gpu, axes
        self._memory: dict[str, DeviceMemory] = {}
        self._context: Context | None = self._open(scratch)
        gpu.enter()

    def run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        loaded, context = self._loaded, self._context
        if context is None:
            raise EngineFailure(loaded.name, "it is closed")
        if feeds.keys() != loaded.inputs.keys():
            names = sorted(feeds.keys() ^ loaded.inputs.keys())
            raise EngineFailure(loaded.name, f"{', '.join(names)}: not what its inputs are")
        arrays = {
            name: np.ascontiguousarray(feeds[name], tensor.dtype)
            for name, tensor in loaded.inputs.items()
        }
        for name, array in arrays.items():
            self._check(loaded.inputs[name], array.shape)
        self._gpu.use()
        for name, array in arrays.items():
            context.shape(name, array.shape)
            self._gpu.copy_in(self._memory[name].address, array.ctypes.data, array.nbytes)
        context.enqueue()
        found = {
            name: np.empty(context.output_shape(name), tensor.dtype)
            for name, tensor in loaded.outputs.items()
        }
        for name, array in found.items():
            self._gpu.copy_out(array.ctypes.data, self._memory[name].address, array.nbytes)
        self._gpu.synchronize()
        return found

    def close(self) -> None:
        if self._context is None:
            return
        self._gpu.settle()
        self._context = None
        self._loaded.close()
        for memory in self._memory.values():
            self._gpu.free(memory)
        self._gpu.leave()

    def _open(self, scratch: DeviceMemory) -> Context:
        loaded = self._loaded
        context = Context(loaded, self._gpu, scratch, profile=0, fixed=False)
        for name in loaded.inputs:
            context.shape(name, loaded.most(name))
        shapes = {name: loaded.most(name) for name in loaded.inputs}
        shapes |= {name: context.output_shape(name) for name in loaded.outputs}
        for name, tensor in {**loaded.inputs, **loaded.outputs}.items():
            size = int(np.prod(shapes[name])) * tensor.dtype.itemsize
            self._memory[name] = self._gpu.allocate(size, f"{name} of engine {loaded.name}")
            context.bind(name, self._memory[name].address)
        return context

    def _check(self, tensor: Tensor, shape: Shape) -> None:
        """Raises CapacityExceeded or EngineFailure, before anything is computed."""
        axes = self._axes.get(tensor.name, ())
        check_shape(self._loaded.name, tensor.name, shape, self._loaded.most(tensor.name), axes)


def check_shape(
    engine: str, name: str, shape: Shape, most: Shape, axes: Sequence[int | str]
) -> None:
    """
    Args:
        most: the largest shape that the engine was built for.
        axes: the manifest's shape, with symbolic axes.

    Raises:
        CapacityExceeded: an axis is longer than that, and `vlm build` has an option for it.
        EngineFailure: the shape does not fit otherwise.
    """
    if len(shape) == len(most):
        for size, limit, axis in zip(shape, most, axes, strict=False):
            if size > limit and axis in OPTIONS:
                what = f"{name} of engine {engine}"
                raise CapacityExceeded(what, size, limit, OPTIONS[str(axis)])
    if len(shape) != len(most) or any(
        size > limit for size, limit in zip(shape, most, strict=True)
    ):
        raise EngineFailure(
            engine, f"{name} has shape {list(shape)}, it was built for {list(most)} at most"
        )
