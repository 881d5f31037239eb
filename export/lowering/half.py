"""The portable graph computing in float16, over the same weights file.

A float32 initializer gets a Cast behind it, which engines fold while they load or build. Products
(matrix product, convolution, attention) compute in float16 and so does what they meet. In float32 stay:
what does not depend on activations (angles of rotary positions, masks, biases by distance: positions
above 2048 are no float16 numbers), normalisations, the rounding of an int8 cache, and in a T5 the sums
between its layers with the product before them, which overflow.

Quantized weights, tried with TensorRT-RTX 1.7: scales that are a float16 Cast of the float32 initializer
are folded, INT8 products stay INT8 and INT4 weights are read inside the product. Both sides of an INT8
product want scales of one type. A scale in float32 with the Cast behind DequantizeLinear builds too, but
INT4 weights are then dequantized by a kernel of their own; `output_dtype` is refused.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from vlm_edge.export.lowering import masks, rewrite

HALF, FLOAT = ir.DataType.FLOAT16, ir.DataType.FLOAT
LARGEST = float(np.finfo(np.float16).max)
ROUNDING = 2.0**-11  # relative, of float16's numbers from the smallest normal one on
# Keys and values, which go from engine to engine and from step to step, are float16 at the interface too.
KEPT = tuple(
    f"{owner}.{kind}."
    for owner in ("past", "present", "media", "cross")
    for kind in ("key", "value")
)
PRODUCTS = {"Attention", "Conv", "GroupQueryAttention", "MatMul"}
QUANTIZED = {"DequantizeLinear", "QuantizeLinear"}
NORMS = {"LayerNormalization", "RMSNormalization"}  # their sums of squares overflow
ROUNDED = {"Abs", "Div", "Round"}  # what makes an int8 cache: its least scale is no float16 number
WIDE = ".feed_forward.wo."  # of a T5: transformers keeps this product in float32 too


def half(model: ir.Model, norms: ir.DataType = FLOAT) -> int:
    """Make the graph compute in float16, in place.

    Its interface stays as it is but for float32 keys and values (`past.key.0`, `media.value.3`, ...), which
    become float16; an int8 cache and its scales stay.

    Args:
        norms: what normalisations of float16 values compute in; float16 only for an engine whose kernels
            then sum in float32.

    Returns:
        How many operators compute in float16.
    """
    masks.bound(model.graph)
    count = _Half(model.graph, norms).run()
    RemoveUnusedNodesPass()(model)  # constants of which only the float16 ones are read
    return count


class _Half:
    """One graph on its way to float16."""

    def __init__(self, graph: ir.Graph, norms: ir.DataType) -> None:
        self._graph = graph
        self._types: dict[ir.Value, ir.DataType] = {}  # of what is float and not a constant
        self._made: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
        self._exact = ROUNDED | (NORMS if norms == FLOAT else set())
        self._wide = any(WIDE in name for name in graph.initializers)
        self._fine = set(_finely_scaled(graph))

    def run(self) -> int:
        nodes = [node for node in self._graph if node.op_type != "Constant"]
        for value in self._graph.inputs:
            if value.dtype == FLOAT:
                self._set(value, HALF if _kept(value) else FLOAT)
        count = sum([self._node(node) for node in nodes])
        for index, output in enumerate(list(self._graph.outputs)):
            if output in self._types:
                self._output(index, output, HALF if _kept(output) else FLOAT)
        return count

    def _set(self, value: ir.Value, dtype: ir.DataType) -> None:
        self._types[value] = dtype
        value.type = ir.TensorType(dtype)

    def _node(self, node: ir.Node) -> bool:
        """Let the node compute in its type; is that float16?"""
        given = {
            index: value
            for index, value in enumerate(node.inputs)
            if value is not None and value.dtype in (FLOAT, HALF)
        }
        made = [value for value in node.outputs if value.dtype == FLOAT]
        dtype = self._type(node, [self._types[v] for v in given.values() if v in self._types])
        for index, value in given.items():
            node.replace_input_with(index, self._as(value, dtype))
        for value in made:
            self._set(value, dtype)
        return dtype == HALF and bool(given)

    def _type(self, node: ir.Node, states: list[ir.DataType]) -> ir.DataType:
        if node.op_type in self._exact or node in self._fine or _overflows(node):
            return FLOAT
        if node.op_type == "DequantizeLinear" and any(map(_overflows, _readers(node))):
            return FLOAT
        if node.op_type in PRODUCTS | QUANTIZED:
            return HALF
        if self._wide and node.op_type == "Add" and len(states) == 2:
            return FLOAT
        return HALF if HALF in states else FLOAT

    def _as(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """The value in a type; made once."""
        if dtype == self._types.get(value, FLOAT):
            return value
        if (value, dtype) not in self._made:
            constant = ir.convenience.get_const_tensor(value)
            if constant is None or isinstance(constant, ir.ExternalTensor):
                self._made[value, dtype] = self._cast(value, dtype)
            else:
                self._made[value, dtype] = self._rounded(value, constant)
        return self._made[value, dtype]

    def _rounded(self, value: ir.Value, constant: ir.TensorProtocol) -> ir.Value:
        """A constant that lies in the graph's own file, as float16."""
        values = np.clip(constant.numpy(), -LARGEST, LARGEST).astype(np.float16)
        name = f"{value.name}.half"
        return rewrite.initializer(self._graph, name, ir.Tensor(values, name=name))

    def _cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        cast = ir.node("Cast", [value], {"to": dtype}, name=f"{value.name}/Cast")
        rewrite.insert_behind(self._graph, value, cast)
        made = cast.outputs[0]
        made.name, made.shape = f"{value.name}.{dtype.name.lower()}", value.shape
        made.type = ir.TensorType(dtype)
        return made

    def _output(self, index: int, value: ir.Value, dtype: ir.DataType) -> None:
        """The output in a type, under its name."""
        if self._types[value] == dtype:
            return
        name, value.name = value.name, f"{value.name}.inner"
        made = self._as(value, dtype)
        made.name = name
        self._graph.outputs[index] = made


def _kept(value: ir.Value) -> bool:
    return (value.name or "").startswith(KEPT)


def _readers(node: ir.Node) -> list[ir.Node]:
    return [reader for value in node.outputs for reader in value.consumers()]


def _overflows(node: ir.Node) -> bool:
    """Is it the product whose result float16 does not hold?"""
    names = [_weight(value) for value in node.inputs if value is not None]
    return node.op_type == "MatMul" and any(WIDE in name for name in names)


def _weight(value: ir.Value) -> str:
    """The name of the initializer that this is, or is dequantized from."""
    producer = value.producer()
    if producer is not None and producer.op_type == "DequantizeLinear" and producer.inputs[0]:
        value = producer.inputs[0]
    return (value.name or "") if value.is_initializer() else ""


def _finely_scaled(graph: ir.Graph) -> Iterator[ir.Node]:
    """Nodes that quantize or dequantize with scales which float16 would spoil; together with one the
    other side of its product, the pair that makes it, and their other readers: an engine wants one type."""
    for node in graph:
        if node.op_type != "DequantizeLinear" or not _spoiled(node):
            continue
        yield from _one_type(node)


def _spoiled(node: ir.Node) -> bool:
    """Would float16 round the scales of some column worse than it rounds numbers of its normal range?"""
    scale = None if node.inputs[1] is None else ir.convenience.get_const_tensor(node.inputs[1])
    if scale is None:
        return False
    exact = rewrite.values(scale)
    exact = exact.reshape(-1, exact.shape[-1]) if exact.ndim else exact.reshape(1, 1)
    off = np.clip(exact, None, LARGEST).astype(np.float16).astype(np.float32) - exact
    return bool((np.linalg.norm(off, axis=0) > ROUNDING * np.linalg.norm(exact, axis=0)).any())


def _one_type(start: ir.Node) -> set[ir.Node]:
    """All of QUANTIZED that reach `start` by products and shared activations."""
    found, left = set[ir.Node](), [start]
    while left:
        node = left.pop()
        if node in found:
            continue
        found.add(node)
        source = node.inputs[0].producer() if node.inputs[0] is not None else None
        left += [source] if source is not None and source.op_type == "QuantizeLinear" else []
        for reader in _readers(node):
            sides = [value.producer() for value in reader.inputs if value is not None]
            left += [n for n in sides if n is not None and n.op_type == "DequantizeLinear"]
    return found
