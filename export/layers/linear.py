"""Linear layers and normalisations over a checkpoint's tensors."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from onnxscript import nn

from vlm_edge.export.checkpoint import TensorRef, Weights
from vlm_edge.export.quantizers import Quantizer
from vlm_edge.export.tensors import float_tensor


def parameter(weights: Weights, name: str, *shape: int) -> nn.Parameter:
    """The checkpoint's tensor `name` of this shape as a float32 graph initializer."""
    return nn.Parameter(shape, data=float_tensor(weights.tensor(name, *shape)))


class TensorLinear(nn.Module):
    """x [..., inputs] -> [..., outputs], stored as the quantizer wants it (torch.nn.Linear).

    Args:
        path: the layer's name, by which calibration knows it.
        weight, bias: [outputs, inputs] and [outputs].
    """

    def __init__(
        self, path: str, weight: TensorRef, bias: TensorRef | None, quantizer: Quantizer
    ) -> None:
        super().__init__()
        self.product = quantizer.product(path, weight)
        self.bias = None if bias is None else nn.Parameter(bias.shape, data=float_tensor(bias))

    def forward(self, op: Any, x: ir.Value) -> ir.Value:
        y = self.product(op, x)
        return y if self.bias is None else op.Add(y, self.bias)


class Linear(TensorLinear):
    """A linear layer whose tensors have the checkpoint's usual names, `weight` and `bias`."""

    def __init__(
        self, weights: Weights, inputs: int, outputs: int, bias: bool, quantizer: Quantizer
    ) -> None:
        super().__init__(
            weights.path,
            weights.tensor("weight", outputs, inputs),
            weights.tensor("bias", outputs) if bias else None,
            quantizer,
        )


class LayerNorm(nn.Module):
    """Layer normalisation over the last axis (torch.nn.LayerNorm)."""

    def __init__(self, weights: Weights, width: int, epsilon: float) -> None:
        super().__init__()
        self.weight = parameter(weights, "weight", width)
        self.bias = parameter(weights, "bias", width)
        self._epsilon = epsilon

    def forward(self, op: Any, x: ir.Value) -> ir.Value:
        return op.LayerNormalization(x, self.weight, self.bias, axis=-1, epsilon=self._epsilon)


class RMSNorm(nn.Module):
    """Root-mean-square normalisation over the last axis (LlamaRMSNorm)."""

    def __init__(self, weights: Weights, width: int, epsilon: float) -> None:
        super().__init__()
        self.weight = parameter(weights, "weight", width)
        self._epsilon = epsilon

    def forward(self, op: Any, x: ir.Value) -> ir.Value:
        return op.RMSNormalization(x, self.weight, axis=-1, epsilon=self._epsilon)
