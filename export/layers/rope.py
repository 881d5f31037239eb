"""Rotary position embeddings: inverse frequencies from config.json, cosines and sines in the graph.

Sources: RoFormer (arXiv 2104.09864); the scalings as transformers' modeling_rope_utils defines them
(linear, dynamic NTK, YaRN arXiv 2309.00071, Llama 3). float32 throughout, as the reference.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from vlm_edge.errors import UnsupportedConfig
from vlm_edge.export.config import Config
from vlm_edge.export.tensors import constant

KINDS = ("default", "dynamic", "linear", "llama3", "yarn")


@dataclass(frozen=True)
class Rope:
    """Frequencies of one model.

    Attributes:
        head_dim: rotated width of a head.
        theta: base wavelength.
        inverse: float32 [head_dim / 2].
        scaling: factor on cosines and sines (YaRN).
        dynamic: (factor, trained positions) where the base grows with the sequence, else None.
    """

    head_dim: int
    theta: float
    inverse: np.ndarray
    scaling: float
    dynamic: tuple[float, int] | None
    max_positions: int  # how far positions may go, scaling included

    def __call__(self, op: Any, positions: ir.Value) -> tuple[ir.Value, ir.Value]:
        """positions int64 [batch, s] -> cosines and sines [batch, s, head_dim / 2]."""
        where = op.Unsqueeze(op.Cast(positions, to=ir.DataType.FLOAT), [-1])  # [batch, s, 1]
        inverse = op.initializer(constant(self.inverse), "rope_inverse_frequencies")
        if self.dynamic is not None:
            inverse = self._dynamic(op, positions)
        angles = op.Mul(where, inverse)  # [batch, s, head_dim / 2]
        cos, sin = op.Cos(angles), op.Sin(angles)
        if self.scaling != 1.0:
            cos, sin = op.Mul(cos, self.scaling), op.Mul(sin, self.scaling)
        return cos, sin

    def _dynamic(self, op: Any, positions: ir.Value) -> ir.Value:
        # The base is a function of the longest position of this call, as in the reference.
        assert self.dynamic is not None
        factor, trained = self.dynamic
        last = op.Cast(op.Add(op.ReduceMax(positions, keepdims=0), 1), to=ir.DataType.FLOAT)
        length = op.Max(last, op.Constant(value_float=float(trained)))
        growth = op.Sub(op.Mul(length, factor / trained), factor - 1.0)
        base = op.Mul(op.Pow(growth, self.head_dim / (self.head_dim - 2)), self.theta)
        exponents = np.arange(0, self.head_dim, 2, dtype=np.float32) / np.float32(self.head_dim)
        powers = op.initializer(constant(-exponents), "rope_exponents")
        return op.Pow(base, powers)


def read_rope(config: Config, head_dim: int, max_positions: int, theta: float = 10000.0) -> Rope:
    """From `rope_parameters` (transformers 5) or `rope_theta` + `rope_scaling` (4) of text_config.

    Args:
        theta: base wavelength where the config says none.

    Raises:
        UnsupportedConfig: another kind of RoPE, or a part of the head that is not rotated.
    """
    new, old = config.sub("rope_parameters").values, config.sub("rope_scaling").values
    where = "rope_scaling" if old else "rope_parameters"  # transformers 5 prefers the old key
    values: dict[str, Any] = dict(old or new)
    reach = _reach(values, max_positions)
    take = _Reader(values, config.name(where), max_positions)
    theta = take.number("rope_theta", config.number("rope_theta", theta))
    kind = values.pop("rope_type", None) or values.pop("type", None) or "default"
    values.pop("type", None)
    name = config.name(f"{where}.rope_type")
    if kind not in KINDS:
        raise UnsupportedConfig(name, kind, f"known are {', '.join(KINDS)}")
    for source, value in (
        (f"{where}.partial_rotary_factor", values.pop("partial_rotary_factor", None)),
        ("partial_rotary_factor", config.get("partial_rotary_factor")),
    ):
        if value not in (None, 1, 1.0):
            raise UnsupportedConfig(config.name(source), value, "only whole heads are rotated here")
    if head_dim % 2:
        raise UnsupportedConfig(config.name("head_dim"), head_dim, "RoPE needs an even head size")
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    inverse = (1.0 / np.power(np.float32(theta), exponents)).astype(np.float32)
    scaling, dynamic = 1.0, None
    if kind == "linear":
        inverse = inverse / np.float32(take.number("factor"))
    elif kind == "dynamic":
        dynamic = (take.number("factor"), max_positions)
        values.pop(
            "original_max_position_embeddings", None
        )  # the reference reads max_position_embeddings
    elif kind == "llama3":
        inverse = _llama3(inverse, take)
    elif kind == "yarn":
        inverse, scaling = _yarn(theta, head_dim, take)
    for key, value in values.items():
        if value is not None and value is not False:
            raise UnsupportedConfig(
                config.name(f"{where}.{key}"), value, f"unknown to RoPE type {kind}"
            )
    return Rope(head_dim, theta, inverse.astype(np.float32), float(scaling), dynamic, reach)


def _reach(values: Mapping[str, Any], max_positions: int) -> int:
    """Positions the scaled model is meant for. `max_position_embeddings` says it where it is more
    than what was trained; where it is the trained length, scaling stretches it by its factor."""
    factor, trained = values.get("factor"), values.get("original_max_position_embeddings")
    if not isinstance(factor, (int, float)) or (trained is not None and trained < max_positions):
        return max_positions
    return max(max_positions, int(factor * max_positions))


@dataclass
class _Reader:
    values: dict[str, Any]
    path: str
    max_positions: int

    def number(self, key: str, default: float | None = None) -> float:
        value = self.values.pop(key, None)
        if value is None:
            value = default
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise UnsupportedConfig(f"{self.path}.{key}", value, "it should be a number")
        return float(value)

    def original(self) -> float:
        return self.number("original_max_position_embeddings", self.max_positions)


def _llama3(inverse: np.ndarray, take: _Reader) -> np.ndarray:
    factor, low, high = (take.number(k) for k in ("factor", "low_freq_factor", "high_freq_factor"))
    trained = take.original()
    wavelength = np.float32(2 * math.pi) / inverse
    scaled = np.where(wavelength > trained / low, inverse / np.float32(factor), inverse)
    smooth = (np.float32(trained) / wavelength - np.float32(low)) / np.float32(high - low)
    blended = (1 - smooth) * scaled / np.float32(factor) + smooth * scaled
    medium = (wavelength >= trained / high) & (wavelength <= trained / low)
    return np.where(medium, blended, scaled)


def _yarn(theta: float, dim: int, take: _Reader) -> tuple[np.ndarray, float]:
    trained = take.original()
    factor = take.number("factor", take.max_positions / trained)
    fast, slow = take.number("beta_fast", 32.0), take.number("beta_slow", 1.0)
    mscale, mscale_all = take.number("mscale", 0.0), take.number("mscale_all_dim", 0.0)
    attention = take.number("attention_factor", 0.0)
    truncate = take.values.pop("truncate", None)
    truncate = True if truncate is None else truncate

    def magnitude(scale: float, m: float = 1.0) -> float:
        return 1.0 if scale <= 1 else 0.1 * m * math.log(scale) + 1.0

    if not attention:
        attention = magnitude(factor)
        if mscale and mscale_all:
            attention = magnitude(factor, mscale) / magnitude(factor, mscale_all)

    def correction(rotations: float) -> float:
        return dim * math.log(trained / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = correction(fast or 32.0), correction(slow or 1.0)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # as the reference: no division by zero
    ramp = np.clip(
        (np.arange(dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low), 0, 1
    )
    powers = np.power(np.float32(theta), np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim))
    extrapolated, interpolated = 1.0 / powers, 1.0 / (np.float32(factor) * powers)
    keep = 1 - ramp
    return (interpolated * (1 - keep) + extrapolated * keep).astype(np.float32), attention
