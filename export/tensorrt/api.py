"""One adapter for TensorRT 10.3 to 11.x and TensorRT-RTX, by what the installed module has.

Networks are strongly typed: every precision is the graph's own, quantization is its Q/DQ nodes. That is
the one form all of these versions have.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm_edge.errors import BuildFailed, DeviceUnavailable, SettingError
from vlm_edge.export.lowering import tensorrt, trt10
from vlm_edge.export.lowering.tensorrt import Profile
from vlm_edge.export.tensorrt.layers import HEAD, EngineLayer, parse
from vlm_edge.runtime.plans import PlanProfile
from vlm_edge.runtime.trt import load_module

RTX = "tensorrt-rtx"
OUT_OF_MEMORY = re.compile(r"out ?of ?memory|bad_alloc|cudaError(?:MemoryAllocation| 2\b)", re.I)
MEMORY_WAYS = (
    "close other programs, add swap, or ask for less with --workspace, --capacity or --chunk"
)
WORKSPACE_WAYS = "give layers more with --workspace"
OTHER_WAYS = (
    "another version of TensorRT may have it; without it the bundle runs with --device cuda or cpu"
)
EVERY_S = 0.2  # between two words about progress

Progress = Callable[[int, int], Any]  # steps done, steps in all


@dataclass(frozen=True)
class BuildSettings:
    """How an engine is built.

    Attributes:
        profiles: ranges of input shapes.
        compute_capabilities: ("8.6",), of the GPUs it is for; TensorRT-RTX alone, TensorRT builds for the
            GPU it runs on.
        workspace: bytes that a layer may use for itself while it runs; None is the module's default.
        tf32: may float32 products round their factors to 10 bits (TensorRT's default)?
        timing_cache: file that keeps what earlier builds measured; None: nothing is kept.
    """

    profiles: tuple[Profile, ...]
    compute_capabilities: tuple[str, ...] = ()
    workspace: int | None = None
    timing_cache: Path | None = None
    tf32: bool = True


@dataclass(frozen=True)
class Built:
    """An engine: its plan, and what became of the graph; no layers where TensorRT does not say."""

    plan: memoryview
    layers: tuple[EngineLayer, ...]

    @property
    def int8_products(self) -> frozenset[str]:
        """Names of the graph's nodes whose matrix product multiplies INT8 by INT8."""
        return frozenset(n for layer in self.layers if layer.int8_product for n in layer.nodes)

    @property
    def dtypes(self) -> frozenset[str]:
        """Data types of all tensors, in TensorRT's words."""
        return frozenset(d for layer in self.layers for d in (*layer.reads, *layer.writes))


class TensorRT:
    """An installed TensorRT or TensorRT-RTX.

    Attributes:
        device: "tensorrt" or "tensorrt-rtx".
        name: with its version, as `PlanKey.tensorrt` has it.

    Raises:
        DeviceUnavailable: it is not installed.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self._trt = load_module(device)
        if not hasattr(self._trt, "Builder"):
            why = f"the installed {self._trt.__name__} only runs plans; install the whole of it to build"
            raise DeviceUnavailable(device, why)
        self.name = f"{device} {self._trt.__version__}"
        self._log = _log(self._trt)

    def compute_capabilities(self) -> tuple[str, ...]:
        """What it can build for on a machine without such a GPU: ("7.5", ..., "12.0"); none of TensorRT."""
        if self.device != RTX:
            return ()
        names = re.findall(r"\bSM(\d+)(\d)\b", " ".join(dir(self._trt.ComputeCapability)))
        return tuple(f"{int(major)}.{minor}" for major, minor in sorted(names, key=_number))

    @property
    def old(self) -> bool:
        """Does it take the graphs of `lowering.trt10`?"""
        return self.device != RTX and trt10.needed(self._trt.__version__)

    def lower(self, portable: Path, folder: Path, profile: PlanProfile) -> Path:
        """Write the graph that this version builds into `folder` (`lowering.tensorrt`, `lowering.trt10`)."""
        return (trt10 if self.old else tensorrt).lower(portable, folder, profile)

    def check(self, capability: str) -> None:
        """
        Raises:
            SettingError: TensorRT-RTX has no code for GPUs of this compute capability.
        """
        known = self.compute_capabilities()
        if known and capability not in known:
            raise SettingError(
                f"compute capability {capability} is not one that {self.name} builds for: "
                f"{', '.join(known)}"
            )

    def build(
        self, engine: str, graph: Path, settings: BuildSettings, progress: Progress | None = None
    ) -> Built:
        """Parse and build.

        Args:
            engine: its name, for errors.
            graph: of `lowering.tensorrt`.

        Raises:
            BuildFailed: the graph is refused; the sentence names the operator and the layer.
            DeviceUnavailable: there is no GPU, and TensorRT needs one.
            SettingError: no such compute capability.
        """
        self._log.errors, self._log.layers = [], ""
        plan = self._plan(
            engine, graph, settings, progress
        )  # what built it is gone before it is read
        return Built(memoryview(plan), self._layers(plan))

    def _plan(
        self, engine: str, graph: Path, settings: BuildSettings, progress: Progress | None
    ) -> Any:
        trt, log = self._trt, self._log
        builder = self._builder()
        network = builder.create_network(_flags(trt))
        parser = trt.OnnxParser(network, log)
        if not parser.parse_from_file(str(graph)):
            raise BuildFailed(engine, _parse_errors(parser))
        _mark_decomposable(trt, network)
        config = builder.create_builder_config()
        self._configure(engine, builder, config, settings)
        if progress is not None:
            config.progress_monitor = _monitor(trt, progress)
        # TensorRT-RTX chooses kernels when the engine is loaded; its timing cache is a stub.
        path = None if self.device == RTX else settings.timing_cache
        cache = None if path is None else load_timing_cache(config, path)
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            raise BuildFailed(engine, _build_errors(log.errors))
        if path is not None:
            keep_timing_cache(config, cache, path)
        return plan

    def _builder(self) -> Any:
        try:
            builder = self._trt.Builder(self._log)
        except (
            RuntimeError,
            TypeError,
        ) as error:  # TensorRT's way of saying that CUDA did not start
            said = self._log.errors[-1:] or [str(error)]
            raise DeviceUnavailable(self.device, f"it did not start ({said[0]})") from error
        return builder

    def _configure(self, engine: str, builder: Any, config: Any, settings: BuildSettings) -> None:
        trt = self._trt
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # names of the graph's nodes
        if settings.workspace is not None:
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, settings.workspace)
        if self.device == RTX:
            config.num_compute_capabilities = len(settings.compute_capabilities)
            for index, capability in enumerate(settings.compute_capabilities):
                self.check(capability)
                name = f"SM{capability.replace('.', '')}"
                config.set_compute_capability(getattr(trt.ComputeCapability, name), index)
        if not settings.tf32:
            config.clear_flag(trt.BuilderFlag.TF32)
        if hasattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION"):
            # Else an engine may take memory while it runs, which a CUDA graph cannot hold; one that
            # has to is refused.
            config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
        for shapes in settings.profiles:
            profile = builder.create_optimization_profile()
            for name, span in shapes.items():
                profile.set_shape(name, *span)
            if config.add_optimization_profile(profile) < 0:
                raise BuildFailed(engine, _build_errors(self._log.errors))

    def _layers(self, plan: Any) -> tuple[EngineLayer, ...]:
        """From the log if the list is there; else from the plan, which takes the GPU."""
        if self._log.layers:
            return parse(self._log.layers)
        engine = self._trt.Runtime(self._log).deserialize_cuda_engine(plan)
        if engine is None:
            return ()
        one_line = self._trt.LayerInformationFormat.ONELINE
        return parse(engine.create_engine_inspector().get_engine_information(one_line))


def _number(pair: tuple[str, str]) -> tuple[int, int]:
    return int(pair[0]), int(pair[1])


def _log(trt: Any) -> Any:
    """A logger that keeps errors and the list of layers; nothing is printed."""

    class Log(trt.ILogger):  # the bindings have no types
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []
            self.layers = ""

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR:
                self.errors.append(message)
            if message.startswith(HEAD):
                self.layers = message

    return Log()


def _monitor(trt: Any, progress: Progress) -> Any:
    """Tells `progress` the steps of the outermost phase."""

    class Monitor(trt.IProgressMonitor):  # the bindings have no types
        def __init__(self) -> None:
            super().__init__()
            self.phases: dict[str, int] = {}
            self.told = 0.0

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            if parent is None:
                self.phases[name] = steps
                progress(0, steps)

        def step_complete(self, name: str, step: int) -> bool:
            now = time.monotonic()
            if name in self.phases and now - self.told > EVERY_S:
                self.told = now
                progress(step + 1, self.phases[name])
            return True  # go on

        def phase_finish(self, name: str) -> None:
            if name in self.phases:
                progress(self.phases[name], self.phases[name])

    return Monitor()


def _flags(trt: Any) -> int:
    """Strongly typed with an explicit batch, where that is not the only kind of network there is."""
    names = ("EXPLICIT_BATCH", "STRONGLY_TYPED")
    flags = trt.NetworkDefinitionCreationFlag
    return sum(1 << int(getattr(flags, name)) for name in names if hasattr(flags, name))


def _mark_decomposable(trt: Any, network: Any) -> None:
    """Attention in float32 has no fused kernel: it may be taken apart."""
    kind = getattr(trt.LayerType, "ATTENTION_INPUT", None)  # TensorRT before 10.14 has no attention
    if kind is None:
        return
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type == kind:
            layer.__class__ = trt.IAttentionInputLayer  # how its own samples cast a layer
            layer.attention.decomposable = True


def load_timing_cache(config: Any, path: Path) -> Any:
    """What earlier builds measured, set in the config; an empty one where that was of another GPU or
    version."""
    cache = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
    if not config.set_timing_cache(cache, False):
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, False)
    return cache


def keep_timing_cache(config: Any, cache: Any, path: Path) -> None:
    """Write the timing cache, with what another build has added to the file meanwhile."""
    if path.is_file():
        cache.combine(config.create_timing_cache(path.read_bytes()), False)
    part = path.with_suffix(".part")
    part.write_bytes(memoryview(cache.serialize()))
    part.replace(path)


def _parse_errors(parser: Any) -> str:
    found = [parser.get_error(index) for index in range(parser.num_errors)]
    if not found:
        return "its parser gives no reason"
    first = found[0]  # the others follow from it
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    what = " ".join(first.desc().split())
    return f"operator {first.node_operator()} of {first.node_name()}: {what}{more}; {OTHER_WAYS}"


def _build_errors(errors: Sequence[str]) -> str:
    """From the log: the first error names the cause."""
    text = "; ".join(" ".join(error.split()) for error in errors[:2])
    if OUT_OF_MEMORY.search(text):
        return f"out of memory ({text}); {MEMORY_WAYS}"
    if "workspace" in text.lower():
        return f"{text}; {WORKSPACE_WAYS}"
    return f"{text or 'it gives no reason'}; {OTHER_WAYS}"
