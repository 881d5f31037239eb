"""W8A8: static INT8 of weights and activations, for vision encoders and connectors."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript import nn

from vlm_edge.errors import CalibrationError
from vlm_edge.export.checkpoint import TensorRef
from vlm_edge.export.quantizers.rounding import TINY, channel_scales, int8_columns
from vlm_edge.export.quantizers.smoothing import OncePerInput, Smoothing
from vlm_edge.export.tensors import StreamedTensor, constant


class StaticInt8:
    """W8A8: per-channel int8 weights, one calibrated scale for each layer's input.

    Args:
        ranges: largest magnitude to represent at the input of each layer, by layer path; after the
            division by `smoothing` where there is one.
        smoothing: float32 [in] by layer path: inputs are divided by it, weights multiplied
            (`calibration.ranges.migration`). Layers that share an input share it.
        exact: paths of the layers that stay in float32.
    """

    def __init__(
        self,
        ranges: Mapping[str, float],
        smoothing: Mapping[str, np.ndarray] | None = None,
        exact: Collection[str] = (),
    ) -> None:
        self._ranges, self._exact = ranges, frozenset(exact)
        self._smoothing = Smoothing(smoothing or {})
        self._quantized = OncePerInput()

    def keeping(self, exact: Collection[str], readers: Mapping[str, str]) -> StaticInt8:
        """The same with the layers `exact` in float32.

        An input is smoothed for the sake of its quantized readers: where there is none, nothing is.
        Where there are some, the float layers beside them read the smoothed input too, so that the
        division still goes into the normalisation, which has one output.

        Args:
            readers: for every layer, the layer its input is known by (`Observer.readers`).
        """
        smoothed = {first for path, first in readers.items() if path not in exact}
        factors = self._smoothing.factors.items()
        smoothing = {path: f for path, f in factors if readers[path] in smoothed}
        return StaticInt8(self._ranges, smoothing, exact)

    def product(self, path: str, weight: TensorRef) -> nn.Module:
        if path in self._exact:
            return self._smoothing.float_product(path, weight)
        return _StaticInt8Product(self, path, weight, self._smoothing.factors.get(path))

    def activation(self, op: Any, path: str, x: ir.Value) -> ir.Value:
        """x after its Q/DQ pair; layers that share an input (query, key, value) share the pair."""

        def quantized() -> ir.Value:
            if path not in self._ranges:
                raise CalibrationError(f"no range was calibrated for the input of {path}")
            scale = op.Constant(value_float=float(max(self._ranges[path] / 127, TINY)))
            zero = op.Constant(value=ir.Tensor(np.zeros((), np.int8)))
            smooth = self._smoothing.divide(op, path, x)
            return op.DequantizeLinear(op.QuantizeLinear(smooth, scale, zero), scale, zero)

        return self._quantized.get(op, x, quantized)


class _StaticInt8Product(nn.Module):
    def __init__(
        self, quantizer: StaticInt8, path: str, weight: TensorRef, smoothing: np.ndarray | None
    ) -> None:
        super().__init__("")
        outputs, inputs = weight.shape
        self._quantizer, self._path = quantizer, path
        factors = np.ones(inputs, np.float32) if smoothing is None else smoothing
        scale = channel_scales(weight, factors)
        self.weight = nn.Parameter(
            (inputs, outputs),
            data=StreamedTensor(
                lambda: int8_columns(weight, scale, factors), ir.DataType.INT8, (inputs, outputs)
            ),
        )
        self.weight_scale = nn.Parameter((outputs,), data=constant(scale))

    def forward(self, op: Any, x: ir.Value) -> ir.Value:
        x = self._quantizer.activation(op, self._path, x)
        return op.MatMul(x, op.DequantizeLinear(self.weight, self.weight_scale, axis=1))
