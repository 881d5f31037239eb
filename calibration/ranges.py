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

PREFIX = "range."
PERCENTILE = 99.99  # of the magnitudes of one picture's activations


def largest_magnitudes(op: Any, value: ir.Value) -> ir.Value:
    """The magnitudes of `value` that lie above PERCENTILE, in falling order; at least one."""
    flat = op.Reshape(op.Abs(value), [-1])
    share = op.Mul(op.Cast(op.Size(flat), to=ir.DataType.FLOAT), 1 - PERCENTILE / 100)
    count = op.Reshape(op.Cast(op.Ceil(share), to=ir.DataType.INT64), [1])
    return op.TopK(flat, count, _outputs=2)[0]


def add_range_outputs(model: ir.Model, observed: Mapping[str, ir.Value]) -> None:
    """Make each observed value (`largest_magnitudes` by layer path) an output of the graph."""
    for path, largest in observed.items():
        largest.name = PREFIX + path
        largest.type, largest.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(["count"])
        model.graph.outputs.append(largest)


@dataclass
class Ranges:
    """Largest magnitude to represent at each layer's input, by method.

    "minmax": the largest seen at all. "percentile": the largest over pictures of each picture's
    PERCENTILE, so that one picture cannot hide the others and single outliers are clipped.
    """

    minmax: dict[str, float] = field(default_factory=dict)
    percentile: dict[str, float] = field(default_factory=dict)

    def add(self, outputs: Mapping[str, np.ndarray]) -> None:
        """Take in one picture's range outputs.

        Raises:
            CalibrationError: an activation is not a finite number.
        """
        for name, largest in outputs.items():
            if not name.startswith(PREFIX):
                continue
            path = name.removeprefix(PREFIX)
            if not np.isfinite(largest).all():
                raise CalibrationError(f"the input of {path} is not finite in full precision")
            self.minmax[path] = max(self.minmax.get(path, 0.0), float(largest[0]))
            self.percentile[path] = max(self.percentile.get(path, 0.0), float(largest[-1]))

    def share(self, readers: Mapping[str, str]) -> None:
        """Give layers that read the same input its range (`Observer.readers`)."""
        for path, first in readers.items():
            self.minmax[path] = self.minmax[first]
            self.percentile[path] = self.percentile[first]

    def method(self, name: str) -> dict[str, float]:
        return {"minmax": self.minmax, "percentile": self.percentile}[name]


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
