"""Multiplications by a constant vector moved into what comes before them: they cost nothing."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from vlm_edge.export.tensors import StreamedTensor, constant

NORMS = frozenset({"LayerNormalization", "RMSNormalization"})
READERS = frozenset({"MatMul", "Identity"})  # products, and what observes their input


def into_norms(graph: ir.Graph) -> int:
    """Fold every `Mul(norm(x), vector)` that is the norm's only reader; how many there were."""
    folded = 0
    for node in list(graph):
        if node.op_type != "Mul":
            continue
        value, vector = node.inputs
        norm = value.producer() if value is not None else None
        if norm is None or norm.op_type not in NORMS or len(norm.outputs[0].uses()) != 1:
            continue
        if vector is None or vector.const_value is None:
            continue
        factors = vector.const_value.numpy()
        for index in range(1, len(norm.inputs)):  # scale, and bias where there is one
            _scale(graph, norm, index, factors)
        node.outputs[0].replace_all_uses_with(norm.outputs[0])
        graph.remove(node, safe=True)
        if vector.name is not None and not vector.uses():
            del graph.initializers[vector.name]
        folded += 1
    return folded


def _scale(graph: ir.Graph, norm: ir.Node, index: int, factors: object) -> None:
    old = norm.inputs[index]
    if old is None:
        return
    assert old.const_value is not None, "norms are built over the checkpoint's tensors"
    tensor = constant(old.const_value.numpy() * factors)
    new = ir.Value(name=f"{old.name}.smooth", shape=old.shape, type=old.type, const_value=tensor)
    graph.register_initializer(new)
    norm.replace_input_with(index, new)
    if old.name is not None and not old.uses():
        del graph.initializers[old.name]


def into_products(graph: ir.Graph) -> int:
    """Fold every `Mul(Mul(gate, x @ weight), vector)` into the scales of `weight`, one for each output,
    where the product's only reader is the gate; how many there were.

    So what down_proj asks of its input costs nothing: each of up_proj's outputs is scaled by itself.
    """
    folded = 0
    for node in list(graph):
        found = _gated(node)
        if found is None:
            continue
        dequantize, vector = found
        old = dequantize.inputs[1]
        assert old is not None and old.const_value is not None and old.shape is not None
        tensor = _scaled(old.const_value, vector.const_value.numpy())  # type: ignore[union-attr]
        new = ir.Value(
            name=f"{old.name}.smooth", shape=old.shape, type=old.type, const_value=tensor
        )
        graph.register_initializer(new)
        dequantize.replace_input_with(1, new)
        gate = node.inputs[0]
        assert gate is not None
        node.outputs[0].replace_all_uses_with(gate)
        graph.remove(node, safe=True)
        for value in (old, vector):
            if value.name is not None and not value.uses():
                del graph.initializers[value.name]
        folded += 1
    return folded


def takes_factors(value: ir.Value) -> bool:
    """Can `into_norms` or `into_products` move a factor of each of its channels into what makes it?
    (Of a graph in full precision; once quantized, every product's weight has scales.)

    Not where more than products read it: behind a norm after a sum (OPT-350m) the next sum does too.
    """
    if any(node.op_type not in READERS for node in value.consumers()):
        return False
    producer = value.producer()
    return (producer is not None and producer.op_type in NORMS) or _product_of(value) is not None


def _gated(node: ir.Node) -> tuple[ir.Node, ir.Value] | None:
    """Of `Mul(Mul(gate, x @ dequantized), vector)` the DequantizeLinear and the vector."""
    if node.op_type != "Mul" or node.inputs[0] is None or node.inputs[1] is None:
        return None
    value, vector = node.inputs[0], node.inputs[1]
    product = _product_of(value) if vector.const_value is not None else None
    if product is None or len(value.uses()) != 1 or len(product.outputs[0].uses()) != 1:
        return None
    weight = product.inputs[1].producer() if product.inputs[1] is not None else None
    if weight is None or weight.op_type != "DequantizeLinear":
        return None
    return weight, vector


def _product_of(value: ir.Value) -> ir.Node | None:
    """The MatMul in `Mul(gate, x @ weight)`: the right factor, as gated feed-forwards write it."""
    gate = value.producer()
    if gate is None or gate.op_type != "Mul" or gate.inputs[1] is None:
        return None
    product = gate.inputs[1].producer()
    return product if product is not None and product.op_type == "MatMul" else None


def _scaled(scales: ir.TensorProtocol, factors: np.ndarray) -> StreamedTensor:
    """The scales [..., out] of a weight, multiplied by factors [out]."""
    blocks = scales.blocks if isinstance(scales, StreamedTensor) else lambda: [scales.numpy()]

    def rows() -> Iterator[np.ndarray]:
        for block in blocks():
            yield (block * factors).astype(np.float32)

    return StreamedTensor(rows, ir.DataType.FLOAT, tuple(scales.shape.numpy()))
