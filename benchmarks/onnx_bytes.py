"""Small ONNX models written byte by byte (protobuf): benchmarks run where no onnx package is installed."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

# onnx.proto, TensorProto.DataType and AttributeProto.AttributeType
TYPES = {
    np.dtype(np.float32): 1,
    np.dtype(np.uint8): 2,
    np.dtype(np.int8): 3,
    np.dtype(np.int32): 6,
    np.dtype(np.int64): 7,
}
FLOAT, INT, INTS = 1, 2, 7

Dims = Sequence[int | str]


@dataclass(frozen=True)
class Node:
    kind: str
    inputs: Sequence[str]
    outputs: Sequence[str]
    domain: str = ""
    attributes: Mapping[str, int | float | Sequence[int]] = field(default_factory=dict)

    def encode(self) -> bytes:
        parts = [_text(1, name) for name in self.inputs] + [_text(2, name) for name in self.outputs]
        parts += [_text(4, self.kind), _text(7, self.domain)]
        parts += [_bytes(5, _attribute(name, value)) for name, value in self.attributes.items()]
        return b"".join(parts)


def model(
    nodes: Sequence[Node],
    inputs: Mapping[str, tuple[type, Dims]],
    outputs: Mapping[str, tuple[type, Dims]],
    constants: Mapping[str, np.ndarray],
    domains: Mapping[str, int],
) -> bytes:
    """A ModelProto.

    Args:
        nodes: in the order they run in.
        inputs, outputs: name to numpy type and dimensions, a string where one is symbolic.
        constants: initializers by name.
        domains: operator sets and their versions ("" is ONNX itself).
    """
    graph = b"".join(
        [
            *(_bytes(1, node.encode()) for node in nodes),
            _text(2, "graph"),
            *(_bytes(5, _tensor(name, array)) for name, array in constants.items()),
            *(_bytes(11, _value(name, *kind)) for name, kind in inputs.items()),
            *(_bytes(12, _value(name, *kind)) for name, kind in outputs.items()),
        ]
    )
    sets = (_bytes(8, _text(1, name) + _number(2, version)) for name, version in domains.items())
    return _number(1, 10) + _bytes(7, graph) + b"".join(sets)


def _attribute(name: str, value: int | float | Sequence[int]) -> bytes:
    if isinstance(value, Sequence):
        numbers = b"".join(_number(8, each) for each in value)
        return _text(1, name) + numbers + _number(20, INTS)
    if isinstance(value, float):
        return _text(1, name) + b"\x15" + struct.pack("<f", value) + _number(20, FLOAT)
    return _text(1, name) + _number(3, value) + _number(20, INT)


def _tensor(name: str, array: np.ndarray) -> bytes:
    dims = b"".join(_number(1, size) for size in array.shape)
    return dims + _number(2, TYPES[array.dtype]) + _text(8, name) + _bytes(9, array.tobytes())


def _value(name: str, dtype: type, dims: Dims) -> bytes:
    each = (_text(2, size) if isinstance(size, str) else _number(1, size) for size in dims)
    shape = b"".join(_bytes(1, dim) for dim in each)
    tensor = _number(1, TYPES[np.dtype(dtype)]) + _bytes(2, shape)
    return _text(1, name) + _bytes(2, _bytes(1, tensor))


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes((*out, value))


def _number(tag: int, value: int) -> bytes:
    return _varint(tag << 3) + _varint(value)


def _bytes(tag: int, content: bytes) -> bytes:
    return _varint(tag << 3 | 2) + _varint(len(content)) + content


def _text(tag: int, text: str) -> bytes:
    return _bytes(tag, text.encode())
