"""Where a portable graph attends over a cache, as one value: what each engine's own operator replaces.

The portable form is RotaryEmbedding (`language/llama.py`) or none (`language/opt.py`), TensorScatter into
the cache (under int8 with its rounding, `layers/cache.py`) and Attention with a float mask; engines have
operators that do all of it and compute no masked score.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir


@dataclass(frozen=True)
class Rotation:
    """How queries and keys are rotated (ONNX's RotaryEmbedding).

    Attributes:
        cos, sin: [batch, s, rotated / 2].
        interleaved, rotary_dim: its attributes.
    """

    cos: ir.Value
    sin: ir.Value
    interleaved: int
    rotary_dim: int


@dataclass(frozen=True)
class CachedAttention:
    """One layer's attention with its cache.

    Attributes:
        query, key, value: [batch, s, heads * head_dim] and [batch, s, kv_heads * head_dim] twice, as
            the linear layers give them: not rotated, not split.
        rotation: of query and key; None: they are not rotated.
        past, present: keys and values [batch, kv_heads, capacity, head_dim], before and after; of an
            int8 cache also their scales [batch, kv_heads, capacity, 1].
        write_indices: int64 [batch], where the first of the s positions goes.
        mask: name of the mask input it was written with.
        output: [batch, s, heads * head_dim].
    """

    query: ir.Value
    key: ir.Value
    value: ir.Value
    rotation: Rotation | None
    past: tuple[ir.Value, ...]
    present: tuple[ir.Value, ...]
    write_indices: ir.Value
    mask: str
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    output: ir.Value

    @property
    def rounded(self) -> bool:
        """Is the cache int8?"""
        return len(self.past) > 2


def find(graph: ir.Graph) -> Iterator[CachedAttention]:
    """Every attention over a cache, in order."""
    for node in list(graph):
        if node.op_type != "Attention" or len(node.inputs) < 4:
            continue
        scatters = [_scatters(node.inputs[i]) for i in (1, 2)]
        if [] in scatters:
            continue
        key, value = (_before_rounding(each[0].inputs[1]) for each in scatters)
        (query, rotation), (key, same) = _unrotated(node.inputs[0]), _unrotated(key)
        merged = _merged(node.outputs[0])
        q, k, v = (_unsplit(x) for x in (query, key, value))
        if merged is None or q is None or k is None or v is None or rotation != same:
            continue
        updates = [scatter for pair in zip(*scatters, strict=True) for scatter in pair]
        past, mask = [_value(scatter.inputs[0]) for scatter in updates], _value(node.inputs[3])
        assert past[0].shape is not None and mask.name is not None
        kv_heads, head_dim = past[0].shape[1], past[0].shape[3]
        assert isinstance(kv_heads, int) and isinstance(head_dim, int)
        scale = node.attributes.get_float("scale", head_dim**-0.5)
        yield CachedAttention(
            query=q,
            key=k,
            value=v,
            rotation=rotation,
            past=tuple(past),
            present=tuple(scatter.outputs[0] for scatter in updates),
            write_indices=_value(updates[0].inputs[2]),
            mask=mask.name,
            heads=_heads(query),
            kv_heads=kv_heads,
            head_dim=head_dim,
            scale=scale,
            output=merged,
        )


def _value(value: ir.Value | None) -> ir.Value:
    assert value is not None
    return value


def _producer(value: ir.Value | None, kind: str) -> ir.Node | None:
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == kind else None


def _unrotated(value: ir.Value | None) -> tuple[ir.Value | None, Rotation | None]:
    """x of RotaryEmbedding(x, cos, sin) and its rotation; anything else as it is."""
    node = _producer(value, "RotaryEmbedding")
    if node is None:
        return value, None
    x, cos, sin = node.inputs[:3]
    interleaved = node.attributes.get_int("interleaved", 0)
    rotary_dim = node.attributes.get_int("rotary_embedding_dim", 0)
    return x, Rotation(_value(cos), _value(sin), interleaved, rotary_dim)


def _scatters(value: ir.Value | None) -> list[ir.Node]:
    """The updates of the cache that keys or values are read from: of the values, and of the scales if
    they are int8."""
    scaled = _producer(value, "Mul")
    cast = None if scaled is None else _producer(scaled.inputs[0], "Cast")
    read = [value] if scaled is None or cast is None else [cast.inputs[0], scaled.inputs[1]]
    found = [_producer(each, "TensorScatter") for each in read]
    return [] if None in found else [scatter for scatter in found if scatter is not None]


def _before_rounding(value: ir.Value | None) -> ir.Value | None:
    """x of int8 round(x / scale); anything else as it is."""
    x = value
    for kind in ("Cast", "Round", "Div"):
        node = _producer(x, kind)
        if node is None:
            return value
        x = node.inputs[0]
    return x


def _unsplit(value: ir.Value | None) -> ir.Value | None:
    """[batch, s, heads * head_dim] from its [batch, heads, s, head_dim]."""
    transpose = _producer(value, "Transpose")
    reshape = None if transpose is None else _producer(transpose.inputs[0], "Reshape")
    return None if reshape is None else reshape.inputs[0]


def _merged(value: ir.Value) -> ir.Value | None:
    """[batch, s, heads * head_dim] made of this [batch, heads, s, head_dim], its only reader."""
    for kind in ("Transpose", "Reshape"):
        readers = list(value.consumers())
        if len(readers) != 1 or readers[0].op_type != kind:
            return None
        value = readers[0].outputs[0]
    return value


def _heads(split: ir.Value | None) -> int:
    """Of a [batch, heads, s, head_dim] that `_unsplit` takes."""
    transpose = _producer(split, "Transpose")
    reshape = None if transpose is None else _producer(transpose.inputs[0], "Reshape")
    shape = None if reshape is None else ir.convenience.get_const_tensor(_value(reshape.inputs[1]))
    assert shape is not None, "heads are split by a constant shape"
    return int(shape.numpy()[2])
