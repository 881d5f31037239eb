"""How a linear layer's weight is stored: the one place where a part's precision changes its graph.

A layer asks its quantizer for the product `x @ weight.T`. Everything is written as standard ONNX,
quantization as symmetric QuantizeLinear/DequantizeLinear with zero-point 0, which each engine fuses
(TensorRT wants exactly this; `lowering/` adapts it where another engine wants it otherwise).
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, Protocol

import onnx_ir as ir
from onnxscript import nn

from vlm_edge.export.checkpoint import TensorRef
from vlm_edge.export.tensors import transposed


class Quantizer(Protocol):
    """Gives a linear layer its product with a stored weight."""

    def product(self, path: str, weight: TensorRef) -> nn.Module:
        """A module `(op, x [..., in]) -> [..., out]` for `weight [out, in]` of layer `path`."""


class FloatProduct(nn.Module):
    """MatMul with the float32 weight."""

    def __init__(self, weight: TensorRef) -> None:
        super().__init__("")
        self.weight = nn.Parameter((weight.shape[1], weight.shape[0]), data=transposed(weight))

    def forward(self, op: Any, x: ir.Value) -> ir.Value:
        return op.MatMul(x, self.weight)


class Float:
    """Full precision."""

    def product(self, path: str, weight: TensorRef) -> nn.Module:
        return FloatProduct(weight)


class Observer:
    """Full precision, noting every linear layer's input so that calibration can read it.

    Args:
        reduce: `(op, value) -> {kind: value}`, what to keep of an input.
        only: paths whose inputs are kept; None keeps all.

    Attributes:
        weights: the weight [out, in] of every layer, by path.
        observed: what was kept of each distinct linear input, by the path of the first layer that
            reads it.
        readers: for every layer's path, the path its input is observed under.
    """

    def __init__(
        self,
        reduce: Callable[[Any, ir.Value], dict[str, ir.Value]],
        only: Collection[str] | None = None,
    ) -> None:
        self.observed: dict[str, dict[str, ir.Value]] = {}
        self.readers: dict[str, str] = {}
        self.weights: dict[str, TensorRef] = {}
        self._reduce, self._only = reduce, only
        self._seen: list[tuple[ir.Value, str]] = []

    def product(self, path: str, weight: TensorRef) -> nn.Module:
        self.weights[path] = weight
        return _Observed(self, path, weight)

    def note(self, op: Any, path: str, x: ir.Value) -> None:
        first = next((known for seen, known in self._seen if seen is x), None)
        if first is None:
            first = path
            self._seen.append((x, path))
            if self._only is None or path in self._only:
                self.observed[path] = self._reduce(op, x)
        self.readers[path] = first

    def add_outputs(self, model: ir.Model) -> None:
        """Make all that was kept an output of the graph, float32, named by kind and path."""
        for path, kept in self.observed.items():
            for kind, value in kept.items():
                value.name = kind + path
                value.type = ir.TensorType(ir.DataType.FLOAT)
                model.graph.outputs.append(value)


class _Observed(FloatProduct):
    def __init__(self, observer: Observer, path: str, weight: TensorRef) -> None:
        super().__init__(weight)
        self._observer, self._path = observer, path

    def forward(self, op: Any, x: ir.Value) -> ir.Value:
        self._observer.note(op, self._path, x)
        return super().forward(op, x)
