"""LinearInt8 and LinearInt4 for tests: a session with one node, and the same sum in numpy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime

from vlm_edge.runtime import native

FLOAT = ir.TensorType(ir.DataType.FLOAT)
KINDS = {"LinearInt8": 127, "LinearInt4": 7}  # the largest weight; int4 also has -8


@dataclass(frozen=True)
class Layer:
    """weight int8 [k, n] whatever the kind, scale float32 [n] or [k / block, n], bias [n] or None."""

    kind: str
    weight: np.ndarray
    scale: np.ndarray
    bias: np.ndarray | None = None

    @property
    def stored(self) -> np.ndarray:
        if self.kind == "LinearInt8":
            return self.weight
        nibbles = (self.weight & 15).astype(np.uint8)
        return nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)

    def quantized(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Integers [rows, blocks, size] and their scales [rows, blocks], as native/linear.h says."""
        k = len(self.weight)
        count = 1 if self.scale.ndim == 1 else len(self.scale)
        rows = x.reshape(-1, count, k // count)
        largest = np.abs(rows).max(-1, initial=0)
        with np.errstate(all="ignore"):
            inverse = np.float32(127) / largest
        usable = np.isfinite(inverse)
        inverse = np.where(usable, inverse, np.float32(0))
        scale = np.where(usable, largest / np.float32(127), np.float32(0))
        return np.rint(rows * inverse[..., None]), scale

    def expected(self, x: np.ndarray) -> np.ndarray:
        q, scale = self.quantized(x)
        weight = self.weight.reshape(q.shape[1], q.shape[2], -1).astype(np.float64)
        sums = np.einsum("mbk,bkn->mbn", q.astype(np.float64), weight)
        y = (sums * scale[..., None] * self.scale.reshape(q.shape[1], -1)).sum(1)
        y = y if self.bias is None else y + self.bias
        return y.reshape(*x.shape[:-1], self.weight.shape[1]).astype(np.float32)

    def real(self) -> np.ndarray:
        """The weight as real numbers, float64 [k, n]."""
        scale = np.atleast_2d(self.scale).astype(np.float64)
        return self.weight * scale.repeat(len(self.weight) // len(scale), axis=0)


def random_layer(
    rng: np.random.Generator, kind: str, k: int, n: int, block: int | None, bias: bool
) -> Layer:
    top = KINDS[kind]
    shape = (n,) if block is None else (k // block, n)
    return Layer(
        kind,
        rng.integers(-top - (kind == "LinearInt4"), top + 1, (k, n), dtype=np.int8),
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
    kind: str, weight: Any, scale: Any, bias: Any = None, x: tuple[Any, ...] = ("rows", None)
) -> ir.Model:
    """One node over an input x of this shape; weight, scale and bias as stored."""
    given = ir.Value(name="x", type=FLOAT, shape=ir.Shape(x))
    parts = {"weight": weight, "scale": scale, "bias": bias}
    constants = [constant(name, part) for name, part in parts.items() if part is not None]
    y = ir.Value(name="y", type=FLOAT)
    node = ir.Node("vlm_edge", kind, [given, *constants], outputs=[y])
    graph = ir.Graph(
        [given],
        [y],
        nodes=[node],
        initializers=constants,
        opset_imports={"": 21, "vlm_edge": 1},
        name="linear",
    )
    return ir.Model(graph, ir_version=10)


def open_model(source: ir.Model | str, threads: int = 2) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    options.register_custom_ops_library(str(native.library()))
    content = source if isinstance(source, str) else ir.to_proto(source).SerializeToString()
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def open_layer(layer: Layer, threads: int = 2, rank: int = 2) -> Any:
    shape = tuple(f"d{i}" for i in range(rank - 1))
    stored = model(layer.kind, layer.stored, layer.scale, layer.bias, (*shape, len(layer.weight)))
    return open_model(stored, threads)


def run(session: Any, x: np.ndarray) -> np.ndarray:
    return session.run(None, {"x": x})[0]
