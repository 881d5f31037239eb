"""From modules to ONNX models: named inputs and outputs, opset 24, weights written piece by piece."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
from onnxscript import GraphBuilder

from vlm_edge.runtime.manifest import TensorSpec

OPSET = 24  # TensorScatter and Attention with an external cache
IR_VERSION = 11
DTYPES = {
    "float32": ir.DataType.FLOAT,
    "int8": ir.DataType.INT8,
    "int64": ir.DataType.INT64,
}
# Small tensors stay in the graph file, where optimisers see them as constants at once.
INLINE_BYTES = 1024


@dataclass(frozen=True)
class Interface:
    """Inputs and outputs of one engine, in order."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


def build(
    name: str,
    interface: Interface,
    forward: Callable[..., Sequence[ir.Value]],
) -> ir.Model:
    """An ONNX model whose graph is what `forward(op, **inputs)` writes.

    Args:
        name: of the graph.
        interface: `forward` gets its inputs by name and returns its outputs in order.
    """
    graph = ir.Graph([], [], nodes=[], opset_imports={"": OPSET}, name=name)
    builder = GraphBuilder(graph)
    inputs = {
        spec.name: builder.input(spec.name, DTYPES[spec.dtype], ir.Shape(spec.shape))
        for spec in interface.inputs
    }
    outputs = forward(builder.op, inputs)
    for spec, value in zip(interface.outputs, outputs, strict=True):
        value.name = spec.name
        value.type = ir.TensorType(DTYPES[spec.dtype])
        value.shape = ir.Shape(spec.shape)
        graph.outputs.append(value)
    return ir.Model(graph, ir_version=IR_VERSION, producer_name="vlm-edge")


def save(model: ir.Model, path: Path, progress: Callable[[int, int], Any] | None = None) -> None:
    """Write `path` and, beside it, its weights as `<stem>.data`; one tensor in memory at a time."""

    def tick(_: Any, info: Any) -> None:
        if progress is not None:
            progress(info.index + 1, info.total)

    ir.save(
        model,
        path,
        external_data=f"{path.stem}.data",
        size_threshold_bytes=INLINE_BYTES,
        callback=tick,
        alignment=4096,  # pages: ONNX Runtime maps tensors instead of copying them
    )
