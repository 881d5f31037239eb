"""The cache of one layer's attention: float32, or int8 with one scale for each position and head.

A cache is a list of arrays in the manifest's order (`DecoderSettings.cache`): keys and values
[batch, kv_heads, capacity, head_dim], under int8 followed by their scales [batch, kv_heads, capacity, 1].
What is written is read at once, so a prefill sees the same rounded keys and values as later steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir

LARGEST = 127.0  # symmetric: -128 is not used
SMALLEST = 1e-30  # of a scale: a row of zeros is divided by it


def write(
    op: Any, cache: Sequence[ir.Value], key: ir.Value, value: ir.Value, write_indices: ir.Value
) -> tuple[ir.Value, ir.Value, list[ir.Value]]:
    """Put a call's keys and values into the cache.

    Args:
        cache: as it was, 2 arrays (float32) or 4 (int8).
        key, value: float32 [batch, kv_heads, s, head_dim].
        write_indices: int64 [batch], where the first of the s positions goes.

    Returns:
        All keys and all values, float32 [batch, kv_heads, capacity, head_dim], and the cache as it is now.
    """
    new = [key, value]
    if len(cache) == 4:
        (key8, key_scale), (value8, value_scale) = quantize(op, key), quantize(op, value)
        new = [key8, value8, key_scale, value_scale]
    written = [
        op.TensorScatter(past, each, write_indices, axis=2)
        for past, each in zip(cache, new, strict=True)
    ]
    if len(written) == 2:
        return written[0], written[1], written
    keys, values, key_scales, value_scales = written
    return _dequantized(op, keys, key_scales), _dequantized(op, values, value_scales), written


def quantize(op: Any, x: ir.Value) -> tuple[ir.Value, ir.Value]:
    """float32 [..., n] -> int8 [..., n] and the scale float32 [..., 1] of each row."""
    peak = op.ReduceMax(op.Abs(x), [-1], keepdims=1)
    scale = op.Max(op.Div(peak, LARGEST), SMALLEST)
    return op.Cast(op.Round(op.Div(x, scale)), to=ir.DataType.INT8), scale


def _dequantized(op: Any, values: ir.Value, scales: ir.Value) -> ir.Value:
    # DequantizeLinear with a block of head_dim means the same; ONNX Runtime takes 3 times as long for it.
    return op.Mul(op.Cast(values, to=ir.DataType.FLOAT), scales)
