"""Activation ranges of a graph's linear layers, found by running it in full precision.

The graph itself reduces each layer's input to its largest magnitudes and an even sample, both bounded
in size, so the memory needed does not depend on the size of the activations.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from vlm_edge.calibration import histogram
from vlm_edge.calibration.histogram import Histogram
from vlm_edge.errors import CalibrationError

RANGE, CHANNELS, SAMPLE, SIZE = "range.", "channels.", "sample.", "size."
PERCENTILE = 99.99  # of the magnitudes of one picture's activations
SAMPLES = 1 << 17  # values of one picture and layer that the histogram counts at most
MOMENTUM = 0.9  # of the moving average: ten pictures weigh about as much as all before them
METHODS = ("minmax", "average", "percentile", "entropy", "mse")
STRENGTHS = {"smooth-65": 0.65, "smooth-80": 0.8}  # of the migration, by method


def magnitudes(op: Any, value: ir.Value) -> dict[str, ir.Value]:
    """What calibration keeps of a layer's input [tiles, tokens, channels]: the magnitudes above
    PERCENTILE in falling order (at least one, NaN first), each channel's largest, an even sample of
    SAMPLES magnitudes or fewer, and the number of values."""
    width = op.Slice(op.Shape(value), [-1], [1 << 31], [0])
    rows = op.Reshape(op.Abs(value), op.Concat([-1], width, axis=0))  # [tiles * tokens, channels]
    flat = op.Reshape(rows, [-1])
    size = op.Size(flat)
    share = op.Mul(op.Cast(size, to=ir.DataType.FLOAT), 1 - PERCENTILE / 100)
    count = op.Reshape(op.Cast(op.Ceil(share), to=ir.DataType.INT64), [1])
    # 1, or the least of 31, 61, 91, ...: no factor in common with the usual widths, so that every
    # channel has its turn.
    stride = op.Add(op.Mul(op.Div(op.Add(size, 29 * SAMPLES - 1), 30 * SAMPLES), 30), 1)
    return {
        RANGE: op.TopK(flat, count, _outputs=2)[0],
        CHANNELS: op.ReduceMax(rows, [0], keepdims=0),
        SAMPLE: op.Slice(flat, [0], [1 << 62], [0], op.Reshape(stride, [1])),
        SIZE: op.Cast(op.Reshape(size, [1]), to=ir.DataType.FLOAT),
    }


@dataclass(frozen=True)
class Ranges:
    """What is known of each layer's input, by layer path.

    Attributes:
        limits: by method of METHODS, the largest magnitude to represent.
        channels: float32 [in], each channel's largest magnitude.
    """

    limits: Mapping[str, Mapping[str, float]]
    channels: Mapping[str, np.ndarray]


@dataclass
class Statistics:
    """Takes in one picture after the other; bounded memory per layer.

    Attributes:
        minmax: the largest magnitude seen, by layer path.
        average: exponential moving average of the pictures' largest, in their order.
        percentile: the largest over pictures of each picture's PERCENTILE, so that one picture
            cannot hide the others and single outliers are clipped.
        channels: float32 [in], each channel's largest magnitude.
        histograms: of all magnitudes; where a picture was sampled, of its largest and of the sample
            in place of the rest.
    """

    minmax: dict[str, float] = field(default_factory=dict)
    average: dict[str, float] = field(default_factory=dict)
    percentile: dict[str, float] = field(default_factory=dict)
    channels: dict[str, np.ndarray] = field(default_factory=dict)
    histograms: dict[str, Histogram] = field(default_factory=dict)

    def add(self, outputs: Mapping[str, np.ndarray]) -> None:
        """Take in one picture's outputs (`magnitudes`, named by kind and path).

        Raises:
            CalibrationError: an activation is not a finite number.
        """
        for name, largest in outputs.items():
            if not name.startswith(RANGE):
                continue
            path = name.removeprefix(RANGE)
            if not np.isfinite(largest).all():
                raise CalibrationError(f"the input of {path} is not finite in full precision")
            peak = float(largest[0])
            self.minmax[path] = max(self.minmax.get(path, 0.0), peak)
            self.average[path] = MOMENTUM * self.average.get(path, peak) + (1 - MOMENTUM) * peak
            self.percentile[path] = max(self.percentile.get(path, 0.0), float(largest[-1]))
            self.channels[path] = np.maximum(self.channels.get(path, 0.0), outputs[CHANNELS + path])
            counted = self.histograms.setdefault(path, Histogram())
            sample, size = outputs[SAMPLE + path], int(outputs[SIZE + path][0])
            if len(sample) == size:
                counted.add(sample)
            else:
                rest = sample[sample < largest[-1]]
                counted.add(largest)
                counted.add(rest, (size - len(largest)) / max(1, len(rest)))

    def ranges(self, readers: Mapping[str, str]) -> Ranges:
        """The ranges by every method; layers that read the same input share them.

        Args:
            readers: by layer path, the path its input was observed under (`Observer.readers`).
        """
        found: dict[str, dict[str, float]] = {
            "minmax": self.minmax,
            "average": self.average,
            "percentile": self.percentile,
            "entropy": {p: histogram.entropy(h) for p, h in self.histograms.items()},
            "mse": {p: histogram.least_squares(h) for p, h in self.histograms.items()},
        }
        return Ranges(
            {m: {path: found[m][first] for path, first in readers.items()} for m in METHODS},
            {path: self.channels[first] for path, first in readers.items()},
        )


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
