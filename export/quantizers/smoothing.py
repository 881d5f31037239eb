"""Inputs of layers divided by a vector, their weights multiplied by it (SmoothQuant, arXiv 2211.10438).

Layers that share an input share what is made of it, so the division stands once and `export/fold.py`
can move it into what comes before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript import nn

from vlm_edge.export.checkpoint import TensorRef
from vlm_edge.export.quantizers import FloatProduct
from vlm_edge.export.quantizers.rounding import scaled
from vlm_edge.export.tensors import StreamedTensor, constant


class OncePerInput:
    """What was made of each input, in each (sub)graph: a branch of an `If` does not see what another
    one made."""

    def __init__(self) -> None:
        self._made: list[tuple[ir.Value, ir.Graph, ir.Value]] = []

    def get(self, op: Any, x: ir.Value, make: Callable[[], ir.Value]) -> ir.Value:
        """What was made of `x` in the graph of `op`; by `make` where nothing was yet."""
        graph = op.builder.graph
        for seen, where, value in self._made:
            if seen is x and where is graph:
                return value
        value = make()
        self._made.append((x, graph, value))
        return value


class Smoothing:
    """The factors of a graph's layers, and the inputs that were divided by them.

    Args:
        factors: float32 [in] by layer path (`calibration.ranges.migration`). Layers that share an
            input share them; inputs of layers that have none stay as they are.
    """

    def __init__(self, factors: Mapping[str, np.ndarray]) -> None:
        self.factors = factors
        self._divided = OncePerInput()

    def divide(self, op: Any, path: str, x: ir.Value) -> ir.Value:
        """x [..., in] divided by the factors of `path`, once for all layers that read it."""
        if path not in self.factors:
            return x

        def divided() -> ir.Value:
            factors = op.initializer(constant(1 / self.factors[path]), f"{path}.smooth")
            return op.Mul(x, factors)

        return self._divided.get(op, x, divided)

    def float_product(self, path: str, weight: TensorRef) -> nn.Module:
        """The product in float32 of a layer beside quantized ones that read the same input."""
        factors = self.factors.get(path)
        if factors is None:
            return FloatProduct(weight)
        return _SmoothedProduct(self, path, weight, factors)


class _SmoothedProduct(nn.Module):
    """MatMul in float32 of an input that was divided, with a weight that is multiplied."""

    def __init__(
        self, smoothing: Smoothing, path: str, weight: TensorRef, factors: np.ndarray
    ) -> None:
        super().__init__("")
        self._smoothing, self._path = smoothing, path
        shape = weight.shape[1], weight.shape[0]
        columns = StreamedTensor(lambda: scaled(weight, factors), ir.DataType.FLOAT, shape)
        self.weight = nn.Parameter(shape, data=columns)

    def forward(self, op: Any, x: ir.Value) -> ir.Value:
        return op.MatMul(self._smoothing.divide(op, self._path, x), self.weight)
