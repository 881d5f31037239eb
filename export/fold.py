"""Multiplications by a constant vector moved into the normalisation before them: they cost nothing."""

from __future__ import annotations

import onnx_ir as ir

from vlm_edge.export.tensors import constant

NORMS = frozenset({"LayerNormalization", "RMSNormalization"})


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
