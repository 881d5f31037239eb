"""ONNX Runtime on the CPU or a CUDA GPU: sessions and stateless engines."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import numpy as np

from vlm_edge.errors import DeviceUnavailable, EngineFailure, ExtraMissing
from vlm_edge.runtime import native
from vlm_edge.runtime.bundle import Bundle

try:
    import onnxruntime
except ImportError as error:
    raise ExtraMissing("cpu", "onnxruntime", "running a bundle on the CPU") from error

_CUDA_FAILURE = re.compile(r"CUDA failure \d+: [^;]*[^; ]")


def open_session(
    graph: Path, name: str, threads: int | None, frugal: bool = False, device: str = "cpu"
) -> Any:
    """An InferenceSession.

    Args:
        threads: of one operator; None takes the processors this process may use.
        frugal: keep weights in the mapped file instead of a copy packed for speed, and give memory
            back after each run.
        device: "cpu" or "cuda".

    Raises:
        EngineFailure: ONNX Runtime refuses the graph.
        DeviceUnavailable: there is no such device; the sentence says what is missing.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or processors()
    options.log_severity_level = 3
    # Each session has threads of its own, which spin for a while after a run and would take the
    # processors from the next engine: prefill right after vision took twice as long.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if frugal:
        options.add_session_config_entry("session.disable_prepacking", "1")
        options.enable_cpu_mem_arena = options.enable_mem_pattern = False
    if device == "cuda":
        from vlm_edge.runtime import ort_cuda

        return ort_cuda.open_session(graph, name, options)
    library = native.library()
    if library is not None:
        options.register_custom_ops_library(str(library))
    try:
        return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the library has an exception for each status
        raise failure(name, error) from error


def kinds(device: str = "cpu") -> tuple[str, ...]:
    """Engine kinds (`EngineEntry.lowered`) that this machine runs, the fastest first."""
    if device == "cuda":
        return ("cuda",)
    return ("cpu",) if native.library() is None else ("cpu-native", "cpu")


def graph_of(bundle: Bundle, name: str, device: str = "cpu") -> Path:
    """The graph of an engine that the device runs fastest.

    Raises:
        DeviceUnavailable: the bundle has no graph for a GPU.
    """
    if device == "cuda" and "cuda" not in bundle.manifest.engines[name].lowered:
        why = f"bundle {bundle.path} has no graph of {name} for it; export it again"
        if bundle.manifest.decoder.cache_dtype == "int8":
            why += " with --kv-cache float32: its kernels keep no INT8 cache"
        raise DeviceUnavailable(device, why)
    return bundle.graph(name, *kinds(device))


def processors() -> int:
    """Processors this process may use; containers often allow fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def failure(name: str, error: Exception) -> EngineFailure:
    """What ONNX Runtime said, in a line: of an error of CUDA without the source lines around it."""
    said = str(error).strip() or type(error).__name__
    if "cuDNN is un" in said or "cuDNN is not" in said:  # it is loaded when a kernel first needs it
        major = onnxruntime.cuda_version.partition(".")[0]
        return EngineFailure(name, f"cuDNN was not found; run: pip install nvidia-cudnn-cu{major}")
    found = _CUDA_FAILURE.search(said)
    return EngineFailure(name, found.group() if found else said.splitlines()[0])


class OrtEngine:
    """One stateless graph (`engine.Engine`); what it reads and gives are arrays of the host."""

    def __init__(self, bundle: Bundle, name: str, threads: int | None, device: str = "cpu") -> None:
        self._name = name
        graph = graph_of(bundle, name, device)
        self._session = open_session(graph, name, threads, device=device)
        self._outputs = [output.name for output in self._session.get_outputs()]

    def run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        if self._session is None:
            raise EngineFailure(self._name, "it is closed")
        try:
            return dict(zip(self._outputs, self._session.run(self._outputs, feeds), strict=True))
        except Exception as error:  # the library has an exception for each status
            raise failure(self._name, error) from error

    def close(self) -> None:
        self._session = None
