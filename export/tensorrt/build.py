"""Engines of a bundle for one GPU, into a plan store: what is there is kept, the rest is built in turn."""

from __future__ import annotations

import dataclasses
import logging
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm_edge.errors import DeviceUnavailable, ExtraMissing, PlanDamaged, SettingError
from vlm_edge.export.tensorrt import memory, planner, worker
from vlm_edge.export.tensorrt.api import RTX, TensorRT
from vlm_edge.runtime.bundle import Bundle
from vlm_edge.runtime.cuda import Gpu
from vlm_edge.runtime.manifest import Manifest, Precision
from vlm_edge.runtime.plans import (
    FloatType,
    PlanEntry,
    PlanKey,
    PlanProfile,
    PlanStore,
    graph_digest,
    host_platform,
)
from vlm_edge.runtime.tiling.settings import Mllama
from vlm_edge.runtime.trt import picture_positions

log = logging.getLogger(__name__)

CAPACITY = 4096  # positions at most, unless more are asked for
UNBOUND_CAPACITY = 2048  # of a model whose positions have no bound
CHUNK = 256  # as the CPU's prefill (runtime/ort.py)
MEDIA = (
    1024  # positions that pictures take at most, unless more are asked for; at least one picture's
)

Progress = Callable[[str, int, int], Any]  # what is done, steps done, steps in all


@dataclass(frozen=True)
class BuildOptions:
    """What is asked of the engines; None leaves it to the model (`profile_of`).

    Attributes:
        float_type: of what is not quantized.
        capacity: positions of the cache.
        chunk: positions of one prefill call.
        tiles: tiles of one vision or connector call.
        images: pictures of a prompt, where the language model attends to pictures.
        workspace: bytes; None takes it from the memory that is free.
        force: build though the planner says that there is not enough memory.
    """

    float_type: FloatType = "float16"
    capacity: int | None = None
    chunk: int | None = None
    tiles: int | None = None
    images: int | None = None
    workspace: int | None = None
    force: bool = False

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int) and not isinstance(value, bool) and value < 1:
                raise SettingError(f"{field.name} = {value}; it should be at least 1")


@dataclass(frozen=True)
class EngineReport:
    """One engine.

    Attributes:
        precision: as in the manifest.
        seconds: that building took, now or when it was built.
        changed: for an engine that was built though plans of it were there, what differs from the nearest,
            by field of the key: what that has, what is needed.
        done: what its building found; None for a plan that was there.
    """

    engine: str
    precision: Precision
    size: int
    seconds: float
    changed: dict[str, tuple[str, str]]
    done: worker.Done | None


@dataclass(frozen=True)
class BuildReport:
    """All engines of a bundle.

    Attributes:
        folder: of the plans.
        tensorrt, compute_capability, profile: as in their keys.
    """

    folder: Path
    tensorrt: str
    compute_capability: str
    profile: PlanProfile
    engines: tuple[EngineReport, ...]


def build(
    bundle: str | Path,
    device: str,
    compute_capability: str | None = None,
    folder: Path | None = None,
    options: BuildOptions | None = None,
    progress: Progress | None = None,
) -> BuildReport:
    """Build what is missing, one engine after another, each in a process of its own.

    Args:
        bundle: its folder, which is only read.
        device: "tensorrt" or "tensorrt-rtx".
        compute_capability: "8.6"; None takes this machine's GPU. TensorRT-RTX builds for any that it
            knows, TensorRT for this machine's alone.
        folder: of the plans; None is `<bundle>.plans` beside the bundle.
        progress: called with (step, done, total).

    Raises:
        BundleError: there is no bundle, or it is damaged.
        SettingError: an option that the model cannot have, or no such compute capability.
        DeviceUnavailable: TensorRT is not installed, or a GPU is needed and absent.
        MemoryShort: there is not enough memory, as far as can be known before.
        BuildFailed, EngineFailure: TensorRT refuses an engine, or memory is out.
        PlanDamaged: a description in the folder is not what it should be; a damaged plan is built anew.
    """
    tick: Progress = progress or (lambda step, done, total: None)
    options = options or BuildOptions()
    opened = Bundle(bundle)
    target = find_target(device, compute_capability)
    profile = profile_of(opened.manifest, options)
    store = PlanStore(folder) if folder is not None else PlanStore.beside(opened.path)
    try:
        store.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingError(f"{store.folder} cannot be written: {error.strerror}") from error
    keys = {
        name: PlanKey(
            target.tensorrt,
            target.compute_capability,
            host_platform(),
            graph_digest(entry, opened.manifest.files),
            profile,
        )
        for name, entry in opened.manifest.engines.items()
    }
    changes = {name: _changed(store, name, key) for name, key in keys.items()}
    free = memory.available(gpu_free=target.free)
    if any(changed != {} for changed in changes.values()) and not options.force:
        needed = planner.estimate(opened.path, opened.manifest, profile, target.old)
        planner.check(needed, free, "this machine", here=target.here)
    workspace = options.workspace or memory.workspace_bytes(free)
    reports = []
    for name, key in keys.items():
        changed, done = changes[name], None
        if changed == {}:
            plan = store.prefer(store.find(name, key, "vlm build", check=False))
            tick(f"keep {name}", 1, 1)
        else:
            plan, done = _build(opened, name, store, key, workspace, device, tick)
        precision = opened.manifest.engines[name].precision
        reports.append(
            EngineReport(name, precision, plan.file.size, plan.seconds, changed or {}, done)
        )
    return BuildReport(
        store.folder, target.tensorrt, target.compute_capability, profile, tuple(reports)
    )


def profile_of(manifest: Manifest, options: BuildOptions) -> PlanProfile:
    """What the engines of a bundle have room for.

    Raises:
        SettingError: more positions than the model has, a chunked prefill that it has no place for, or
            pictures beside the prompt of a model that has them in it.
    """
    decoder, instruction = manifest.decoder, manifest.prompt.instruction
    limit = decoder.max_positions
    capacity = options.capacity or min(limit or UNBOUND_CAPACITY, CAPACITY)
    if limit is not None and capacity > limit:
        raise SettingError(f"--capacity {capacity} is more than the model's {limit} positions")
    chunk = min(options.chunk or (CHUNK if decoder.chunked_prefill else capacity), capacity)
    if chunk < capacity and not decoder.chunked_prefill:
        raise SettingError(
            f"--chunk {chunk}: this model reads a prompt in one piece; leave it out, or lower --capacity"
        )
    if options.images is not None and decoder.media is None:
        raise SettingError(
            "--images is for models that attend to pictures; here they stand in the prompt and take of "
            "--capacity"
        )
    media = 0
    if decoder.media is not None:
        picture = picture_positions(manifest.tiling)
        media = picture * (options.images or max(MEDIA // picture, 1))
    most = manifest.tiling.max_tiles if isinstance(manifest.tiling, Mllama) else None
    tiles = options.tiles or most or 1  # the runtime gives other encoders one tile at a time
    if most is not None and tiles > most:
        raise SettingError(f"--tiles {tiles}: this model makes at most {most} of a picture")
    return PlanProfile(
        float_type=options.float_type,
        capacity=capacity,
        chunk=chunk,
        tiles=tiles,
        words=0 if instruction is None else instruction.max_tokens,
        media=media,
    )


def _changed(store: PlanStore, engine: str, key: PlanKey) -> dict[str, tuple[str, str]] | None:
    """What differs from the nearest plan: {} for one that fits, None where there is none, or the one that
    fits is damaged."""
    nearest = store.nearest(engine, key)
    if nearest is None:
        return None
    differs = nearest.key.differs(key)
    if not differs:
        try:
            store.check(nearest)
        except PlanDamaged as error:
            log.warning("%s", error)
            return None
    return differs


def _build(
    bundle: Bundle,
    engine: str,
    store: PlanStore,
    key: PlanKey,
    workspace: int,
    device: str,
    tick: Progress,
) -> tuple[PlanEntry, worker.Done]:
    assert key.profile is not None
    entry = bundle.manifest.engines[engine]
    timing_cache = f"timing-{key.tensorrt}-{key.compute_capability}.cache".replace(" ", "-")
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix=f".{engine}.", dir=store.folder) as scratch:
        plan = Path(scratch).resolve() / "engine.plan"
        order = worker.Order(
            device=device,
            engine=engine,
            portable=str(bundle.file(entry.graph).resolve()),
            inputs=entry.inputs,
            profile=key.profile,
            picture=picture_positions(bundle.manifest.tiling),
            compute_capability=key.compute_capability,
            workspace=workspace,
            timing_cache=str(store.folder.resolve() / timing_cache),
            plan=str(plan),
        )
        tick(f"build {engine}", 0, 1)
        done = worker.build(order, lambda steps, total: tick(f"build {engine}", steps, total))
        return store.add(engine, key, plan, time.perf_counter() - begin), done


@dataclass(frozen=True)
class BuildTarget:
    """What is built for.

    Attributes:
        tensorrt, compute_capability: as in `PlanKey`.
        free: bytes that are free in this machine's GPU; None where it shares the system's memory, and
            without a GPU.
        here: will the engines run on this machine?
        old: `TensorRT.old`.
    """

    tensorrt: str
    compute_capability: str
    free: int | None
    here: bool
    old: bool


def find_target(device: str, asked: str | None) -> BuildTarget:
    """What `build` builds for.

    Args:
        asked: a compute capability; None takes this machine's GPU.

    Raises:
        DeviceUnavailable: TensorRT is not installed, or a GPU is needed and absent.
        ExtraMissing: cuda-bindings, which asks the GPU, is not installed.
        SettingError: the compute capability cannot be built for, or has to be named.
    """
    trt = TensorRT(device)
    try:
        own, free = _own_gpu(device)
    except (DeviceUnavailable, ExtraMissing):
        if device != RTX:
            raise
        own, free = "", None
    capability = asked or own
    if not capability:
        raise SettingError(
            "there is no GPU here to build for; name the one that will run it, such as "
            f"--compute-capability 8.6 (known are {', '.join(trt.compute_capabilities())})"
        )
    if device == RTX:
        trt.check(capability)
    elif capability != own:
        raise SettingError(
            f"--compute-capability {asked}: TensorRT builds for the GPU it runs on, {own} here; build "
            "on the other machine, or take --device tensorrt-rtx"
        )
    return BuildTarget(trt.name, capability, free, capability == own, trt.old)


def _own_gpu(device: str) -> tuple[str, int | None]:
    """This machine's: its compute capability, and the free bytes of its own memory."""
    gpu = Gpu(device)
    try:
        return gpu.compute_capability, None if gpu.integrated else gpu.memory()[0]
    finally:
        gpu.close()
