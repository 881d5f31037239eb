"""Static INT8 of the vision encoder and the connector: calibrate, quantize, measure, choose.

Pictures go through the runtime's own preprocessing and the float engines in pipeline order, so each
part sees the inputs it will see when it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from vlm_edge.calibration.data import CalibrationSet
from vlm_edge.calibration.ranges import STRENGTHS, Ranges, feature_error, magnitudes, migration
from vlm_edge.errors import SettingError
from vlm_edge.export import fold, graphs
from vlm_edge.export.lowering import cpu
from vlm_edge.export.model import Part
from vlm_edge.export.quantizers import Observer, StaticInt8
from vlm_edge.runtime.images import decode
from vlm_edge.runtime.manifest import ImageSettings
from vlm_edge.runtime.ort import open_session
from vlm_edge.runtime.preprocess import preprocess

Method = Literal["auto", "minmax", "percentile", "smooth-65", "smooth-80"]
Progress = Callable[[str, int, int], Any]
CANDIDATES = ("percentile", "minmax", *STRENGTHS)


def methods(method: str) -> tuple[str, ...]:
    """The range methods to try.

    Raises:
        SettingError: an unknown method.
    """
    if method not in get_args(Method):
        raise SettingError(
            f"calibration method {method!r}; known are {', '.join(get_args(Method))}"
        )
    return CANDIDATES if method == "auto" else (method,)


@dataclass(frozen=True)
class Floats:
    """A part run in full precision over all calibration pictures.

    Attributes:
        inputs, outputs: memory-mapped files [pictures, ...], one row a picture.
        ranges: of the linear layers' inputs, over the pictures that are not held out.
        layers: the linear layers, with their weights.
    """

    inputs: np.ndarray
    outputs: np.ndarray
    ranges: Ranges
    layers: Observer

    def quantizer(self, method: str) -> StaticInt8:
        """INT8 with ranges by `method`."""
        if method not in STRENGTHS:
            return StaticInt8(
                {"minmax": self.ranges.minmax, "percentile": self.ranges.percentile}[method]
            )
        readers: dict[str, list[str]] = {}
        for path, first in self.layers.readers.items():
            readers.setdefault(first, []).append(path)
        smoothing, ranges = {}, {}
        for first, paths in readers.items():
            channels = self.ranges.channels[first]
            weights = np.max([self._column_peaks[path] for path in paths], axis=0)
            scales = migration(channels, weights, STRENGTHS[method])
            for path in paths:
                smoothing[path], ranges[path] = scales, float((channels / scales).max())
        return StaticInt8(ranges, smoothing)

    @cached_property
    def _column_peaks(self) -> dict[str, np.ndarray]:
        """float32 [in] of each layer: the largest weight that reads each input."""
        return {
            path: np.max([np.abs(rows).max(axis=0) for rows in weight.rows()], axis=0)
            for path, weight in self.layers.weights.items()
        }


def pixels(data: CalibrationSet, settings: ImageSettings, scratch: Path) -> np.ndarray:
    """float32 [pictures, 3, height, width] in a mapped file, as the runtime preprocesses them."""
    shape = (len(data.paths), 3, settings.height, settings.width)
    array = np.lib.format.open_memmap(scratch / "pixels.npy", "w+", np.float32, shape)
    for index, path in enumerate(data.paths):
        array[index] = preprocess(decode(path).image, settings)[0]
    return array


def run_float(
    name: str,
    part: Part,
    inputs: np.ndarray,
    data: CalibrationSet,
    scratch: Path,
    progress: Progress,
) -> Floats:
    """Run `part` in full precision over `inputs` [pictures, ...], one picture at a time."""
    observer = Observer(magnitudes)
    model = part.build(observer)
    observer.add_outputs(model)
    path = scratch / f"{name}_float.onnx"
    graphs.save(model, path)
    (source,), (target,) = part.interface.inputs, part.interface.outputs
    ranges, held_out = Ranges(), set(data.held_out)
    outputs: np.ndarray | None = None
    for index, produced in enumerate(_runs(path, name, source.name, inputs)):
        if index not in held_out:
            ranges.add(produced)
        features = produced[target.name]
        if outputs is None:
            outputs = np.lib.format.open_memmap(
                scratch / f"{name}.npy", "w+", np.float32, (len(inputs), *features.shape[1:])
            )
        outputs[index] = features[0]
        progress(f"calibrate {name}", index + 1, len(inputs))
    ranges.share(observer.readers)
    assert outputs is not None  # a calibration set is never empty
    path.with_suffix(".data").unlink(missing_ok=True)
    return Floats(inputs, outputs, ranges, observer)


def write_int8(
    name: str,
    part: Part,
    floats: Floats,
    data: CalibrationSet,
    tried: tuple[str, ...],
    folder: Path,
    progress: Progress,
) -> dict[str, Any]:
    """Write `<name>.onnx` in INT8 with the range method that errs least on the held-out pictures.

    Returns:
        What the manifest says of it: method, cosine and relative error, those of the other methods.
    """
    path = folder / f"{name}.onnx"
    held_out = list(data.held_out)
    measured: dict[str, dict[str, float]] = {}

    def write(method: str) -> Path:
        model = part.build(floats.quantizer(method))
        fold.into_norms(model.graph)
        graphs.save(model, path, lambda done, of: progress(f"write {name} int8", done, of))
        return path.with_name(cpu.lower(path) or path.name)  # no linear layer, nothing to lower

    for method in tried:
        lowered = write(method)
        (source,), (target,) = part.interface.inputs, part.interface.outputs
        runs = _runs(lowered, name, source.name, floats.inputs[held_out])
        error = feature_error(
            (produced[target.name], floats.outputs[index])
            for index, produced in zip(held_out, runs, strict=True)
        )
        measured[method] = {"cosine": error.cosine, "relative_error": error.relative}
    best = min(measured, key=lambda method: measured[method]["relative_error"])
    if best != tried[-1]:
        write(best)
    return {"method": best, **measured[best], "tried": measured}


def _runs(path: Path, name: str, feed: str, inputs: np.ndarray) -> Iterator[dict[str, np.ndarray]]:
    session = open_session(path, name, None, frugal=True)
    names = [output.name for output in session.get_outputs()]
    for row in inputs:
        yield dict(
            zip(names, session.run(names, {feed: np.ascontiguousarray(row)[None]}), strict=True)
        )
