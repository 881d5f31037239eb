"""Activation ranges of a graph's linear layers, found by running it in full precision.

The graph itself reduces each layer's input to its largest magnitudes, so the memory needed does not
depend on the size of the activations.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from vlm_edge.errors import CalibrationError

RANGE, CHANNELS = "range.", "channels."
PERCENTILE = 99.99  # of the magnitudes of one picture's activations
STRENGTHS = {"smooth-65": 0.65, "smooth-80": 0.8}  # of the migration, by method


def magnitudes(op: Any, value: ir.Value) -> dict[str, ir.Value]:
    """What calibration keeps of a layer's input [tiles, tokens, channels]: the magnitudes above
    PERCENTILE in falling order (at least one), and each channel's largest."""
    sizes = op.Abs(value)
    flat = op.Reshape(sizes, [-1])
    share = op.Mul(op.Cast(op.Size(flat), to=ir.DataType.FLOAT), 1 - PERCENTILE / 100)
    count = op.Reshape(op.Cast(op.Ceil(share), to=ir.DataType.INT64), [1])
    largest = op.TopK(flat, count, _outputs=2)[0]
    return {RANGE: largest, CHANNELS: op.ReduceMax(sizes, [0, 1], keepdims=0)}


@dataclass
class Ranges:
    """What is known of each layer's input over all pictures, by layer path.

    Attributes:
        minmax: the largest magnitude seen.
        percentile: the largest over pictures of each picture's PERCENTILE, so that one picture
            cannot hide the others and single outliers are clipped.
        channels: float32 [in], each channel's largest magnitude.
    """

    minmax: dict[str, float] = field(default_factory=dict)
    percentile: dict[str, float] = field(default_factory=dict)
    channels: dict[str, np.ndarray] = field(default_factory=dict)

    def add(self, outputs: Mapping[str, np.ndarray]) -> None:
        """Take in one picture's outputs (`magnitudes`, named by kind and path).

        Raises:
            CalibrationError: an activation is not a finite number.
        """
        for name, found in outputs.items():
            kind, path = name[: name.find(".") + 1], name[name.find(".") + 1 :]
            if kind in (RANGE, CHANNELS) and not np.isfinite(found).all():
                raise CalibrationError(f"the input of {path} is not finite in full precision")
            if kind == RANGE:
                self.minmax[path] = max(self.minmax.get(path, 0.0), float(found[0]))
                self.percentile[path] = max(self.percentile.get(path, 0.0), float(found[-1]))
            elif kind == CHANNELS:
                self.channels[path] = np.maximum(self.channels.get(path, 0.0), found)

    def share(self, readers: Mapping[str, str]) -> None:
        """Give layers that read the same input its ranges (`Observer.readers`)."""
        for path, first in readers.items():
            self.minmax[path] = self.minmax[first]
            self.percentile[path] = self.percentile[first]
            self.channels[path] = self.channels[first]


def migration(channels: np.ndarray, weights: np.ndarray, strength: float) -> np.ndarray:
    """SmoothQuant's scales: activations are divided by them and weights multiplied, so that outlying
    channels are easier to quantize (Xiao et al. 2022, arXiv 2211.10438, equation 4).

    Args:
        channels: float32 [in], each input channel's largest magnitude.
        weights: float32 [in], the largest weight that reads it.
        strength: 0 leaves all difficulty to the activations, 1 moves all to the weights.
    """
    scales = np.maximum(channels, 1e-5) ** strength / np.maximum(weights, 1e-5) ** (1 - strength)
    # A channel that is never used, by input or weight, stays as it is.
    return np.where((channels > 0) & (weights > 0), scales, 1.0).astype(np.float32)


@dataclass
class FeatureError:
    """How far quantized features are from full precision, over many tokens.

    Attributes after `add`: `cosine` (mean over tokens), `relative` (root mean square of the
    difference over that of the reference).
    """

    _cosines: list[np.ndarray] = field(default_factory=list)
    _difference: float = 0.0
    _reference: float = 0.0

    def add(self, quantized: np.ndarray, reference: np.ndarray) -> None:
        """Both float32 [tiles, tokens, width]."""
        q = quantized.reshape(-1, quantized.shape[-1]).astype(np.float64)
        r = reference.reshape(q.shape).astype(np.float64)
        norms = np.linalg.norm(q, axis=1) * np.linalg.norm(r, axis=1)
        self._cosines.append((q * r).sum(axis=1) / np.maximum(norms, 1e-30))
        self._difference += float(np.square(q - r).sum())
        self._reference += float(np.square(r).sum())

    @property
    def cosine(self) -> float:
        return float(np.concatenate(self._cosines).mean())

    @property
    def relative(self) -> float:
        return (self._difference / self._reference) ** 0.5 if self._reference else 0.0


def feature_error(pairs: Iterable[tuple[np.ndarray, np.ndarray]]) -> FeatureError:
    """The error over (quantized, reference) pairs."""
    error = FeatureError()
    for quantized, reference in pairs:
        error.add(quantized, reference)
    return error
