"""Operators younger than opset 20, written out in older ones: attention, RMS norm, rotary positions.

Statistics of norms and softmax are float32 whatever the graph computes in. Keys and values that a group of
query heads shares are read once and copied nowhere: the group's queries are rows of one product.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript import GraphBuilder

from vlm_edge.errors import EngineFailure
from vlm_edge.export.lowering import rewrite

FLOAT = ir.DataType.FLOAT
MASKED = float(np.finfo(np.float32).min)
END = int(np.iinfo(np.int64).max)


def decompose(graph: ir.Graph) -> int:
    """Write out every Attention, RMSNormalization and RotaryEmbedding; how many there were.

    Attention over a cache (TensorScatter) becomes attention over what the cache held and over what this
    call adds; `present.*` is then the latter alone, [batch, kv_heads, s, head_dim], and batch is 1.

    Raises:
        EngineFailure: a form of them that our graphs do not have.
    """
    writer = _Writer(graph)
    found = [node for node in graph if node.op_type in _WRITTEN]
    for node in found:
        writer.push_module(node.name or node.op_type)  # an engine's errors name the layer by it
        rewrite.take_over(node.outputs[0], _WRITTEN[node.op_type](writer.op, node))
        writer.pop_module()
        graph.remove(node, safe=True)
    for node in [node for node in graph if node.op_type == "TensorScatter"]:
        added = _value(node, 1)
        shape = added.shape
        rewrite.take_over(node.outputs[0], added)
        added.shape = shape
        graph.remove(node, safe=True)
    graph.sort()
    return len(found)


class _Writer(GraphBuilder):
    """Appends nodes to a graph that has some already."""

    def __init__(self, graph: ir.Graph) -> None:
        super().__init__(graph)
        self._made: dict[tuple[ir.Value, object], ir.Value] = {}

    def initializer(
        self, tensor: ir.TensorProtocol, name: str | None = None, *, qualify: bool = True
    ) -> ir.Value:
        # The base counts constants from 0, as it did when the graph was first written.
        return super().initializer(tensor, f"opset20.{name or tensor.name}", qualify=False)

    def once(self, value: ir.Value, kind: object, make: Callable[[], ir.Value]) -> ir.Value:
        """What `make` gives for a value, made for the first of all layers that ask."""
        if (value, kind) not in self._made:
            self._made[value, kind] = make()
        return self._made[value, kind]


def _rms_norm(op: Any, node: ir.Node) -> ir.Value:
    """x / sqrt(mean(x^2) + epsilon) * weight over the last axis (arXiv 1910.07467)."""
    _only(node, axis=-1, stash_type=1)
    x, weight = _as(op, _value(node, 0), FLOAT), _value(node, 1)
    mean = op.ReduceMean(op.Pow(x, 2.0), [-1], keepdims=1)
    normed = op.Div(x, op.Sqrt(op.Add(mean, node.attributes.get_float("epsilon", 1e-5))))
    return op.Mul(_as(op, normed, weight.dtype), weight)


def _rotary(op: Any, node: ir.Node) -> ir.Value:
    """x [batch, heads, s, head_dim]: the first half of its rotated columns turns with the second, the
    rest stays (arXiv 2104.09864)."""
    _only(node, interleaved=0)
    x, cos, sin = (_value(node, i) for i in range(3))
    width = _size(node, x, 3)
    half = (node.attributes.get_int("rotary_embedding_dim", 0) or width) // 2
    parts = [half, half, width - 2 * half][: 2 if 2 * half == width else 3]
    first, second, *rest = op.Split(x, parts, axis=3, _outputs=len(parts))
    cos, sin = op.Unsqueeze(cos, [1]), op.Unsqueeze(sin, [1])  # [batch, 1, s, half]
    left = op.Sub(op.Mul(first, cos), op.Mul(second, sin))
    right = op.Add(op.Mul(second, cos), op.Mul(first, sin))
    return op.Concat(left, right, *rest, axis=3)


def _attention(op: Any, node: ir.Node) -> ir.Value:
    """softmax(q k^T * scale + mask) v"""
    _only(node, is_causal=0, softcap=0.0)
    q, k, v, *mask = (_value(node, i) for i in range(len(node.inputs)))
    if len(mask) > 1 or len(node.outputs) > 1 or q.shape is None:
        raise _unknown(node)
    mask = [_single(op, value) for value in mask]
    if len(q.shape) == 4:
        return _heads_attention(op, node, q, k, v, *mask)
    query_heads = node.attributes.get_int("q_num_heads", 0)
    heads = node.attributes.get_int("kv_num_heads", 0)
    q, k, v = _split(op, q, query_heads), _split(op, k, heads), _split(op, v, heads)
    mixed = _heads_attention(op, node, q, k, v, *mask)
    return op.Reshape(op.Transpose(mixed, perm=[0, 2, 1, 3]), [0, 0, -1])


def _heads_attention(
    op: Any, node: ir.Node, q: ir.Value, k: ir.Value, v: ir.Value, mask: ir.Value | None = None
) -> ir.Value:
    """q [batch, heads, s, head_dim] attends to k and v [batch, kv_heads, keys, head_dim]; keys from a
    cache in two parts, so that no array as long as the cache is written."""
    heads, kv_heads, width = _size(node, q, 1), _size(node, k, 1), _size(node, q, 3)
    scale = node.attributes.get_float("scale", width**-0.5)
    q = q if scale == 1 else op.Mul(q, scale)  # before the product, which float16 must hold
    if heads != kv_heads:
        q = op.Reshape(q, [0, kv_heads, -1, width])  # [batch, kv_heads, group * s, head_dim]
    updates = [x.producer() for x in (k, v)]
    cached = all(x is not None and x.op_type == "TensorScatter" for x in updates)
    if not cached:
        mixed = op.MatMul(_softmax(op, _scores(op, q, k), mask, heads, kv_heads, v.dtype), v)
    else:
        keys, values = (_update(node, x) for x in updates)
        if mask is None:
            raise _unknown(node)
        start, capacity = keys[2], _size(node, keys[0], 2)
        mask = op.builder.once(mask, start, lambda: _with_added(op, mask, start, capacity))
        scores = op.Concat(_scores(op, q, keys[0]), _scores(op, q, keys[1]), axis=3)
        weights = _softmax(op, scores, mask, heads, kv_heads, v.dtype)
        before = op.MatMul(op.Slice(weights, [0], [capacity], [3]), values[0])
        mixed = op.Add(before, op.MatMul(op.Slice(weights, [capacity], [END], [3]), values[1]))
    return mixed if heads == kv_heads else op.Reshape(mixed, [0, heads, -1, width])


def _scores(op: Any, q: ir.Value, k: ir.Value) -> ir.Value:
    return op.MatMul(q, op.Transpose(k, perm=[0, 1, 3, 2]))


def _softmax(
    op: Any,
    scores: ir.Value,
    mask: ir.Value | None,
    heads: int,
    kv_heads: int,
    dtype: ir.DataType | None,
) -> ir.Value:
    """Softmax of scores [batch, kv_heads, group * s, keys] and a float32 mask
    [batch, 1 or heads, s, keys]."""
    scores = _as(op, scores, FLOAT)
    if mask is not None:
        rows = op.builder.once(mask, (heads, kv_heads), lambda: _grouped(op, mask, heads, kv_heads))
        scores = op.Add(scores, rows)
    return _as(op, op.Softmax(scores, axis=-1), dtype)


def _grouped(op: Any, mask: ir.Value, heads: int, kv_heads: int) -> ir.Value:
    """A mask [batch, 1 or heads, s, keys] for scores [batch, kv_heads, group * s, keys]."""
    if heads == kv_heads:
        return mask
    if mask.shape is not None and mask.shape[1] == 1:
        return op.Tile(mask, [1, 1, heads // kv_heads, 1])
    return op.Reshape(mask, [0, kv_heads, -1, 0])


def _with_added(op: Any, mask: ir.Value, start: ir.Value, capacity: int) -> ir.Value:
    """A mask [1, n, s, capacity] of the cache as it will be, for the keys of the cache as it was, where
    the positions to be written hold nothing yet, and those of this call: [1, n, s, capacity + s].

    Args:
        start: int64 [1], where the first of the s positions goes.
    """
    count = op.Shape(mask, start=2, end=3)
    places = op.Range(0, op.Squeeze(count, [0]), 1)  # [s]
    every = ir.tensor(np.arange(capacity), name="cells")
    cells = op.builder.once(start, "cells", lambda: op.initializer(every))
    empty = op.And(op.GreaterOrEqual(cells, start), op.Less(cells, op.Add(start, count)))
    held = op.Where(empty, MASKED, mask)
    return op.Concat(held, op.Gather(mask, op.Add(start, places), axis=3), axis=3)


def _single(op: Any, mask: ir.Value) -> ir.Value:
    """A mask in float32, not by way of float16."""
    cast = mask.producer()
    if cast is not None and cast.op_type == "Cast" and _value(cast, 0).dtype == FLOAT:
        return _value(cast, 0)
    return _as(op, mask, FLOAT)


def _split(op: Any, x: ir.Value, heads: int) -> ir.Value:
    """[batch, s, heads * head_dim] -> [batch, heads, s, head_dim]"""
    assert x.shape is not None and isinstance(x.shape[2], int)
    x = op.Reshape(x, [0, 0, heads, x.shape[2] // heads])
    return op.Transpose(x, perm=[0, 2, 1, 3])


def _update(node: ir.Node, update: ir.Node | None) -> tuple[ir.Value, ir.Value, ir.Value]:
    """What a cache held, what is added, and where."""
    assert update is not None
    if update.attributes.get_int("axis", -2) not in (2, -2) or len(update.inputs) < 3:
        raise _unknown(node)
    return _value(update, 0), _value(update, 1), _value(update, 2)


def _as(op: Any, x: ir.Value, dtype: ir.DataType | None) -> ir.Value:
    assert x.dtype is not None and dtype is not None
    return x if x.dtype == dtype else op.Cast(x, to=dtype)


def _value(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index]
    if value is None:
        raise _unknown(node)
    return value


def _size(node: ir.Node, x: ir.Value, axis: int) -> int:
    size = None if x.shape is None or len(x.shape) != 4 else x.shape[axis]
    if not isinstance(size, int):
        raise _unknown(node)
    return size


def _only(node: ir.Node, **expected: float) -> None:
    for name, value in expected.items():
        if name in node.attributes and node.attributes[name].value != value:
            raise _unknown(node)


def _unknown(node: ir.Node) -> EngineFailure:
    part = node.graph.name if node.graph is not None and node.graph.name else "graph"
    return EngineFailure(
        part, f"{node.op_type} {node.name} has a form this version cannot write out"
    )


_WRITTEN: dict[str, Callable[[Any, ir.Node], ir.Value]] = {
    "Attention": _attention,
    "RMSNormalization": _rms_norm,
    "RotaryEmbedding": _rotary,
}
