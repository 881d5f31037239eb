"""Activation functions by the names that `hidden_act` has in config.json (transformers' ACT2FN)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir

from vlm_edge.export.config import Config

Activation = Callable[[Any, ir.Value], ir.Value]


def _gelu(op: Any, x: ir.Value) -> ir.Value:
    return op.Gelu(x)


def _gelu_tanh(op: Any, x: ir.Value) -> ir.Value:
    return op.Gelu(x, approximate="tanh")


def _quick_gelu(op: Any, x: ir.Value) -> ir.Value:
    return op.Mul(x, op.Sigmoid(op.Mul(x, 1.702)))


def _silu(op: Any, x: ir.Value) -> ir.Value:
    # Written out: ONNX Runtime fuses x * sigmoid(x), and TensorRT 10.3 has no Swish.
    return op.Mul(x, op.Sigmoid(x))


def _relu(op: Any, x: ir.Value) -> ir.Value:
    return op.Relu(x)


ACTIVATIONS: dict[str, Activation] = {
    "gelu": _gelu,
    "gelu_python": _gelu,
    "gelu_fast": _gelu_tanh,
    "gelu_new": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "quick_gelu": _quick_gelu,
    "relu": _relu,
    "silu": _silu,
    "swish": _silu,
}


def activation(config: Config, key: str, default: str) -> Activation:
    """The function that config key `key` names.

    Raises:
        UnsupportedConfig: a name we do not have.
    """
    return ACTIVATIONS[config.choice(key, default, ACTIVATIONS)]
