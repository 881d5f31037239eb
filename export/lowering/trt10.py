"""For TensorRT before 10.15 (JetPack 6 has 10.3): opset 20, and no operator its parser does not know.

From onnx-tensorrt's changelog, operators.md and sources: its parser has Attention since 10.14, and
RMSNormalization, RotaryEmbedding and TensorScatter since 10.15; LayerNormalization since 8.6, int64 since
9.0, INT4 since 10.0. It looks at names of operators and takes any opset.

- The cache: attention is over the keys the cache held and over those of this call, and `present.*` is the
  latter alone, [1, kv_heads, s, head_dim]; the runtime copies it into the cache at `write_indices`. Nothing
  there updates a cache in place, and to write a long one anew would cost each step as much as its attention
  does, twice. The inputs stay: the mask's columns from `write_indices` on are those of the new keys.
- INT8 weights beside float activations become the floats they stand for, in a file of their own: TensorRT
  10 multiplies weights alone in INT4 only ("Block quantization is supported only for DataType::kINT4"); a
  product with scales written out would be computed anew in each step (TensorRT-RTX keeps it so). INT4 stays,
  in opset 21, the first that has it; the parser reads the size of blocks from the shape of the scales.
"""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx_ir as ir
from onnx_ir.external_data import set_base_dir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from vlm_edge.export.lowering import rewrite, tensorrt
from vlm_edge.export.lowering.decompose import decompose
from vlm_edge.runtime.plans import PlanProfile

OPSET, INT4_OPSET = 20, 21
IR_VERSION = 10  # of ONNX 1.16, which TensorRT 10.3's parser is built with
FIRST_WITHOUT = (10, 15)
ALIGNMENT = 4096  # of weights in a file, so that they can be mapped
ROWS_BYTES = 1 << 24  # of a weight at once


def needed(version: str) -> bool:
    """Does TensorRT `version` ("10.3.0.30") want this form? Its parser has all of the portable graph's
    operators from 10.15 on."""
    major, minor = version.split(".")[:2]
    return (int(major), int(minor)) < FIRST_WITHOUT


def lower(portable: Path, folder: Path, profile: PlanProfile) -> Path:
    """Write the graph that TensorRT 10 builds into `folder`, as `tensorrt.lower` does, and what is not
    among the portable graph's weights into `<part>.floats.data` beside it.

    Raises:
        EngineFailure: a weight, a cache or an operator that TensorRT has no form for.
    """
    path = tensorrt.lower(portable, folder, profile)
    model = ir.load(path)
    graph = model.graph
    set_base_dir(graph, portable.parent)  # onnx_ir reads no weights through links
    model.ir_version = IR_VERSION
    four_bits = any(value.dtype == ir.DataType.INT4 for value in graph.initializers.values())
    graph.opset_imports[""] = INT4_OPSET if four_bits else OPSET
    if any(value.name == "write_indices" for value in graph.inputs):
        _freeze_batch(graph)
    decompose(graph)
    _unpack_int8(graph, path.with_suffix(".floats.data"))
    RemoveUnusedNodesPass()(model)
    ir.save(model, path)
    return path


def _freeze_batch(graph: ir.Graph) -> None:
    """One sequence: new keys have one place in the mask."""
    values = [*graph.inputs, *(value for node in graph for value in node.outputs)]
    for value in values:
        if value.shape is not None and "batch" in list(value.shape):
            value.shape = ir.Shape([1 if size == "batch" else size for size in value.shape])


def _unpack_int8(graph: ir.Graph, path: Path) -> None:
    """Give every product of a float activation with an INT8 weight the weight's floats."""
    found = [node for node in graph if weight_only(node)]
    if not found:
        return
    with path.open("wb") as file:
        for node in found:
            output, weight = node.outputs[0], node.inputs[0]
            assert weight is not None and output.dtype is not None and weight.shape is not None
            offset = _write_floats(node, file)
            floats = ir.ExternalTensor(
                path.name,
                offset,
                file.tell() - offset,
                output.dtype,
                shape=weight.shape,
                name=f"{weight.name}.floats",
                base_dir=str(path.parent),
            )
            output.replace_all_uses_with(rewrite.initializer(graph, floats.name, floats))
            graph.remove(node, safe=True)


def weight_only(node: ir.Node) -> bool:
    """Does it dequantize an INT8 weight for products with what is not quantized?"""
    values = node.inputs[0] if node.op_type == "DequantizeLinear" else None
    if values is None or values.dtype != ir.DataType.INT8 or not values.is_initializer():
        return False
    factors = [x for reader in node.outputs[0].consumers() for x in reader.inputs]
    return not any(_quantized(x) for x in factors if x is not None and x is not node.outputs[0])


def _quantized(value: ir.Value) -> bool:
    """Does an activation come through Q/DQ?"""
    producer = value.producer()
    if producer is not None and producer.op_type == "Cast":
        return producer.inputs[0] is not None and _quantized(producer.inputs[0])
    return producer is not None and producer.op_type == "DequantizeLinear"


def _write_floats(node: ir.Node, file: BinaryIO) -> int:
    """Values [in, out] times their scales, [in / block, out], [out] or one; where they begin in the file."""
    values, output = node.inputs[0], node.outputs[0]
    assert values is not None and values.const_value is not None and output.dtype is not None
    integers = values.const_value.numpy()  # of the mapped file
    scales = _scales(node).astype(np.float32)
    if scales.ndim < 2:
        scales = np.broadcast_to(scales, (1, integers.shape[1]))
    block = len(integers) // len(scales)
    file.seek(-(-file.tell() // ALIGNMENT) * ALIGNMENT)
    offset, step = file.tell(), max(1, ROWS_BYTES // (4 * integers.shape[1]))
    for start in range(0, len(integers), step):
        rows = integers[start : start + step]
        floats = rows * scales[np.arange(start, start + len(rows)) // block]
        file.write(floats.astype(output.dtype.numpy()).tobytes())
    return offset


def _scales(node: ir.Node) -> np.ndarray:
    """As they were before `half`, where they still are."""
    value = node.inputs[1]
    producer = None if value is None else value.producer()
    if producer is not None and producer.op_type == "Cast":
        value = producer.inputs[0]
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    assert tensor is not None, "scales of weights are constants"
    return tensor.numpy()
