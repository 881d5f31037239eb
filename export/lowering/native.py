"""For our own kernels (`native/`) inside ONNX Runtime, where they were built and the CPU has what they need.

They read weights as they lie in the portable graph's file, in prefill and in decode alike, and quantize
activations by themselves, block by block. Layers whose activations the graph quantizes to calibrated
scales are taken too: a scale for each token is nearer to full precision, and the calibrated range only
bounds it (`HEADROOM`). Attention is computed in bfloat16 products and float32 sums, so only graphs that
are quantized anyway, in their weights or in their cache, are lowered.
"""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from vlm_edge.export.lowering import attention, factors, fused, rewrite
from vlm_edge.export.lowering.cpu import Windows

DOMAIN = "vlm_edge"
# A token is clipped to so many times the calibrated range. Clipping at the range itself errs where pictures
# are unlike those of the calibration; without a bound one smoothed channel, far outside, takes all steps of
# its token. Of 1, 2, 4, 8, 16 and none, 2 is the largest that never erred more than the portable graph in
# the demo's and the tests' encoders and connectors, on like and unlike inputs.
HEADROOM = 2.0


def lower(portable: Path, windows: Windows) -> str | None:
    """Write the graph for our kernels beside the portable one, sharing its weights.

    Returns:
        The file's name; None where neither a linear layer nor the cache is quantized.
    """
    model = ir.load(portable)
    rounded = any(site.rounded for site in attention.find(model.graph) if site.mask in windows)
    if not quantized_linears(model.graph) + rounded:
        return None
    cached_attention(model.graph, windows)
    plain_attention(model.graph)
    model.graph.opset_imports[DOMAIN] = 1
    rewrite.clean(model)  # who reads a value decides what is joined
    factors.into_scales(model.graph, DOMAIN)
    fused.join(model.graph, DOMAIN)
    rewrite.clean(model)
    path = portable.with_name(f"{portable.stem}.cpu-native.onnx")
    ir.save(model, path)
    return path.name


def quantized_linears(graph: ir.Graph) -> int:
    """Give every product with a quantized weight to LinearInt8 or LinearInt4, which `fused.join` makes
    operators of, and what it reads before it is rounded; how many there were."""
    count = 0
    for node in list(graph):
        weight = node.inputs[1].producer() if node.op_type == "MatMul" and node.inputs[1] else None
        if weight is None or weight.op_type != "DequantizeLinear":
            continue
        x, values, scale = node.inputs[0], weight.inputs[0], weight.inputs[1]
        assert x is not None and values is not None and scale is not None
        x, calibrated = _before_rounding(x)
        kind = "LinearInt8"
        if values.dtype == ir.DataType.INT4:
            if values.shape is None or values.shape[1] % 2:
                continue  # a row would begin in the middle of a byte
            kind, values = "LinearInt4", rewrite.bytes_of(graph, values)
        inputs, output = [x, values, scale], node.outputs[0]
        added = rewrite.bias_of(output)
        if added is not None:
            output, bias = added
            inputs.append(bias)
        linear = ir.node(
            kind, inputs, {"clip": HEADROOM * calibrated}, domain=DOMAIN, name=node.name
        )
        where = output.producer()
        assert where is not None
        graph.insert_after(where, linear)
        rewrite.take_over(output, linear.outputs[0])
        count += 1
    return count


def _before_rounding(x: ir.Value) -> tuple[ir.Value, float]:
    """What a Q/DQ pair reads and the range that it clips it to; anything else as it is, and 0."""
    back = x.producer()
    if back is None or back.op_type != "DequantizeLinear" or back.inputs[0] is None:
        return x, 0.0
    there = back.inputs[0].producer()
    if there is None or there.op_type != "QuantizeLinear" or there.inputs[0] is None:
        return x, 0.0
    scale = ir.convenience.get_const_tensor(there.inputs[1]) if there.inputs[1] else None
    if scale is None or scale.size != 1:
        return there.inputs[0], 0.0
    return there.inputs[0], 127 * scale.numpy().item()


def plain_attention(graph: ir.Graph) -> None:
    """Give every Attention over [batch, s, heads * head_dim] without a mask to ours."""
    for node in list(graph):
        heads = node.attributes.get_int("q_num_heads", 0) if node.op_type == "Attention" else 0
        if not heads or any(value is not None for value in node.inputs[3:]):
            continue
        attributes: dict[str, int | float] = {
            "num_heads": heads,
            "kv_num_heads": node.attributes.get_int("kv_num_heads", heads),
        }
        scale = node.attributes.get_float("scale", None)
        if scale is not None:
            attributes["scale"] = scale  # 1 / sqrt(head_dim) otherwise
        own = ir.node("Attention", node.inputs[:3], attributes, domain=DOMAIN, name=node.name)
        graph.insert_after(node, own)
        rewrite.take_over(node.outputs[0], own.outputs[0])


def cached_attention(graph: ir.Graph, windows: Windows) -> None:
    """Give rotation, cache update and attention of every layer to CachedAttention(Int8)."""
    for site in attention.find(graph):
        if site.mask not in windows:
            continue
        by, rotary = site.rotation, dict[str, int]()
        if by is not None:
            rotary = {"interleaved": by.interleaved, "rotary_dim": by.rotary_dim}
        own = ir.node(
            "CachedAttentionInt8" if site.rounded else "CachedAttention",
            [
                *(site.query, site.key, site.value),
                *((None, None) if by is None else (by.cos, by.sin)),
                *(*site.past[:2], site.write_indices, *site.past[2:]),
            ],
            {
                "num_heads": site.heads,
                "kv_num_heads": site.kv_heads,
                "scale": site.scale,
                "window": windows[site.mask] or 0,
                **rotary,
            },
            domain=DOMAIN,
            num_outputs=1 + len(site.present),
        )
        where = site.output.producer()
        assert where is not None
        graph.insert_after(where, own)
        for old, new in zip((site.output, *site.present), own.outputs, strict=True):
            rewrite.take_over(old, new)
