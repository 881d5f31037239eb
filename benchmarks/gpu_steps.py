"""The steps of `gpu.py`, each run in a process of its own: an order on stdin, results in a file.

A step is a generator: what it has yielded last is on disk, so a step that is stopped keeps it.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from vlm_edge.errors import VlmEdgeError
from vlm_edge.runtime.manifest import read_manifest
from vlm_edge.runtime.plans import PlanStore

Found = dict[str, Any]

PACKAGES = (
    "numpy", "onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx-cu13-libs", "cuda-bindings",
    "torch", "transformers", "onnx-ir", "onnxscript",
)  # fmt: skip
MODULES = {"tensorrt": ("tensorrt",), "tensorrt-rtx": ("tensorrt_rtx", "tensorrt_rtx_bindings")}
VLM_COMMAND = "from vlm_edge.cli.main import main; main()"
ASSEMBLE = """
import sys
from pathlib import Path
from vlm_edge.export.demo import assemble
assemble(sys.argv[1], Path(sys.argv[2]))
"""
STOPPED = "it was stopped"  # by a signal or at its time limit: nothing said how it ended
MAJOR, MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*


@dataclass(frozen=True)
class ModelPlan:
    """A model to measure: where its checkpoint comes from."""

    arch: str
    language: str | None = None  # of `big_checkpoint`; None is the demo of the architecture


# The demos have real weights, but at batch 1 their decode waits for kernels to start; the last one has
# the shape of a model that is used, with random weights.
MODELS = {
    "llava": ModelPlan("llava"),
    "qwen2-0.5b": ModelPlan("llava", "0.5b"),
    "blip2": ModelPlan("blip2"),
    "flamingo": ModelPlan("flamingo"),
}
PRECISIONS = ("fp32", "int8", "int4")


class NotTried(VlmEdgeError):
    """The step has nothing to work on here; the sentence says what is missing."""


class StepFailed(VlmEdgeError, RuntimeError):
    """The step ran, and what it found is not right."""


def environment(order: Mapping[str, Any]) -> Iterator[Found]:
    """What the figures depend on: GPU, driver, CUDA, packages, the machine."""
    from vlm_edge.benchmarks import machine

    found: Found = {"python": sys.version.split()[0], "machine": machine.describe()["name"]}
    found["packages"] = {name: _version(name) for name in PACKAGES if _version(name)}
    yield found
    found["gpu"] = gpu()
    yield found
    with contextlib.suppress(ImportError):
        import onnxruntime

        found["onnxruntime_providers"] = onnxruntime.get_available_providers()
        yield found


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def gpu() -> Found | None:
    """The first GPU by the driver's own word, so on a Jetson too; None where there is none."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device, version, major, minor = (ctypes.c_int() for _ in range(4))
    if cuda.cuInit(0) or cuda.cuDeviceGet(ctypes.byref(device), 0):
        return None
    name, memory = ctypes.create_string_buffer(256), ctypes.c_size_t()
    failed = [
        cuda.cuDeviceGetName(name, 256, device),
        cuda.cuDeviceTotalMem_v2(ctypes.byref(memory), device),
        cuda.cuDeviceGetAttribute(ctypes.byref(major), MAJOR, device),
        cuda.cuDeviceGetAttribute(ctypes.byref(minor), MINOR, device),
        cuda.cuDriverGetVersion(ctypes.byref(version)),
    ]
    if any(failed):
        return None
    return {
        "name": name.value.decode(),
        "memory_gb": round(memory.value / 1e9, 1),
        "compute_capability": f"{major.value}.{minor.value}",
        "cuda": f"{version.value // 1000}.{version.value % 1000 // 10}",
        "driver": _driver(),
    }


def _driver() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
        return done.stdout.strip().splitlines()[0]
    return None


def wheels(order: Mapping[str, Any]) -> Iterator[Found]:
    """Install carried wheels into a folder that the later steps import from first."""
    files = sorted(str(path) for path in Path(order["wheels"]).glob("*.whl"))
    if not files:
        raise StepFailed(f"there is no wheel in {order['wheels']}")
    flags = "--quiet --no-index --no-deps --no-compile --no-cache-dir --upgrade".split()
    command = [sys.executable, "-m", "pip", "install", *flags, "--target", order["site"], *files]
    done = subprocess.run(command, capture_output=True, text=True)
    yield {"wheels": [Path(file).name for file in files]}
    if done.returncode:
        raise StepFailed(f"pip: {(done.stderr.strip() or 'no word').splitlines()[-1]}")
    # ONNX Runtime looks for CUDA's libraries beside itself, where NVIDIA's own wheels would be.
    nvidia = importlib.util.find_spec("nvidia")
    beside = Path(order["site"]) / "nvidia"
    if nvidia is not None and nvidia.submodule_search_locations and not beside.exists():
        beside.symlink_to(next(iter(nvidia.submodule_search_locations)))


def limits(order: Mapping[str, Any]) -> Iterator[Found]:
    """Copy bandwidth and matrix products of this device (`gpu_torch.rates`)."""
    if importlib.util.find_spec("torch") is None:
        raise NotTried("torch, which measures them, is not installed")
    from vlm_edge.benchmarks.gpu_torch import rates

    yield from rates(order["device"])


def checkpoint(order: Mapping[str, Any]) -> Iterator[Found]:
    """Assemble a demo's checkpoint from its packages, or write one of real shape with random weights."""
    plan, folder = MODELS[order["model"]], Path(order["checkpoint"])
    if not folder.is_dir():
        if plan.language is None:
            _python(ASSEMBLE, plan.arch, str(folder))
        else:
            from vlm_edge.benchmarks import big_checkpoint

            draft = folder.with_name(f".{folder.name}")
            shutil.rmtree(draft, ignore_errors=True)
            folder.parent.mkdir(parents=True, exist_ok=True)
            big_checkpoint.main([str(draft), "--language", plan.language], standalone_mode=False)
            draft.rename(folder)
    yield {"checkpoint_mb": _megabytes(folder)}


def bundle(order: Mapping[str, Any]) -> Iterator[Found]:
    """Export a checkpoint in one precision, unless the bundle is there."""
    folder, source = Path(order["bundle"]), Path(order["checkpoint"])
    if not (folder / "manifest.json").is_file():
        if not source.is_dir():
            raise NotTried(f"there is no checkpoint {source.name}")
        folder.parent.mkdir(parents=True, exist_ok=True)
        flag = {"fp32": []}.get(order["precision"], [f"--{order['precision']}"])
        _python(VLM_COMMAND, "export", str(source), "-o", str(folder), *flag)
    yield {"bundle_mb": _megabytes(folder)}


def _python(code: str, *arguments: str) -> None:
    """Run a piece of the exporter, which this room does not import, in a process of its own.

    Raises:
        StepFailed: with the sentence that it ends with.
    """
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, stdout=2, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        last = (done.stderr.strip() or f"code {done.returncode}").splitlines()[-1]
        raise StepFailed(re.sub(r"^[\w.]+: ", "", last))  # "error: " or the class of a traceback


def _megabytes(folder: Path) -> float:
    return round(sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6, 1)


def parity(order: Mapping[str, Any]) -> Iterator[Found]:
    """A model's bundles on the device against the CPU (`gpu_parity.parity`)."""
    from vlm_edge.benchmarks import gpu_parity

    bundles = _bundles(order)
    known = _float16_error(order, bundles)
    allowed = gpu_parity.FLOAT16 if known is None else gpu_parity.ALLOWED * known
    about = {"float16_error": known, "tolerance": allowed}
    found: Found = {}
    for found in gpu_parity.parity(bundles, order["device"], order["new_tokens"], allowed):
        yield about | {"bundles": found}
    wrong = [f"{precision}: {each['why']}" for precision, each in found.items() if each["why"]]
    if wrong:
        raise StepFailed("; ".join(wrong))


def _float16_error(order: Mapping[str, Any], bundles: Mapping[str, Path]) -> float | None:
    """What float16 costs the reference implementation on the same weights and request."""
    source = _peer_source(order)
    if source is None or "fp32" not in bundles:
        return None
    import tempfile

    from vlm_edge.benchmarks import gpu_parity, gpu_peers, gpu_torch
    from vlm_edge.runtime.vlm import VLM

    with tempfile.TemporaryDirectory() as folder, VLM.load(bundles["fp32"]) as vlm:
        prompt, image = next(iter(gpu_parity.cases().values()))
        built = gpu_parity.build(vlm, prompt, image)
        path = Path(folder) / "request.npz"
        gpu_peers.save_request(vlm, built, path)
        answer = gpu_parity.along(vlm, built, None, order["new_tokens"]).tokens
        return gpu_torch.float16_error(str(source), str(path), answer, order["device"])


def timings(order: Mapping[str, Any]) -> Iterator[Found]:
    """A model's bundles and transformers in turn (`gpu_timings.measure`)."""
    from vlm_edge.benchmarks.gpu_timings import Timing, measure

    found: Found = {}
    asked = Timing(
        _bundles(order),
        _peer_source(order),
        order["device"],
        order["prompt_tokens"],
        order["new_tokens"],
        order["runs"],
        order["limits"],
    )
    for each in measure(asked):
        found = each
        yield found
    if found.get("failed"):
        raise StepFailed("; ".join(f"{name}: {why}" for name, why in found["failed"].items()))


def build(order: Mapping[str, Any]) -> Iterator[Found]:
    """TensorRT plans of a model's bundles for this GPU; what TensorRT refuses is the outcome."""
    device = order["device"]
    if not any(importlib.util.find_spec(name) for name in MODULES[device]):
        raise NotTried(f"{' or '.join(MODULES[device])} is not installed")
    capability = order.get("compute_capability")
    more = ["--compute-capability", capability] if capability else []
    found: Found = {}
    for precision, folder in _bundles(order).items():
        begin = time.monotonic()
        try:
            _python(VLM_COMMAND, "build", str(folder), "--device", device, *more)
        except StepFailed as error:
            found[precision] = {"why": str(error)}
        else:
            found[precision] = _plans(folder) | {"total_s": round(time.monotonic() - begin, 1)}
        yield found
    refused = {each["why"]: None for each in found.values() if "why" in each}
    if refused:
        raise StepFailed("; ".join(refused))


def _plans(bundle: Path) -> Found:
    """What the latest plan of each engine took."""
    store = PlanStore.beside(bundle)
    latest = [store.entries(name)[0] for name in read_manifest(bundle).engines]
    return {
        "tensorrt": latest[0].key.tensorrt,
        "seconds": {entry.engine: round(entry.seconds, 2) for entry in latest},
        "mb": {entry.engine: round(entry.file.size / 1e6, 1) for entry in latest},
    }


def _bundles(order: Mapping[str, Any]) -> dict[str, Path]:
    """Those that are there, by precision."""
    found = {name: Path(path) for name, path in order["bundles"].items()}
    found = {name: path for name, path in found.items() if (path / "manifest.json").is_file()}
    if not found:
        raise NotTried("there is no bundle of this model")
    return found


def _peer_source(order: Mapping[str, Any]) -> Path | None:
    """The checkpoint, where transformers can run it here: LLaVA's own class is what it is timed with."""
    folder = Path(order["checkpoint"])
    there = all(importlib.util.find_spec(name) for name in ("torch", "transformers"))
    config = folder / "config.json"
    if not there or not config.is_file():
        return None
    return folder if json.loads(config.read_text())["model_type"] == "llava" else None


STEPS: dict[str, Callable[[Mapping[str, Any]], Iterator[Found]]] = {
    step.__name__: step
    for step in (environment, wheels, limits, checkpoint, bundle, parity, timings, build)
}


def main() -> None:
    """Run the step of the order on stdin; its "result" names the file."""
    order = json.loads(sys.stdin.read())
    path = Path(order["result"])
    found: Found = {}

    def write(status: str, why: str | None, found: Found) -> None:
        draft = path.with_name(f"{path.name}.draft")
        draft.write_text(json.dumps({"status": status, "why": why, "found": found}))
        draft.replace(path)

    try:
        for each in STEPS[order["step"]](order):
            found = each
            write("failed", STOPPED, found)  # unless it goes on
        write("ok", None, found)
    except NotTried as error:
        write("not tried", str(error), found)
    except Exception as error:  # all are told to the parent, known or not
        known = isinstance(error, (VlmEdgeError, OSError, ImportError, MemoryError))
        if not known:
            traceback.print_exc()
        text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        write("failed", text if known else f"unexpected {type(error).__name__}: {text}", found)
        sys.stdout.flush()
        os._exit(1)  # threads of an engine that failed may never end


if __name__ == "__main__":
    main()
