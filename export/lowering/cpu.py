"""For ONNX Runtime on a CPU: the operators its kernels are fast with, over the same weights.

- Activations: the portable graph quantizes them to int8 with zero-point 0 (TensorRT's form). int8 q
  and uint8 q + 128 with zero-point 128 stand for the same values, and the kernels want the second.
- Their products: MatMulIntegerToFloat written out, which also takes the bias. ONNX Runtime would find
  the operator by itself, but not the bias, and not where its MatMulAddFusion comes first.
- Attention over a cache: GroupQueryAttention computes no masked score and does not care how much room
  the cache has. It takes one sequence (batch 1) once the cache holds something.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir

from vlm_edge.export.lowering import attention, rewrite
from vlm_edge.export.lowering.attention import CachedAttention

CONTRIB = "com.microsoft"
HEAD_MULTIPLE = 8  # what the operator takes
ZERO = "zero_point_128"
Windows = Mapping[str, int | None]  # by mask input, the keys a query sees (None: all)


def lower(portable: Path, windows: Windows | None = None) -> str | None:
    """Write the CPU graph beside the portable one, sharing its weights.

    Args:
        windows: `runtime.feeds.windows` of a language model.

    Returns:
        The file's name; None where nothing is to be changed and the portable graph is run as it is.
    """
    model = ir.load(portable)
    changed = integer_products(model) + group_queries(model, windows or {})
    if not changed:
        return None
    path = portable.with_name(f"{portable.stem}.cpu.onnx")
    ir.save(model, path)
    return path.name


def shift_activations(graph: ir.Graph) -> int:
    """Give every int8 activation Q/DQ pair of `graph` the zero-point 128; how many pairs there were."""
    pairs = [node for node in graph if node.op_type == "QuantizeLinear"]
    if not pairs:
        return 0
    zero = rewrite.initializer(graph, ZERO, ir.Tensor(np.array(128, np.uint8), name=ZERO))
    for quantize in pairs:
        old = quantize.inputs[2]
        quantize.replace_input_with(2, zero)
        quantize.outputs[0].type = ir.TensorType(ir.DataType.UINT8)
        for dequantize in list(quantize.outputs[0].consumers()):
            dequantize.replace_input_with(2, zero)
        if old is not None and (producer := old.producer()) is not None and not old.uses():
            graph.remove(producer)
    return len(pairs)


def integer_products(model: ir.Model) -> int:
    """Shift all activations, and write out the product of each with its weight; how many pairs of
    Q/DQ there were."""
    graph = model.graph
    pairs = shift_activations(graph)
    for node in list(graph) if pairs else ():
        if node.op_type != "MatMul":
            continue
        left, right = (_dequantized(value) for value in node.inputs)
        if left is None or right is None:
            continue
        (x, x_scale, x_zero), (weight, scale, _) = left, right
        inputs, output = [x, weight, x_scale, scale, x_zero, None], node.outputs[0]
        added = rewrite.bias_of(output)
        if added is not None:
            output, bias = added
            inputs.append(bias)
        product = ir.node("MatMulIntegerToFloat", inputs, domain=CONTRIB, name=node.name)
        where = output.producer()
        assert where is not None
        graph.insert_after(where, product)
        rewrite.take_over(output, product.outputs[0])
    if pairs:
        graph.opset_imports[CONTRIB] = 1
        rewrite.clean(model)
    return pairs


def _dequantized(
    value: ir.Value | None,
) -> tuple[ir.Value, ir.Value, ir.Value | None] | None:
    """Values, scale and zero-point of the DequantizeLinear this comes from, if it has one scale or one
    a column."""
    node = None if value is None else value.producer()
    if node is None or node.op_type != "DequantizeLinear" or "block_size" in node.attributes:
        return None
    values, scale, zero = (*node.inputs, None)[:3]
    assert values is not None and scale is not None
    return None if values.dtype == ir.DataType.INT4 else (values, scale, zero)


def group_queries(model: ir.Model, windows: Windows) -> int:
    """Give every attention over a cache to GroupQueryAttention; how many there were."""
    graph, lengths = model.graph, None
    found = [
        site
        for site in attention.find(graph)
        if site.mask in windows and site.head_dim % HEAD_MULTIPLE == 0 and not site.rounded
    ]
    for site in found:
        if lengths is None:
            lengths = _lengths(graph)
        _group_queries(graph, site, lengths, windows[site.mask])
    if found:
        graph.opset_imports[CONTRIB] = 1
        rewrite.clean(model)
    return len(found)


def _group_queries(
    graph: ir.Graph,
    site: CachedAttention,
    lengths: tuple[ir.Value, ir.Value],
    window: int | None,
) -> None:
    query, key, nodes = site.query, site.key, list[ir.Node]()
    if (by := site.rotation) is not None:
        rotary = {"interleaved": by.interleaved, "rotary_embedding_dim": by.rotary_dim}
        nodes = [
            ir.node("RotaryEmbedding", [x, by.cos, by.sin], {**rotary, "num_heads": heads})
            for x, heads in ((query, site.heads), (key, site.kv_heads))
        ]
        for node, x in zip(nodes, (query, key), strict=True):
            node.outputs[0].type, node.outputs[0].shape = x.type, x.shape
        query, key = (node.outputs[0] for node in nodes)
    grouped = ir.node(
        "GroupQueryAttention",
        [query, key, site.value, *site.past, *lengths],
        {
            "num_heads": site.heads,
            "kv_num_heads": site.kv_heads,
            "scale": site.scale,
            "local_window_size": -1 if window is None else window,
        },
        domain=CONTRIB,
        num_outputs=3,
    )
    where = site.output.producer()
    assert where is not None
    graph.insert_after(where, [*nodes, grouped])
    for old, new in zip((site.output, *site.present), grouped.outputs, strict=True):
        rewrite.take_over(old, new)


def _lengths(graph: ir.Graph) -> tuple[ir.Value, ir.Value]:
    """What the operator asks for: int32 [batch], positions before the last one, and int32 [], their
    number."""
    positions = next(value for value in graph.inputs if value.name == "positions")
    one = rewrite.initializer(graph, "one", ir.Tensor(np.array(1, np.int32), name="one"))
    latest = ir.Tensor(np.array(-1, np.int64), name="minus_one")
    latest_index = rewrite.initializer(graph, "minus_one", latest)
    last = ir.node("Gather", [positions, latest_index], {"axis": 1})  # [batch]
    before = ir.node("Cast", [last.outputs[0]], {"to": ir.DataType.INT32})
    longest = ir.node("ReduceMax", [before.outputs[0]], {"keepdims": 0})
    total = ir.node("Add", [longest.outputs[0], one])
    graph.insert_before(graph[0], [last, before, longest, total])
    return before.outputs[0], total.outputs[0]
