"""The machine that figures were measured on: its processor, board, memory and system."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from vlm_edge.runtime import jetson, native

ENGINES = ("onnxruntime", "onnxruntime-gpu", "tensorrt")
PACKAGES = ("vlm-edge", "numpy", "pillow", "tokenizers", *ENGINES)


def describe() -> dict[str, Any]:
    """A name for tables ("AMD EPYC 9B14, 2 cores, 23 GB") and its parts; no host name. `kernels` says
    whose kernels run quantized models on the CPU: ours where they were built and the CPU has AVX-512.
    `jetson` is what decides a Jetson's figures, null elsewhere."""
    cpu, cores, memory = _board() or _processor(), usable_cores(), _memory_gb()
    unit = "core" if cores == 1 else "cores"
    size = f", {memory} GB" if memory else ""
    return {
        "name": f"{cpu}, {cores} {unit}{size}",
        "cpu": cpu,
        "cores": cores,
        "memory_gb": memory,
        "system": f"{platform.system()} {platform.release()}",
        "arch": platform.machine(),
        "kernels": "onnxruntime" if native.library() is None else "vlm-edge",
        "jetson": _jetson(board()),
    }


def board(root: Path = Path("/")) -> jetson.Jetson | None:
    """The Jetson this is, as it runs now."""
    return jetson.read(root)


def throttling(before: jetson.Jetson | None, root: Path = Path("/")) -> dict[str, Any] | None:
    """What slowed a Jetson down since `before`; null where this is none.

    `overcurrent` counts the events of each of its counters in between; `active` are the cooling devices
    in use before or now; `celsius` is the hottest sensor now.
    """
    now = board(root)
    if before is None or now is None:
        return None
    events = {name: n - before.overcurrent.get(name, 0) for name, n in now.overcurrent.items()}
    return {
        "overcurrent": {name: count for name, count in events.items() if count},
        "active": sorted({*before.throttled, *now.throttled}),
        "celsius": max(now.celsius.values(), default=None),
        "gpu_mhz": now.gpu_mhz,
    }


def _jetson(found: jetson.Jetson | None) -> dict[str, Any] | None:
    if found is None:
        return None
    names = ("module", "chip", "l4t", "jetpack", "tensorrt", "cuda", "power_mode")
    return {name: getattr(found, name) for name in (*names, "gpu_max_mhz", "cpu_max_mhz")}


def usable_cores() -> int:
    """Cores that this process may use, which a container can limit below what the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def versions() -> dict[str, str]:
    """Versions of the installed packages that decide the figures."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _board() -> str | None:
    """The device tree's name of a board such as a Jetson."""
    path = Path("/proc/device-tree/model")
    return path.read_text(errors="replace").strip("\0 \n") if path.is_file() else None


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    if path.is_file():
        for line in path.read_text(errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("model name", "Model"):
                return value.strip()
    return platform.processor() or platform.machine()


def _memory_gb() -> int | None:
    """Memory in units of 2^30 bytes, as boards are named by it."""
    try:
        pages = os.sysconf("SC_PHYS_PAGES")
        return round(pages * os.sysconf("SC_PAGE_SIZE") / 2**30)
    except (AttributeError, ValueError, OSError):
        return None
