"""Masks of attention within float16's range, in a graph that is still float32."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from vlm_edge.export.lowering import rewrite

LEAST = -32768.0  # far below every score, and a score can be added to it in float16
MEDIA_MASK = "media_mask"


def bound(graph: ir.Graph) -> None:
    """Let no attention add less than LEAST to its scores.

    A row of `media_mask` that is masked throughout means: the mean of all (`runtime/media.py`, ALIKE).
    float32 loses the scores beside what such a row adds; float16 has no number for that, so they are taken
    times 0 instead, and so is the mask.
    """
    found = [node for node in graph if node.op_type == "Attention" and len(node.inputs) > 3]
    masks = dict.fromkeys(node.inputs[3] for node in found)
    for mask in masks:
        if mask is None:
            continue
        readers = [node for node in found if node.inputs[3] is mask]
        least = _constant(graph, "least_mask", np.array(LEAST, np.float32))
        bounded = _node(graph, mask, "Max", [mask, least], mask)
        if mask.name == MEDIA_MASK:
            last = _constant(graph, "last_axis", np.array([-1], np.int64))
            most = _node(graph, bounded, "ReduceMax", [bounded, last])  # [batch, 1, s, 1]
            open_ = _node(graph, most, "Greater", [most, least])
            seen = _node(graph, open_, "Cast", [open_], to=ir.DataType.FLOAT)
            bounded = _node(graph, seen, "Mul", [bounded, seen], mask)
            for reader in readers:
                query = reader.inputs[0]
                assert query is not None
                scores = ir.node("Mul", [query, seen], name=f"{reader.name}/seen")
                graph.insert_before(reader, scores)
                _describe(scores, f"{reader.name}.seen", query)
                reader.replace_input_with(0, scores.outputs[0])
        for reader in readers:
            reader.replace_input_with(3, bounded)


def _constant(graph: ir.Graph, name: str, values: np.ndarray) -> ir.Value:
    if name not in graph.initializers:
        return rewrite.initializer(graph, name, ir.Tensor(values, name=name))
    return graph.initializers[name]


def _node(
    graph: ir.Graph,
    behind: ir.Value,
    kind: str,
    inputs: list[ir.Value],
    like: ir.Value | None = None,
    **attributes: ir.DataType,
) -> ir.Value:
    """A new operator behind what it reads."""
    node = ir.node(kind, inputs, attributes, name=f"{behind.name}/{kind}")
    rewrite.insert_behind(graph, behind, node)
    _describe(node, f"{behind.name}.{kind.lower()}", like)
    if kind == "Greater":
        node.outputs[0].type = ir.TensorType(ir.DataType.BOOL)
    return node.outputs[0]


def _describe(node: ir.Node, name: str, like: ir.Value | None) -> None:
    output = node.outputs[0]
    output.name, output.type = name, ir.TensorType(ir.DataType.FLOAT)
    output.shape = None if like is None else like.shape
