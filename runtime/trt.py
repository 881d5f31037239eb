"""TensorRT and TensorRT-RTX: a bundle's plans opened on the GPU of this machine.

Building them is `vlm build`'s (`vlm_edge.export.tensorrt`); this reads plans alone.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import logging
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np

from vlm_edge.errors import (
    DeviceError,
    DeviceUnavailable,
    DriverTooOld,
    EngineFailure,
    OutOfDeviceMemory,
)
from vlm_edge.runtime.bundle import Bundle
from vlm_edge.runtime.cuda import Gpu
from vlm_edge.runtime.encoder_decoder import EncoderDecoder
from vlm_edge.runtime.engine import Decoder, Engine
from vlm_edge.runtime.plans import PlanKey, PlanStore, graph_digest, host_platform
from vlm_edge.runtime.tiling.settings import Mllama, Overlap, Tiling
from vlm_edge.runtime.trt_decoder import TrtDecoder
from vlm_edge.runtime.trt_engine import ALIGNMENT, LoadedEngine, TrtEngine
from vlm_edge.runtime.trt_kernels import KernelCache

# TensorRT-RTX's wheel has the same module under either name, by its version.
MODULES = {
    "tensorrt": ("tensorrt",),
    "tensorrt-rtx": ("tensorrt_rtx", "tensorrt_rtx_bindings"),
}
INSTALL = {
    "tensorrt": "it comes with JetPack, or from NVIDIA for other systems",
    "tensorrt-rtx": "run: pip install --no-deps tensorrt-rtx-cu13-bindings tensorrt-rtx-cu13-libs",
}
logger = logging.getLogger(__name__)

# How TensorRT says that a plan is not for this machine, and that CUDA's libraries are newer than its driver.
NOT_FOR_THIS = re.compile(
    r"incompatible|not compatible|version tag|serialization version|compute \d|rebuild|magicTag",
    re.I,
)
OLD_DRIVER = re.compile(r"driver version is insufficient|\b(?:cuda)?error:? ?35\b", re.I)
NO_MEMORY = re.compile(r"out ?of ?memory|cudaError(?:MemoryAllocation| 2\b)", re.I)


def open_engines(
    bundle: Bundle, device: str, plans: PlanStore | None = None, check: bool = True
) -> tuple[dict[str, Engine], Decoder]:
    """The engines that encode pictures, by name, and the decoder (`engine.open_engines`).

    All run one after another on one stream, and share one block of memory for activations.

    Args:
        device: "tensorrt" or "tensorrt-rtx".
        plans: where they are; None looks beside the bundle.
        check: compare every plan with its sha256.

    Raises:
        DeviceUnavailable: TensorRT, the driver or the GPU is not there.
        PlanMissing, PlanMismatch, PlanDamaged: a plan is not there, is for another GPU, version or graph,
            or is not what was built; the sentence says how to make it.
        OutOfDeviceMemory: they do not fit.
        EngineFailure: TensorRT refuses a plan all the same.
    """
    manifest = bundle.manifest
    command = f"vlm build {shlex.quote(str(bundle.path))} --device {device}"
    if plans is not None:
        command += f" -o {shlex.quote(str(plans.folder))}"
    store = plans if plans is not None else PlanStore.beside(bundle.path)
    runtime = Runtime(device, command)
    gpu = Gpu(device)
    kernels = KernelCache(store.folder / f"kernels-{gpu.compute_capability}.cache")
    with contextlib.ExitStack() as undo:  # should something fail below
        gpu.enter()
        undo.callback(gpu.leave)
        loaded: dict[str, LoadedEngine] = {}
        for name, entry in manifest.engines.items():
            key = PlanKey(
                tensorrt=runtime.name,
                compute_capability=gpu.compute_capability,
                platform=host_platform(),
                graph=graph_digest(entry, manifest.files),
                profile=None,
            )
            plan = store.path(store.find(name, key, command, check))
            loaded[name] = runtime.load(name, plan, gpu, kernels)
            undo.callback(loaded[name].close)
        most = max(engine.scratch_bytes() for engine in loaded.values())
        scratch = gpu.allocate(max(most, ALIGNMENT), "activations")
        encoders = {}
        for name, entry in manifest.engines.items():
            if name == "llm":
                continue
            axes = {spec.name: spec.shape for spec in entry.inputs}
            encoders[name] = TrtEngine(loaded[name], gpu, scratch, axes)
            undo.callback(encoders[name].close)
        picture = picture_positions(manifest.tiling)
        inner = TrtDecoder(loaded["llm"], gpu, scratch, manifest.decoder, picture)
        undo.callback(inner.close)
        decoder: Decoder = inner
        if (start := manifest.decoder.start_token_id) is not None:
            row = bundle.embeddings().row(start)
            decoder = EncoderDecoder(encoders.pop("llm_encoder"), inner, start, row)
        kernels.save()  # what starting has compiled
        undo.pop_all()
        gpu.leave()  # the engines hold it now
    return {**encoders}, decoder


def picture_positions(tiling: Tiling) -> int:
    """Positions that one picture takes at most beside the prompt of a model that attends to it, an
    encoder's empty tiles among them."""
    tiles = 1
    if isinstance(tiling, Mllama):
        tiles = tiling.max_tiles
    elif isinstance(tiling, Overlap):
        tiles += tiling.tiles[0] * tiling.tiles[1]
    return tiles * tiling.tile_tokens


class Runtime:
    """An installed TensorRT or TensorRT-RTX, as far as running engines goes.

    Args:
        device: "tensorrt" or "tensorrt-rtx".
        command: the `vlm build` that makes a plan again, for errors.

    Attributes:
        name: with its version, as `PlanKey.tensorrt` has it.

    Raises:
        DeviceUnavailable: it is not installed.
    """

    def __init__(self, device: str, command: str) -> None:
        self._device, self._command = device, command
        self._trt = load_module(device)
        self._log = _log(self._trt)
        self.name = f"{device} {self._trt.__version__}"

    def load(self, name: str, plan: Path, gpu: Gpu, kernels: KernelCache) -> LoadedEngine:
        """Deserialize the plan of an engine; its weights go to the GPU.

        Raises:
            OutOfDeviceMemory: they do not fit.
            EngineFailure: TensorRT refuses it, as one of another version or GPU; the sentence says what
                builds it.
            DeviceUnavailable, DriverTooOld: TensorRT does not start.
        """
        self._log.errors.clear()
        try:
            runtime = self._trt.Runtime(self._log)
            # Mapped, so that the host has no second copy of the weights, which on a Jetson would not fit.
            blob = np.memmap(plan, np.uint8, "r")
            engine = runtime.deserialize_cuda_engine(blob)
        except (RuntimeError, TypeError) as error:  # how its bindings say that it did not start
            self._log.errors.append(str(error))
            engine = None
        if engine is None:
            raise self._refusal(name, plan, gpu)
        return LoadedEngine(self._trt, name, engine, self._log, kernels)

    def _refusal(self, name: str, plan: Path, gpu: Gpu) -> DeviceError:
        text = " ".join("; ".join(self._log.errors).split())
        if OLD_DRIVER.search(text):
            return DriverTooOld(self._device, _cuda_needed(), gpu.driver)
        if NO_MEMORY.search(text):
            size = plan.stat().st_size
            return OutOfDeviceMemory(gpu.name, f"engine {name}", size, *gpu.memory())
        if NOT_FOR_THIS.search(text):
            why = f"{self.name} on {gpu.name} does not take its plan ({text})"
            return EngineFailure(name, f"{why}; make it again with `{self._command}`")
        return EngineFailure(name, f"its plan does not load ({text or 'no reason given'})")


def load_module(device: str) -> Any:
    """The module that `device` stands for.

    Raises:
        DeviceUnavailable: it is not installed.
    """
    for name in MODULES[device]:
        with contextlib.suppress(ImportError):
            module = importlib.import_module(name)
            if hasattr(module, "Runtime"):  # else a stub that only says where to download
                return module
    raise DeviceUnavailable(device, f"{MODULES[device][0]} is not installed; {INSTALL[device]}")


def _log(trt: Any) -> Any:
    """A logger for TensorRT that keeps its errors and hands warnings on."""

    class Log(trt.ILogger):
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR:
                self.errors.append(message)
            elif severity <= trt.ILogger.WARNING:
                logger.warning("%s", message)

    return Log()


def _cuda_needed() -> str:
    """The CUDA version that the installed wheels of TensorRT are for, "13.0"."""
    names = [str(found.metadata["Name"]) for found in importlib.metadata.distributions()]
    for name in names:
        if found := re.match(r"tensorrt.*[-_]cu(\d+)", name):
            return f"{found[1]}.0"
    return "a newer one"
