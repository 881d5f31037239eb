"""Where a portable graph attends over a cache, as one value: what each engine's own operator replaces.

The portable form is RotaryEmbedding, TensorScatter into the cache and Attention with a float mask
(`language/llama.py`); engines have operators that do all of it and compute no masked score.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass


@dataclass(frozen=True)
class CachedAttention:
    """One layer's attention with its cache.

    Attributes:
        query, key, value: [batch, s, heads * head_dim] and [batch, s, kv_heads * head_dim] twice, as
            the linear layers give them: not rotated, not split.
        cos, sin: [batch, s, rotated / 2].
        interleaved, rotary_dim: RotaryEmbedding's attributes.
        past, present: keys and values [batch, kv_heads, capacity, head_dim], before and after.
        write_indices: int64 [batch], where the first of the s positions goes.
        mask: name of the mask input it was written with.
        output: [batch, s, heads * head_dim].
    """

    query: ir.Value
    key: ir.Value
    value: ir.Value
    cos: ir.Value
    sin: ir.Value
    interleaved: int
    rotary_dim: int
    past: tuple[ir.Value, ir.Value]
    present: tuple[ir.Value, ir.Value]
    write_indices: ir.Value
    mask: str
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    output: ir.Value


def find(graph: ir.Graph) -> Iterator[CachedAttention]:
    """Every attention over a cache, in order."""
    for node in list(graph):
        if node.op_type != "Attention" or len(node.inputs) < 4:
            continue
        scatters = [_producer(node.inputs[i], "TensorScatter") for i in (1, 2)]
        query = _producer(node.inputs[0], "RotaryEmbedding")
        if query is None or None in scatters:
            continue
        keys, values = (scatter for scatter in scatters if scatter is not None)
        key = _producer(keys.inputs[1], "RotaryEmbedding")
        merged = _merged(node.outputs[0])
        q, k, v = (_unsplit(x) for x in (
            query.inputs[0], key.inputs[0] if key is not None else None, values.inputs[1]
        ))  # fmt: skip
        if key is None or merged is None or q is None or k is None or v is None:
            continue
        past, mask = _value(keys.inputs[0]), _value(node.inputs[3])
        assert past.shape is not None and mask.name is not None
        kv_heads, head_dim = past.shape[1], past.shape[3]
        assert isinstance(kv_heads, int) and isinstance(head_dim, int)
        scale = node.attributes.get_float("scale", head_dim**-0.5)
        yield CachedAttention(
            query=q,
            key=k,
            value=v,
            cos=_value(query.inputs[1]),
            sin=_value(query.inputs[2]),
            interleaved=query.attributes.get_int("interleaved", 0),
            rotary_dim=query.attributes.get_int("rotary_embedding_dim", 0),
            past=(past, _value(values.inputs[0])),
            present=(keys.outputs[0], values.outputs[0]),
            write_indices=_value(keys.inputs[2]),
            mask=mask.name,
            heads=_heads(query),
            kv_heads=kv_heads,
            head_dim=head_dim,
            scale=scale,
            output=merged,
        )


def clean(model: ir.Model) -> None:
    """Drop what a rewriting left unread: nodes, initializers, inputs."""
    RemoveUnusedNodesPass()(model)
    inputs = model.graph.inputs
    for value in [value for value in inputs if not value.uses()]:
        inputs.remove(value)


def take_over(old: ir.Value, new: ir.Value) -> None:
    """`new` stands wherever `old` stood, its name and place among the outputs included."""
    name, shape, kind = old.name, old.shape, old.type
    old.name = f"{name}.replaced"
    new.name, new.shape, new.type = name, shape, kind
    old.replace_all_uses_with(new, replace_graph_outputs=True)


def bias_of(product: ir.Value) -> tuple[ir.Value, ir.Value] | None:
    """The sum with a constant vector that is the product's only reader, and the vector."""
    readers = list(product.consumers())
    if len(readers) != 1 or readers[0].op_type != "Add":
        return None
    for other in readers[0].inputs:
        constant = other is not None and other is not product and other.is_initializer()
        if constant and other.shape is not None and len(other.shape) == 1:
            return readers[0].outputs[0], other
    return None


def _value(value: ir.Value | None) -> ir.Value:
    assert value is not None
    return value


def _producer(value: ir.Value | None, kind: str) -> ir.Node | None:
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == kind else None


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


def _heads(rotary: ir.Node) -> int:
    transpose = _producer(rotary.inputs[0], "Transpose")
    reshape = None if transpose is None else _producer(transpose.inputs[0], "Reshape")
    shape = None if reshape is None else ir.convenience.get_const_tensor(_value(reshape.inputs[1]))
    assert shape is not None, "heads are split by a constant shape"
    return int(shape.numpy()[2])
