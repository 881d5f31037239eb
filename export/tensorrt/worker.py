"""One engine in a process of its own, so that the memory its building took goes back to the system.

    python -m vlm_edge.export.tensorrt.worker

The order comes as JSON on stdin (`Order`); answers go to stdout, one JSON object a line:

    {"progress": [done, total]}
    {"done": {"int8_found": n, "int8_promised": n, "peak": bytes, "unpacked": n}}
    {"error": kind, "sentence": text, "traceback": text}, or {"os": [number, text, file]}
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm_edge import errors
from vlm_edge.errors import BuildFailed, VlmEdgeError
from vlm_edge.runtime.manifest import TensorSpec
from vlm_edge.runtime.plans import PlanProfile
from vlm_edge.runtime.schema import from_json, to_json

log = logging.getLogger(__name__)
COMMAND = (sys.executable, "-m", "vlm_edge.export.tensorrt.worker")
Progress = Callable[[int, int], Any]  # steps done, steps in all


@dataclass(frozen=True)
class Order:
    """What a worker is asked for; paths are absolute.

    Attributes:
        engine: its name in the bundle.
        portable: the bundle's graph of it, only read.
        inputs: as the manifest has them.
        picture: positions of one picture, where the language model attends to pictures.
        workspace: bytes.
        timing_cache: file.
        plan: file to be written, in a folder of its own.
    """

    device: str
    engine: str
    portable: str
    inputs: tuple[TensorSpec, ...]
    profile: PlanProfile
    picture: int
    compute_capability: str
    workspace: int
    timing_cache: str
    plan: str


@dataclass(frozen=True)
class Done:
    """What a worker answers.

    Attributes:
        int8_found, int8_promised: products of the graph that multiply INT8 by INT8 in the engine, and that
            are quantized so in the graph. The first is None where TensorRT did not list its layers.
        peak: the largest anonymous memory of the process, bytes.
        unpacked: INT8 weights in blocks, which the engine makes floats of in every call.
    """

    int8_found: int | None
    int8_promised: int
    peak: int
    unpacked: int = 0


def build(order: Order, progress: Progress) -> Done:
    """Lower and build in a process of its own; it ends with this call, come what may.

    Raises:
        BuildFailed, EngineFailure: TensorRT refuses the graph, or memory was out.
        DeviceUnavailable: TensorRT does not start.
        OSError: the disk is full, or a file cannot be read.
    """
    with subprocess.Popen(
        COMMAND,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        start_new_session=True,  # Ctrl-C is ours: a build in C++ does not see it
    ) as process:
        try:
            return _converse(process, order, progress)
        finally:
            process.kill()  # after an interrupt; no matter where it has ended


def _converse(process: subprocess.Popen[str], order: Order, progress: Progress) -> Done:
    assert process.stdin is not None and process.stdout is not None
    try:
        process.stdin.write(json.dumps(to_json(order)))
        process.stdin.close()
    except BrokenPipeError:  # it is gone already: its exit status says why
        log.debug("the worker did not take its order")
    for line in process.stdout:
        answer = json.loads(line)
        if "progress" in answer:
            progress(*answer["progress"])
        elif "done" in answer:
            return from_json(Done, answer["done"])
        elif "os" in answer:
            raise OSError(*answer["os"])
        else:
            log.debug("the worker of %s:\n%s", order.engine, answer["traceback"])
            raise _told(answer["error"], answer["sentence"])
    raise BuildFailed(order.engine, _end(process.wait()))


def _told(kind: str, sentence: str) -> VlmEdgeError:
    """The worker's error here: its sentence is whole, so nothing is made of arguments again."""
    cls: type[VlmEdgeError] = getattr(errors, kind)
    return cls.__new__(cls, sentence)


def _end(status: int) -> str:
    """Why a process ended without an answer."""
    from vlm_edge.export.tensorrt.api import MEMORY_WAYS

    if status == -signal.SIGKILL:  # the kernel's out-of-memory killer
        return f"out of memory: the system killed its process; {MEMORY_WAYS}"
    if status < 0:
        return f"TensorRT crashed ({signal.Signals(-status).name}); another version may not"
    return f"its process ended with status {status}; its output above says why"


def main() -> None:
    """Do one order."""
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever else prints must not get between the answers

    def answer(**values: Any) -> None:
        channel.write(json.dumps(values) + "\n")
        channel.flush()

    order = from_json(Order, json.load(sys.stdin))
    try:
        done = perform(order, lambda steps, total: answer(progress=[steps, total]))
        answer(done=to_json(done))
    except VlmEdgeError as error:
        _complain(answer, error)
    except MemoryError:
        from vlm_edge.export.tensorrt.api import MEMORY_WAYS

        _complain(answer, BuildFailed(order.engine, f"out of memory; {MEMORY_WAYS}"))
    except OSError as error:
        answer(os=[error.errno, error.strerror, error.filename])
    except Exception as error:  # all are told to the parent
        why = f"unexpected {type(error).__name__}: {error}"
        _complain(answer, BuildFailed(order.engine, why))


def perform(order: Order, progress: Progress) -> Done:
    """Lower, build and write the plan, in this process."""
    import onnx_ir as ir

    from vlm_edge.export.lowering import tensorrt
    from vlm_edge.export.memory import PeakMemory
    from vlm_edge.export.tensorrt import api, layers

    plan = Path(order.plan)
    with PeakMemory() as memory:
        trt = api.TensorRT(order.device)
        graph = trt.lower(Path(order.portable), plan.parent, order.profile)
        lowered = ir.load(graph).graph
        promised, unpacked = layers.promised(lowered), tensorrt.blockwise(lowered)
        how = api.BuildSettings(
            profiles=tensorrt.profiles(order.inputs, order.profile, order.picture),
            compute_capabilities=(order.compute_capability,),
            workspace=order.workspace,
            timing_cache=Path(order.timing_cache),
            tf32=order.profile.float_type == "float16",  # who asks for float32 wants all of it
        )
        built = trt.build(order.engine, graph, how, progress)
        plan.write_bytes(built.plan)
    found = len(built.int8_products & promised) if built.layers else None
    return Done(found, len(promised), memory.peak, unpacked)


def _complain(answer: Callable[..., None], error: VlmEdgeError) -> None:
    answer(error=type(error).__name__, sentence=str(error), traceback=traceback.format_exc())


if __name__ == "__main__":
    main()
