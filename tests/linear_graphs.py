"""Linears for tests: a session with one node, and the same sums in numpy."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime

from vlm_edge.runtime import native

FLOAT = ir.TensorType(ir.DataType.FLOAT)
BITS = {8: 127, 4: 7}  # the largest weight; int4 also has -8


@dataclass(frozen=True)
class Layer:
    """weight int8 [k, n] whatever the bits, scale float32 [n] or [k / block, n], bias [n] or None."""

    bits: int
    weight: np.ndarray
    scale: np.ndarray
    bias: np.ndarray | None = None

    @property
    def stored(self) -> np.ndarray:
        if self.bits == 8:
            return self.weight.view(np.uint8)
        nibbles = (self.weight & 15).astype(np.uint8)
        return nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)

    def quantized(self, x: np.ndarray, limit: float = np.inf) -> tuple[np.ndarray, np.ndarray]:
        """Integers [rows, blocks, size] and their scales [rows, blocks], as native/linear.h says."""
        k = len(self.weight)
        count = 1 if self.scale.ndim == 1 else len(self.scale)
        rows = x.reshape(-1, count, k // count)
        largest = np.minimum(np.abs(rows).max(-1, initial=0), np.float32(limit))
        with np.errstate(all="ignore"):
            inverse = np.float32(127) / largest
        usable = np.isfinite(inverse)
        inverse = np.where(usable, inverse, np.float32(0))
        scale = np.where(usable, largest / np.float32(127), np.float32(0))
        return np.rint(np.clip(rows * inverse[..., None], -127, 127)), scale

    def expected(self, x: np.ndarray, limit: float = np.inf) -> np.ndarray:
        q, scale = self.quantized(x, limit)
        weight = self.weight.reshape(q.shape[1], q.shape[2], -1).astype(np.float64)
        sums = np.einsum("mbk,bkn->mbn", q.astype(np.float64), weight)
        y = (sums * scale[..., None] * self.scale.reshape(q.shape[1], -1)).sum(1)
        y = y if self.bias is None else y + self.bias
        return y.reshape(*x.shape[:-1], self.weight.shape[1]).astype(np.float32)

    def real(self) -> np.ndarray:
        """The weight as real numbers, float64 [k, n]."""
        scale = np.atleast_2d(self.scale).astype(np.float64)
        return self.weight * scale.repeat(len(self.weight) // len(scale), axis=0)


def sigmoid(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return 1 / (1 + np.exp(-x))


ACTIVATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {  # of float64
    "": lambda x: x,
    "gelu": lambda x: x * np.vectorize(lambda v: math.erfc(-v / math.sqrt(2)) / 2, [float])(x),
    "gelu_tanh": lambda x: x * sigmoid(math.sqrt(8 / math.pi) * (x + 0.044715 * x**3)),
    "quick_gelu": lambda x: x * sigmoid(1.702 * x),
    "relu": lambda x: np.maximum(x, 0),
}


@dataclass(frozen=True)
class Group:
    """Layers of one input; norm and norm_bias float32 [k], factor float32 [n]; `adds` a residual, which
    is an input of the graph."""

    layers: Sequence[Layer]
    norm: np.ndarray | None = None
    epsilon: float = 1e-5
    gate: str = ""
    adds: bool = False
    norm_bias: np.ndarray | None = None
    activation: str = ""
    factor: np.ndarray | None = None
    clip: float = 0.0

    def expected(self, x: np.ndarray, residual: np.ndarray | None = None) -> list[np.ndarray]:
        if self.norm is not None:
            if self.norm_bias is not None:
                x = x - x.mean(-1, keepdims=True, dtype=np.float64).astype(np.float32)
            mean = np.square(x, dtype=np.float64).mean(-1, keepdims=True)
            factor = (1 / np.sqrt(mean + np.float32(self.epsilon))).astype(np.float32)
            x = x * factor * self.norm
            x = x if self.norm_bias is None else x + self.norm_bias
        y = [layer.expected(x, self.clip or np.inf) for layer in self.layers]
        if self.gate:
            first = y[0].astype(np.float64)
            y = [(first * sigmoid(first) * y[1]).astype(np.float32)]
        if self.activation:
            y = [ACTIVATIONS[self.activation](y[0].astype(np.float64)).astype(np.float32)]
        if self.factor is not None:
            y = [y[0] * self.factor]
        return y if residual is None else [y[0] + residual]


def random_layer(
    rng: np.random.Generator, bits: int, k: int, n: int, block: int | None, bias: bool
) -> Layer:
    top = BITS[bits]
    shape = (n,) if block is None else (k // block, n)
    return Layer(
        bits,
        rng.integers(-top - (bits == 4), top + 1, (k, n), dtype=np.int8),
        rng.uniform(0.5, 2, shape).astype(np.float32),
        rng.standard_normal(n, dtype=np.float32) if bias else None,
    )


def constant(name: str, array: np.ndarray | ir.TensorProtocol) -> ir.Value:
    tensor = ir.tensor(array, name=name) if isinstance(array, np.ndarray) else array
    return ir.Value(
        name=name,
        const_value=tensor,
        type=ir.TensorType(tensor.dtype),
        shape=ir.Shape(tensor.shape),
    )


def model(
    weights: Sequence[tuple[Any, Any, Any]],
    x: tuple[Any, ...] = ("rows", None),
    *,
    bits: Sequence[int] | None = None,
    norm: Any = None,
    norm_bias: Any = None,
    factor: Any = None,
    epsilon: float = 1e-5,
    residual: tuple[Any, ...] | None = None,
    gate: str = "",
    activation: str = "",
    clip: float = 0.0,
    outputs: int | None = None,
) -> ir.Model:
    """One node over an input x of this shape; (weight, scale, bias or None) as stored, times up to three.

    `residual` is the shape of an input of that name; bits are of int8 weights unless given.
    """
    given = [ir.Value(name="x", type=FLOAT, shape=ir.Shape(x))]
    inputs: list[ir.Value | None] = [given[0]]
    constants = []

    def add(name: str, array: Any) -> None:
        inputs.append(None if array is None else constant(name, array))
        constants.extend(inputs[-1:] if array is not None else [])

    for name, array in (("norm", norm), ("norm_bias", norm_bias), ("factor", factor)):
        add(name, array)
    if residual is not None:
        given.append(ir.Value(name="residual", type=FLOAT, shape=ir.Shape(residual)))
    inputs.append(given[1] if residual is not None else None)
    for i, parts in enumerate(weights):
        for name, part in zip(("weight", "scale", "bias"), parts, strict=True):
            add(f"{name}{i}", part)
    bits = [8] * len(weights) if bits is None else bits
    attributes = [ir.AttrInt64s("bits", bits)] if bits else []
    attributes += [ir.AttrFloat32("epsilon", epsilon), ir.AttrString("gate", gate)]
    attributes += [ir.AttrString("activation", activation), ir.AttrFloat32("clip", clip)]
    count = (1 if gate else len(weights)) if outputs is None else outputs
    made = [ir.Value(name=f"y{i}", type=FLOAT) for i in range(count)]
    node = ir.Node("vlm_edge", "Linears", inputs, attributes, outputs=made)
    graph = ir.Graph(
        given,
        made,
        nodes=[node],
        initializers=constants,
        opset_imports={"": 21, "vlm_edge": 1},
        name="linears",
    )
    return ir.Model(graph, ir_version=10)


def open_model(source: ir.Model | str, threads: int = 2) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    options.register_custom_ops_library(str(native.library()))
    content = source if isinstance(source, str) else ir.to_proto(source).SerializeToString()
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def open_group(group: Group, threads: int = 2, rank: int = 2) -> Any:
    first = tuple(f"d{i}" for i in range(rank - 1))
    k, n = group.layers[0].weight.shape
    return open_model(
        model(
            [(layer.stored, layer.scale, layer.bias) for layer in group.layers],
            (*first, k),
            bits=[layer.bits for layer in group.layers],
            norm=group.norm,
            norm_bias=group.norm_bias,
            factor=group.factor,
            epsilon=group.epsilon,
            residual=(*first, n) if group.adds else None,
            gate=group.gate,
            activation=group.activation,
            clip=group.clip,
        ),
        threads,
    )


def open_layer(layer: Layer, threads: int = 2, rank: int = 2) -> Any:
    return open_group(Group([layer]), threads, rank)


def run(session: Any, x: np.ndarray) -> np.ndarray:
    return run_all(session, x)[0]


def run_all(session: Any, x: np.ndarray, residual: np.ndarray | None = None) -> list[np.ndarray]:
    return session.run(None, {"x": x} | ({} if residual is None else {"residual": residual}))
