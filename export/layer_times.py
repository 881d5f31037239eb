"""How long one linear layer takes on this machine, in full precision and quantized as it will run."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnx_ir as ir

from vlm_edge.export import graphs, lowering
from vlm_edge.export.checkpoint import TensorRef
from vlm_edge.export.graphs import Interface
from vlm_edge.export.layers.linear import TensorLinear
from vlm_edge.export.quantizers import Float, Quantizer
from vlm_edge.runtime.manifest import TensorSpec
from vlm_edge.runtime.ort import kinds, open_session

FASTER = 1.05  # times: a smaller gain is within the noise of the measurement
FEWEST, MOST, SECONDS = 5, 50, 0.2  # pairs of runs: between these numbers, for about so long


@dataclass(frozen=True)
class Shape:
    """Of one call of a linear layer: x [rows, inputs] -> [rows, outputs]."""

    rows: int
    inputs: int
    outputs: int
    bias: bool


@dataclass(frozen=True)
class Times:
    """Milliseconds of one call."""

    exact: float
    quantized: float

    @property
    def faster(self) -> bool:
        """Does quantization save time beyond the noise?"""
        return self.exact > FASTER * self.quantized

    @property
    def saved(self) -> float:
        return self.exact - self.quantized


def measure(shape: Shape, path: str, quantizer: Quantizer, scratch: Path) -> Times:
    """Medians of interleaved runs of a graph with this layer alone, lowered for the CPU.

    A layer that shares its quantized input with others (query, key, value) is charged with the whole
    of that quantization.

    Args:
        path: the layer's name, by which `quantizer` knows it.
    """
    generator = np.random.default_rng(0)
    weight = TensorRef(path, generator.standard_normal((shape.outputs, shape.inputs), np.float32))
    bias = TensorRef(path, np.zeros(shape.outputs, np.float32)) if shape.bias else None
    sessions = [
        open_session(_write(shape, TensorLinear(path, weight, bias, q), scratch / name), path, None)
        for name, q in (("exact.onnx", Float()), ("quantized.onnx", quantizer))
    ]
    feeds = {"x": generator.standard_normal((1, shape.rows, shape.inputs), np.float32)}
    for session in sessions:
        session.run(None, feeds)  # memory is allocated in the first run
    times: list[tuple[float, float]] = []
    begin = time.perf_counter()
    while len(times) < FEWEST or (len(times) < MOST and time.perf_counter() - begin < SECONDS):
        times.append((_seconds(sessions[0], feeds), _seconds(sessions[1], feeds)))
    exact, quantized = (1e3 * median(each) for each in zip(*times, strict=True))
    return Times(exact, quantized)


def _write(shape: Shape, linear: TensorLinear, path: Path) -> Path:
    # Symbolic sizes, as the parts have them: ONNX Runtime fuses otherwise where all are known.
    interface = Interface(
        (TensorSpec("x", "float32", ("batch", "rows", shape.inputs)),),
        (TensorSpec("y", "float32", ("batch", "rows", shape.outputs)),),
    )

    def forward(op: Any, inputs: dict[str, ir.Value]) -> list[ir.Value]:
        return [linear(op, inputs["x"])]

    graphs.save(graphs.build("layer", interface, forward), path)
    lowered = lowering.lower(path, {})
    names = (lowered[kind] for kind in kinds() if kind in lowered)  # as the runtime chooses
    return path.with_name(next(names, path.name))


def _seconds(session: Any, feeds: dict[str, np.ndarray]) -> float:
    begin = time.perf_counter()
    session.run(None, feeds)
    return time.perf_counter() - begin
