"""The machine that figures were measured on: its processor, board, memory and system."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from vlm_edge.runtime import native

ENGINES = ("onnxruntime", "onnxruntime-gpu", "tensorrt")
PACKAGES = ("vlm-edge", "numpy", "pillow", "tokenizers", *ENGINES)


def describe() -> dict[str, Any]:
    """A name for tables ("AMD EPYC 9B14, 2 cores, 23 GB") and its parts; no host name. `kernels` says
    whose kernels run quantized models on the CPU: ours where they were built and the CPU has AVX-512."""
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
    }


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
