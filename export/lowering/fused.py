"""Linear layers of our kernels joined with what stands around them: a decode step is a few operators a
layer instead of fourteen, and each costs as much to start as a small layer to compute.

`Linears(x, norm?, norm_bias?, factor?, residual?, weight, scale, bias?, ... up to three times)` is the
RMS or layer normalisation before layers that share an input, these layers, and one of: nothing (an
output each), the gate (silu(first) * second), or what follows a single layer: an activation,
the multiplication by a constant vector (smoothing of the next layer's input), the addition of a residual.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from vlm_edge.export.lowering import rewrite

BITS = {"LinearInt8": 8, "LinearInt4": 4}
MOST = 3  # layers of one operator
QUICK = float(np.float32(1.702))  # the slope of quick_gelu's sigmoid


@dataclass
class _Group:
    """Layers that become one operator."""

    layers: list[ir.Node]
    x: ir.Value
    norm: tuple[ir.Value | None, ir.Value | None] = (None, None)  # scale, bias
    epsilon: float = 0.0
    clip: float = 0.0
    activation: str = ""
    factor: ir.Value | None = None
    residual: ir.Value | None = None
    gate: str = ""
    outputs: list[ir.Value] = field(default_factory=list)


def join(graph: ir.Graph, domain: str) -> None:
    """Replace every LinearInt8 and LinearInt4, alone or with its neighbours, by Linears.

    Nodes that nothing reads must be gone from the graph: a value's readers decide what is joined.
    """
    groups: dict[tuple[ir.Value, float], list[ir.Node]] = {}
    for node in graph:
        if node.op_type in BITS and node.domain == domain and node.inputs[0] is not None:
            groups.setdefault((node.inputs[0], _clip(node)), []).append(node)
    for layers in groups.values():
        for start in range(0, len(layers), MOST):
            _write(graph, domain, _group(graph, layers[start : start + MOST]))
    graph.sort()  # a reader of the first output may stand before the last layer


def _group(graph: ir.Graph, layers: list[ir.Node]) -> _Group:
    x = layers[0].inputs[0]  # what an earlier group put in the place of what it was
    assert x is not None
    outputs = [layer.outputs[0] for layer in layers]
    group = _Group(layers, x, clip=_clip(layers[0]), outputs=outputs)
    norm = x.producer()
    alone = len(layers) == len(x.uses()) and x not in graph.outputs
    if norm is not None and alone and _of_last_axis(norm):
        assert norm.inputs[0] is not None
        group.x = norm.inputs[0]
        group.norm = (norm.inputs[1], norm.inputs[2] if len(norm.inputs) > 2 else None)
        group.epsilon = norm.attributes.get_float("epsilon", 1e-5)
    if len(layers) == 2 and (gated := _gated(*group.outputs)) is not None:
        group.gate, group.outputs = "silu", [gated]
    if len(layers) == 1 and (activated := _activated(group.outputs[0])) is not None:
        group.outputs[0], group.activation = activated
    if len(layers) == 1 and (scaled := rewrite.factor_of(group.outputs[0])) is not None:
        group.outputs[0], group.factor = scaled
    if len(layers) == 1 and (added := _added(group.outputs[0])) is not None:
        group.outputs[0], group.residual = added
    return group


def _write(graph: ir.Graph, domain: str, group: _Group) -> None:
    inputs: list[ir.Value | None] = [group.x, *group.norm, group.factor, group.residual]
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
            "clip": group.clip,
            "gate": group.gate,
            "activation": group.activation,
        },
        domain=domain,
        num_outputs=len(group.outputs),
        name=group.layers[0].name,
    )
    # Behind the last of what it replaces: a residual may be made after the first layer's input.
    graph.insert_after(_last(graph, group.outputs), joined)
    for old, new in zip(group.outputs, joined.outputs, strict=True):
        rewrite.take_over(old, new)


def _clip(layer: ir.Node) -> float:
    return layer.attributes.get_float("clip", 0.0)


def _last(graph: ir.Graph, values: Sequence[ir.Value]) -> ir.Node:
    makers = {value.producer() for value in values}
    return next(node for node in reversed(graph) if node in makers)


def _of_last_axis(norm: ir.Node) -> bool:
    """Is it a normalisation of float32 over the last axis by constants: RMS, or layer with a bias?"""
    constants = norm.inputs[1:]
    if len(constants) != {"RMSNormalization": 1, "LayerNormalization": 2}.get(norm.op_type):
        return False
    given = all(
        v is not None and v.is_initializer() and v.dtype == ir.DataType.FLOAT for v in constants
    )
    return given and norm.attributes.get_int("axis", -1) == -1


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


def _activated(y: ir.Value) -> tuple[ir.Value, str] | None:
    """gelu(y), gelu_tanh(y), relu(y) or y * sigmoid(1.702 y) where y is read for nothing else, and its
    name."""
    readers = {use.node.op_type: use.node for use in y.uses()}
    if y.is_graph_output():
        return None
    if (relu := _only_reader(y, "Relu")) is not None:
        return relu.outputs[0], "relu"
    if readers.keys() == {"Gelu"} and len(y.uses()) == 1:
        gelu = readers["Gelu"]
        tanh = gelu.attributes.get_string("approximate", "none") == "tanh"
        return gelu.outputs[0], "gelu_tanh" if tanh else "gelu"
    slopes = [use.node for use in y.uses() if _constant(use.node, y) == QUICK]
    if len(slopes) != 1 or len(y.uses()) != 2:
        return None
    opened = _only_reader(slopes[0].outputs[0], "Sigmoid")
    product = None if opened is None else _only_reader(opened.outputs[0], "Mul")
    if opened is None or product is None or set(product.inputs) != {y, opened.outputs[0]}:
        return None
    return product.outputs[0], "quick_gelu"


def _only_reader(value: ir.Value, kind: str) -> ir.Node | None:
    readers = [use.node for use in value.uses()]
    alone = len(readers) == 1 and readers[0].op_type == kind and not value.is_graph_output()
    return readers[0] if alone else None


def _constant(node: ir.Node, y: ir.Value) -> float | None:
    """c of y * c, a number."""
    other = next((value for value in node.inputs if value is not y), None)
    tensor = ir.convenience.get_const_tensor(other) if node.op_type == "Mul" and other else None
    return float(tensor.numpy().item()) if tensor is not None and tensor.size == 1 else None


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
