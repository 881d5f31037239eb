"""The work of a language model, counted from its graph: bytes of a decode step, operations of prefill.

A decode step reads every weight and the keys and values of the context once, so bytes over the copy
rate bound it; prefill multiplies every weight with every token, so operations over the product rate do.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm_edge.runtime.manifest import DecoderSettings

# onnx.proto, TensorProto.DataType: bits of an element; floats take those of the type computed in.
FLOATS = {1, 10, 16}  # float32, float16, bfloat16
BITS = {2: 8, 3: 8, 21: 4, 22: 4}  # uint8, int8, uint4, int4
PASSING = ("Cast", "DequantizeLinear", "Reshape", "Transpose")  # between a weight and its product


@dataclass(frozen=True)
class Weight:
    """A constant matrix that activations are multiplied with.

    Attributes:
        elements: of the matrix.
        bits: of one; None for a float, which has those of the type computed in.
        scales: float numbers beside it.
    """

    elements: int
    bits: int | None
    scales: int


@dataclass(frozen=True)
class Work:
    """What a language model does.

    Attributes:
        step_bytes: that one decode step reads at the given context.
        prefill_flops: multiplications and additions from the prompt to the logits of its last token.
    """

    step_bytes: int
    prefill_flops: int


def work(
    graph: Path, decoder: DecoderSettings, prompt: int, context: int, float_bytes: int
) -> Work:
    """Count a decoder-only model's work from its portable graph.

    Args:
        prompt: tokens that are prefilled.
        context: positions in the cache at a decode step.
        float_bytes: of a float weight, scale, key or value as the engine holds it.

    The query heads are taken to be as wide as the model, which they are in all but a few.
    """
    found = list(weights(graph.read_bytes()))
    bits = sum(w.elements * (w.bits or 8 * float_bytes) + w.scales * 8 * float_bytes for w in found)
    cache = 2 * decoder.layers * decoder.kv_heads * decoder.head_dim * context * float_bytes
    head = decoder.vocab_size * decoder.width  # multiplied with the last token alone
    linear = 2 * prompt * (sum(w.elements for w in found) - head) + 2 * head
    attention = 4 * decoder.layers * decoder.width * (prompt * (prompt + 1) // 2)
    return Work(bits // 8 + cache, linear + attention)


def weights(model: bytes) -> Iterator[Weight]:
    """The constant matrices that MatMul and Gemm read in an ONNX model (protobuf bytes).

    Read field by field: the machine that runs a bundle has no onnx package.
    """
    (graph,) = (value for tag, value in _fields(model) if tag == 7)
    constants, sources, products = {}, {}, []
    for tag, value in _fields(graph):
        if tag == 5:
            name, dtype, elements = _tensor(value)
            constants[name] = (dtype, elements)
        elif tag == 1:
            inputs, outputs, kind = _node(value)
            if kind in PASSING:
                sources[outputs[0]] = (kind, inputs)
            elif kind in ("MatMul", "Gemm"):
                products.append(inputs[1])
    for name in products:
        scales = 0
        while name in sources:
            kind, inputs = sources[name]
            if kind == "DequantizeLinear":
                scale = inputs[1]
                while scale in sources:
                    scale = sources[scale][1][0]
                scales += constants[scale][1] if scale in constants else 0
            name = inputs[0]
        if name in constants:
            dtype, elements = constants[name]
            yield Weight(elements, None if dtype in FLOATS else BITS[dtype], scales)


def _tensor(content: bytes) -> tuple[str, int, int]:
    """Name, type and number of elements of a TensorProto."""
    name, dtype, elements = "", 0, 1
    for tag, value in _fields(content):
        if tag == 1:
            for size in [value] if isinstance(value, int) else _varints(value):
                elements *= size
        elif tag == 2:
            dtype = value
        elif tag == 8:
            name = bytes(value).decode()
    return name, dtype, elements


def _node(content: bytes) -> tuple[list[str], list[str], str]:
    """Inputs, outputs and operator of a NodeProto."""
    inputs, outputs, kind = [], [], ""
    for tag, value in _fields(content):
        if tag == 1:
            inputs.append(bytes(value).decode())
        elif tag == 2:
            outputs.append(bytes(value).decode())
        elif tag == 4:
            kind = bytes(value).decode()
    return inputs, outputs, kind


def _fields(content: bytes | memoryview) -> Iterator[tuple[int, Any]]:
    """Tags and values of a message: int of a number, memoryview of anything with a length."""
    view, at = memoryview(content), 0
    while at < len(view):
        key, at = _varint(view, at)
        if key & 7 == 0:
            value, at = _varint(view, at)
            yield key >> 3, value
            continue
        size = {1: 8, 5: 4}.get(key & 7)
        if size is None:
            size, at = _varint(view, at)
        yield key >> 3, view[at : at + size]
        at += size


def _varint(view: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = view[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at


def _varints(view: memoryview) -> Iterator[int]:
    at = 0
    while at < len(view):
        value, at = _varint(view, at)
        yield value
