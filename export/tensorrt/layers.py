"""What became of a graph: the layers of a built engine, from the text in which TensorRT lists them.

TensorRT-RTX writes the list into its build log; TensorRT's engine inspector gives the same lines (ONELINE).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import onnx_ir as ir

HEAD = "Layers:"
# TensorRT-RTX says "Datatype: Int8", TensorRT "Format/Datatype: Row major Int8 format".
_DTYPE = re.compile(r"(?:Format/)?Datatype: ([^,}]+)")
_KNOWN = re.compile(
    r"\b(Int8|Int4|Int32|Int64|Half|Float|BFloat16|FP16|FP32|BF16|FP8|FP4|Bool|UInt8)\b"
)
_NODE = re.compile(r"\[ONNX Layer: ([^\]]+)\]")


@dataclass(frozen=True)
class EngineLayer:
    """One line of the list.

    Attributes:
        kind: "gemm", "kgen" (a fused kernel), "correlation" (a convolution), ...
        nodes: names of the graph's nodes that it computes.
        reads, writes: data types of inputs and constants, and of outputs, in TensorRT's words.
    """

    name: str
    kind: str
    nodes: tuple[str, ...]
    reads: tuple[str, ...]
    writes: tuple[str, ...]

    @property
    def int8_product(self) -> bool:
        """Does it multiply INT8 by INT8?"""
        return self.kind == "gemm" and self.reads[:2] == ("Int8", "Int8")


def parse(text: str) -> tuple[EngineLayer, ...]:
    """The layers of a list that begins with HEAD or with the first of them."""
    lines = [line for line in text.split("\n") if line.startswith("Name: ")]
    return tuple(map(_layer, lines))


def promised(graph: ir.Graph) -> frozenset[str]:
    """Names of the nodes that should be INT8 products: both factors are dequantized from INT8, the
    activation and the weight (W8A8)."""
    products = (node for node in graph if node.op_type == "MatMul")
    return frozenset(str(node.name) for node in products if all(map(_from_int8, node.inputs)))


def _from_int8(value: ir.Value | None) -> bool:
    producer = None if value is None else value.producer()
    if producer is None:
        return False
    if producer.op_type == "Cast":  # float16 behind a scale that stays in float32
        return _from_int8(producer.inputs[0])
    if producer.op_type != "DequantizeLinear" or "block_size" in producer.attributes:
        return False
    source = producer.inputs[0]
    if source is None:
        return False
    quantize = source.producer()  # of an activation; a weight has none
    return source.dtype == ir.DataType.INT8 or (
        quantize is not None and quantize.op_type == "QuantizeLinear"
    )


def _layer(line: str) -> EngineLayer:
    name, _, rest = line.removeprefix("Name: ").partition(", LayerType: ")
    before, _, after = rest.partition(", Outputs: [")
    outputs, _, _ = after.partition(", TacticName:")
    return EngineLayer(
        name=name,
        kind=rest.partition(",")[0],
        nodes=tuple(_NODE.findall(rest)),
        reads=_dtypes(before),
        writes=_dtypes(outputs),
    )


def _dtypes(text: str) -> tuple[str, ...]:
    found = (_KNOWN.search(words) for words in _DTYPE.findall(text))
    return tuple(match[1] for match in found if match)
