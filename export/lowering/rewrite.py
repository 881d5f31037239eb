"""What every lowering needs: a value in another's place, what became unread removed."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass


def clean(model: ir.Model) -> None:
    """Drop what a rewriting left unread: nodes, initializers, inputs."""
    RemoveUnusedNodesPass()(model)
    inputs = model.graph.inputs
    for value in [value for value in inputs if not value.uses()]:
        inputs.remove(value)


def initializer(graph: ir.Graph, name: str, tensor: ir.TensorProtocol) -> ir.Value:
    """A new initializer of the graph."""
    value = ir.Value(
        name=name,
        shape=ir.Shape(tensor.shape.numpy()),
        type=ir.TensorType(tensor.dtype),
        const_value=tensor,
    )
    graph.register_initializer(value)
    return value


def insert_behind(graph: ir.Graph, value: ir.Value, node: ir.Node) -> None:
    """Put a node right behind what makes `value`; in front of all if that is no node."""
    producer = value.producer()
    if producer is None:
        graph.insert_before(graph[0], node)
    else:
        graph.insert_after(producer, node)


def values(tensor: ir.TensorProtocol) -> np.ndarray:
    """Its values, to be read only. onnx_ir reads no file that has another (hard) link, and that is how a
    plan's graph or a copy of a bundle shares its weights."""
    if not isinstance(tensor, ir.ExternalTensor):
        return tensor.numpy()
    shape, dtype = tensor.shape.numpy(), tensor.dtype.numpy()
    return np.memmap(tensor.path, dtype, "r", tensor.offset or 0, shape)


def take_over(old: ir.Value, new: ir.Value) -> None:
    """`new` stands wherever `old` stood, its name and place among the outputs included."""
    name, shape, kind = old.name, old.shape, old.type
    old.name = f"{name}.replaced"
    new.name, new.shape, new.type = name, shape, kind
    old.replace_all_uses_with(new, replace_graph_outputs=True)


def bias_of(product: ir.Value) -> tuple[ir.Value, ir.Value] | None:
    """The sum with a constant vector that is the product's only reader, and the vector."""
    readers = list(product.consumers())
    if len(readers) != 1 or readers[0].op_type != "Add":
        return None
    for other in readers[0].inputs:
        if other is None or other is product or not other.is_initializer():
            continue
        if other.shape is not None and len(other.shape) == 1:
            return readers[0].outputs[0], other
    return None


def factor_of(product: ir.Value) -> tuple[ir.Value, ir.Value] | None:
    """The multiplication by a constant float32 vector, one factor a column, that is the product's only
    reader, and the vector."""
    readers = list(product.consumers())
    if len(readers) != 1 or readers[0].op_type != "Mul" or product.is_graph_output():
        return None
    for other in readers[0].inputs:
        if other is None or other is product or not other.is_initializer():
            continue
        if other.dtype != ir.DataType.FLOAT or other.shape is None or product.shape is None:
            continue
        if len(other.shape) == 1 and other.shape[0] == product.shape[-1]:
            return readers[0].outputs[0], other
    return None


def bytes_of(graph: ir.Graph, values: ir.Value) -> ir.Value:
    """An int8 or int4 initializer [in, out] as its bytes in the file, uint8 [in, out] or [in, out / 2]."""
    if values.dtype == ir.DataType.UINT8:
        return values
    name, tensor = f"{values.name}.bytes", values.const_value
    if name in graph.initializers:
        return graph.initializers[name]
    assert tensor is not None and values.shape is not None
    rows, columns = values.shape.numpy()
    shape = ir.Shape([rows, columns // 2 if values.dtype == ir.DataType.INT4 else columns])
    stored: ir.TensorProtocol
    if isinstance(tensor, ir.ExternalTensor):
        stored = ir.ExternalTensor(
            tensor.location,
            tensor.offset,
            tensor.length,
            ir.DataType.UINT8,
            shape=shape,
            name=name,
            base_dir=tensor.base_dir,
        )
    else:
        stored = ir.Tensor(
            np.frombuffer(tensor.tobytes(), np.uint8).reshape(shape.numpy()), name=name
        )
    return initializer(graph, name, stored)
