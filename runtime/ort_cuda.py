"""ONNX Runtime's CUDA provider: asked for and got, or an error that says what is missing.

Left alone, ONNX Runtime runs on the CPU wherever the provider does not load, and says so at most in its
log. So nothing it says is trusted here: the provider must be in the session, and no node that does a
model's work may have been left to the CPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import logging
import re
from collections import Counter
from pathlib import Path
from typing import Any

import onnxruntime

from vlm_edge.errors import DeviceError, DeviceUnavailable, DriverTooOld, EngineFailure
from vlm_edge.runtime import ort

PROVIDER = "CUDAExecutionProvider"
OPTIONS = {
    "device_id": 0,  # CUDA_VISIBLE_DEVICES chooses among several
    "arena_extend_strategy": "kSameAsRequested",  # by default each extension doubles what is held
}
# Operators that read weights, the cache or whole activations. Those that only compute shapes stay on the
# CPU, where CUDA's kernels want their results: `session.disable_cpu_ep_fallback` refuses them too.
WORK = frozenset(
    "Attention Conv DequantizeLinear DynamicQuantizeMatMul FusedMatMul Gelu Gemm GroupQueryAttention "
    "LayerNormalization MatMul MatMulInteger MatMulIntegerToFloat MatMulNBits MultiHeadAttention "
    "QuantizeLinear RMSNormalization RotaryEmbedding SimplifiedLayerNormalization "
    "SkipLayerNormalization SkipSimplifiedLayerNormalization Softmax TensorScatter".split()
)

logger = logging.getLogger(__name__)


def open_session(graph: Path, name: str, options: Any) -> Any:
    """An InferenceSession on the GPU.

    Args:
        options: SessionOptions, to which recording where nodes run is added.

    Raises:
        DeviceUnavailable: the provider is not in this package, or does not load.
        EngineFailure: it refuses the graph, or has no kernel for a part of it.
    """
    if PROVIDER not in onnxruntime.get_available_providers():
        raise DeviceUnavailable(
            "cuda",
            "the installed onnxruntime is for the CPU alone; run: pip uninstall -y onnxruntime "
            "onnxruntime-gpu && pip install 'vlm-edge[gpu]'",
        )
    with contextlib.redirect_stdout(io.StringIO()):  # it prints what it does not find
        onnxruntime.preload_dlls()
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    try:
        session = onnxruntime.InferenceSession(
            graph, options, providers=[(PROVIDER, OPTIONS)], enable_fallback=0
        )
    except Exception as error:  # the library has an exception for each status
        raise refusal(name, error) from error
    if PROVIDER not in session.get_providers():
        raise absence(_load_error())
    _check_placement(session, name)
    return session


def refusal(name: str, error: Exception) -> DeviceError:
    """Why a session was not made, by what ONNX Runtime says."""
    said = str(error)
    found = re.search(r"CUDA failure (\d+): ([^;]*[^; ])", said)
    if found is None:
        return ort.failure(name, error)
    code, text = int(found[1]), found[2]
    if code == 35:  # cudaErrorInsufficientDriver
        return DriverTooOld("cuda", onnxruntime.cuda_version, _driver_version())
    if code == 100:  # cudaErrorNoDevice
        why = "there is no NVIDIA GPU, or CUDA_VISIBLE_DEVICES hides it"
    elif code == 209:  # cudaErrorNoKernelImageForDevice
        why = (
            "this onnxruntime-gpu has no code for this GPU; use another version of it, or "
            'device="tensorrt" (on a Jetson always)'
        )
    elif code == 2:  # cudaErrorMemoryAllocation
        return EngineFailure(name, "the GPU's memory is full; export with --int4 or free some")
    else:
        why = f"CUDA says {text!r} (error {code}); look at what nvidia-smi says"
    return DeviceUnavailable("cuda", why)


def absence(said: str) -> DeviceError:
    """Why the provider is not there, by what its library says when it is loaded."""
    if "libcuda.so" in said:
        why = (
            "there is no NVIDIA driver (libcuda.so.1): install one, or start the container with its "
            "GPUs (docker run --gpus all)"
        )
        return DeviceUnavailable("cuda", why)
    if re.search(r"undefined symbol: cu[A-Z]", said):  # what the driver offers is not enough
        return DriverTooOld("cuda", onnxruntime.cuda_version, _driver_version())
    major = onnxruntime.cuda_version.partition(".")[0]
    suffix = "-cu12" if major == "12" else ""
    parts = (
        f"{name}{suffix}" for name in ("cublas", "cuda-nvrtc", "cuda-runtime", "cufft", "curand")
    )
    packages = " ".join(f"nvidia-{part}" for part in (*parts, f"cudnn-cu{major}"))
    return DeviceUnavailable(
        "cuda",
        f"ONNX Runtime's CUDA provider did not load ({said}); install CUDA "
        f"{onnxruntime.cuda_version}, or run: pip install {packages}",
    )


def _load_error() -> str:
    """What the system says to the provider's library; ONNX Runtime keeps it to its log."""
    folder = Path(onnxruntime.__file__).parent / "capi"
    try:
        # The first holds what the second asks ONNX Runtime for.
        for name, mode in (("shared", ctypes.RTLD_GLOBAL), ("cuda", ctypes.RTLD_LOCAL)):
            for path in folder.glob(f"*onnxruntime_providers_{name}.*"):
                ctypes.CDLL(str(path), mode)
    except OSError as error:
        return str(error).removeprefix(f"{folder}/")
    return "its log above says why"


def _driver_version() -> str:
    """The newest CUDA that the driver serves, such as "12.4"."""
    version = ctypes.c_int()
    try:
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return "of an unknown version"
    return f"{version.value // 1000}.{version.value % 1000 // 10}"


def _check_placement(session: Any, name: str) -> None:
    """Is all of a model's work on the GPU?"""
    on_cpu = Counter(
        node.op_type
        for subgraph in session.get_provider_graph_assignment_info()
        if subgraph.ep_name != PROVIDER
        for node in subgraph.get_nodes()
    )
    work = {kind: count for kind, count in on_cpu.items() if kind in WORK}
    if work:
        found = ", ".join(f"{count} {kind}" for kind, count in sorted(work.items()))
        raise EngineFailure(
            name,
            f"onnxruntime-gpu {onnxruntime.__version__} would run {found} on the CPU; install another "
            "version of it",
        )
    logger.debug("%s: nodes on the CPU, for shapes: %s", name, dict(on_cpu))
