"""Linear layers of our kernels joined with what stands around them: a decode step is a few operators a
layer instead of fourteen, and each costs as much to start as a small layer to compute.

`Linears(x, norm?, residual?, weight, scale, bias?, ... up to three times)` is the RMS normalisation
before layers that share an input, these layers, and one of: nothing (an output each), the gate
(silu(first) * second), or the addition of a residual.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import onnx_ir as ir

from vlm_edge.export.lowering import rewrite

BITS = {"LinearInt8": 8, "LinearInt4": 4}
MOST = 3  # layers of one operator


@dataclass
class _Group:
    """Layers that become one operator."""

    layers: list[ir.Node]
    x: ir.Value
    norm: ir.Value | None = None
    epsilon: float = 0.0
    residual: ir.Value | None = None
    gate: str = ""
    outputs: list[ir.Value] = field(default_factory=list)


def join(graph: ir.Graph, domain: str) -> None:
    """Replace every LinearInt8 and LinearInt4, alone or with its neighbours, by Linears.

    Nodes that nothing reads must be gone from the graph: a value's readers decide what is joined.
    """
    groups: dict[ir.Value, list[ir.Node]] = {}
    for node in graph:
        if node.op_type in BITS and node.domain == domain and node.inputs[0] is not None:
            groups.setdefault(node.inputs[0], []).append(node)
    for layers in groups.values():
        for start in range(0, len(layers), MOST):
            _write(graph, domain, _group(graph, layers[start : start + MOST]))
    graph.sort()  # a reader of the first output may stand before the last layer


def _group(graph: ir.Graph, layers: list[ir.Node]) -> _Group:
    x = layers[0].inputs[0]  # what an earlier group put in the place of what it was
    assert x is not None
    group = _Group(layers, x, outputs=[layer.outputs[0] for layer in layers])
    norm = x.producer()
    alone = len(layers) == len(x.uses()) and x not in graph.outputs
    if norm is not None and norm.op_type == "RMSNormalization" and alone and _of_last_axis(norm):
        assert norm.inputs[0] is not None
        group.x, group.norm = norm.inputs[0], norm.inputs[1]
        group.epsilon = norm.attributes.get_float("epsilon", 1e-5)
    if len(layers) == 2 and (gated := _gated(*group.outputs)) is not None:
        group.gate, group.outputs = "silu", [gated]
    if len(layers) == 1 and (added := _added(group.outputs[0])) is not None:
        group.outputs[0], group.residual = added
    return group


def _write(graph: ir.Graph, domain: str, group: _Group) -> None:
    inputs: list[ir.Value | None] = [group.x, group.norm, group.residual]
    for layer in group.layers:
        weight, scale, bias = (*layer.inputs[1:], None)[:3]
        assert weight is not None
        inputs += [rewrite.bytes_of(graph, weight), scale, bias]
    joined = ir.node(
        "Linears",
        inputs,
        {
            "bits": [BITS[layer.op_type] for layer in group.layers],
            "epsilon": group.epsilon,
            "gate": group.gate,
        },
        domain=domain,
        num_outputs=len(group.outputs),
        name=group.layers[0].name,
    )
    # Behind the last of what it replaces: a residual may be made after the first layer's input.
    graph.insert_after(_last(graph, group.outputs), joined)
    for old, new in zip(group.outputs, joined.outputs, strict=True):
        rewrite.take_over(old, new)


def _last(graph: ir.Graph, values: Sequence[ir.Value]) -> ir.Node:
    makers = {value.producer() for value in values}
    return next(node for node in reversed(graph) if node in makers)


def _of_last_axis(norm: ir.Node) -> bool:
    scale = norm.inputs[1]
    constant = scale is not None and scale.is_initializer() and scale.dtype == ir.DataType.FLOAT
    return constant and norm.attributes.get_int("axis", -1) == -1


def _gated(gate: ir.Value, up: ir.Value) -> ir.Value | None:
    """silu(gate) * up where gate and up are read for nothing else."""
    first = {use.node.op_type: use.node for use in gate.uses()}
    if first.keys() != {"Sigmoid", "Mul"} or len(gate.uses()) != 2 or len(up.uses()) != 1:
        return None
    silu, product = first["Mul"].outputs[0], next(iter(up.uses())).node
    opened = first["Sigmoid"].outputs[0]
    if set(first["Mul"].inputs) != {gate, opened} or len(opened.uses()) != 1:
        return None
    if product.op_type != "Mul" or set(product.inputs) != {silu, up} or len(silu.uses()) != 1:
        return None
    if any(value.is_graph_output() for value in (gate, up, opened, silu)):
        return None
    return product.outputs[0]


def _added(y: ir.Value) -> tuple[ir.Value, ir.Value] | None:
    """The sum that is y's only reader, and its other side: a residual of the same shape, not a constant."""
    readers = list(y.consumers())
    if len(readers) != 1 or readers[0].op_type != "Add" or y.is_graph_output():
        return None
    other = next((value for value in readers[0].inputs if value is not y), None)
    if other is None or other.is_initializer() or other.shape is None:
        return None
    if other.shape != readers[0].outputs[0].shape:
        return None
    return readers[0].outputs[0], other
