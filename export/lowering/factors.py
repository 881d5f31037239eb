"""Multiplications by a constant vector moved into the linear layer before them: they cost nothing.

Only here, where weights are integers with a scale a column: a factor changes no weight. Layer scale
(DINOv2) follows its product; smoothing of out_proj's input follows an attention, which is linear in
the values that v_proj makes.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from vlm_edge.export.lowering import rewrite


def into_scales(graph: ir.Graph, domain: str) -> int:
    """Fold every `Mul(layer(x), vector)` and `Mul(Attention(q, k, layer(x)), vector)`, layers and
    attentions of our `domain`, each read by nothing else; how many there were."""
    count = 0
    for node in list(graph):
        if node.domain != domain:
            continue
        layer = _values_layer(node) if node.op_type == "Attention" else node
        found = rewrite.factor_of(node.outputs[0]) if layer is not None else None
        if layer is None or found is None or not layer.op_type.startswith("Linear"):
            continue
        product, vector = found
        factors = _array(vector)
        # Its scale [n] or [blocks, n], and its bias [n] if there is one.
        for index in range(2, len(layer.inputs)):
            old = layer.inputs[index]
            if old is not None:
                name = f"{layer.outputs[0].name}.{'scale' if index == 2 else 'bias'}"
                layer.replace_input_with(index, _constant(graph, name, _array(old) * factors))
        multiply = product.producer()
        rewrite.take_over(product, node.outputs[0])
        assert multiply is not None
        graph.remove(multiply, safe=True)  # it would still count as a reader
        count += 1
    return count


def _values_layer(attention: ir.Node) -> ir.Node | None:
    """The layer that makes an attention's values, if its columns are those of the result."""
    heads = attention.attributes.get_int("num_heads", 0)
    values = attention.inputs[2]
    if attention.attributes.get_int("kv_num_heads", heads) != heads or values is None:
        return None
    return values.producer() if len(values.uses()) == 1 and not values.is_graph_output() else None


def _array(value: ir.Value) -> np.ndarray:
    assert value.const_value is not None
    return value.const_value.numpy()


def _constant(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    return rewrite.initializer(graph, name, ir.Tensor(array.astype(np.float32), name=name))
