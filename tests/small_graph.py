"""One piece of a graph as a model of its own: written, checked by onnx, run by ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from vlm_edge.export import graphs
from vlm_edge.export.checkpoint import TensorRef
from vlm_edge.export.graphs import Interface
from vlm_edge.runtime.manifest import TensorSpec

Forward = Callable[[Any, dict[str, ir.Value]], list[ir.Value]]


def write(
    path: Path,
    forward: Forward,
    inputs: Mapping[str, tuple[str, tuple[Any, ...]]],
    outputs: Mapping[str, tuple[str, tuple[Any, ...]]],
) -> Path:
    """`forward(op, inputs)` as `path`, its weights beside it; (dtype, shape) by name."""
    interface = Interface(
        tuple(TensorSpec(name, *spec) for name, spec in inputs.items()),
        tuple(TensorSpec(name, *spec) for name, spec in outputs.items()),
    )
    graphs.save(graphs.build("small", interface, forward), path)
    onnx.checker.check_model(str(path), full_check=True)
    return path


def write_product(path: Path, module: Any, inputs: int, outputs: int) -> Path:
    """x [rows, inputs] -> y [rows, outputs] by a quantizer's product."""
    return write(
        path,
        lambda op, x: [module(op, x["x"])],
        {"x": ("float32", ("rows", inputs))},
        {"y": ("float32", ("rows", outputs))},
    )


def run(path: Path, feeds: dict[str, np.ndarray], **entries: str) -> list[np.ndarray]:
    """All outputs; `entries` are ONNX Runtime's session options, dots written as two underscores."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    for key, value in entries.items():
        options.add_session_config_entry(key.replace("__", "."), value)
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return session.run(None, feeds)


def initializers(path: Path) -> dict[str, np.ndarray]:
    """Values by name, read back from the file."""
    found = ir.load(path).graph.initializers.items()
    return {name: value.const_value.numpy() for name, value in found}


def ref(values: np.ndarray, name: str = "weight") -> TensorRef:
    return TensorRef(name, values)
