"""A language part's calibration one layer at a time, so that memory is one layer's whatever its size.

The states between layers of all examples lie in files. Each layer is a small graph in full precision that
gives the inputs of its linear layers and the next states.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import onnx_ir as ir

from vlm_edge.calibration.ranges import migration
from vlm_edge.errors import CalibrationError
from vlm_edge.export import fold, graphs
from vlm_edge.export.checkpoint import TensorRef
from vlm_edge.export.examples import Arrays, Examples
from vlm_edge.export.model import Part
from vlm_edge.export.quantizers import Observer, Quantizer
from vlm_edge.export.static import Progress
from vlm_edge.export.tensors import column_peaks
from vlm_edge.runtime.ort import open_session

INPUT = "input."
ROWS = 1024  # of an input added to the sums at once


@dataclass
class Input:
    """What calibration knows of one input of linear layers.

    Attributes:
        weights: of the layers that read it, [out, in] by path.
        smoothable: can each channel be divided by a factor at no cost (`export/fold.py`)?
        peaks: float32 [in], each channel's largest magnitude.
        gram: float32 [in, in], the sum of x x^T over all positions; None where it was not asked for.
    """

    weights: dict[str, TensorRef]
    smoothable: bool
    peaks: np.ndarray
    gram: np.ndarray | None
    _rows: list[np.ndarray] = field(default_factory=list)

    def add(self, rows: np.ndarray) -> None:
        """Take in float32 [n, in]."""
        np.maximum(self.peaks, np.abs(rows).max(axis=0), out=self.peaks)
        if self.gram is not None:
            self._rows.append(rows)
            if sum(map(len, self._rows)) >= ROWS:
                self.finish()

    def smoothing(self, strength: float) -> dict[str, np.ndarray]:
        """float32 [in] by path, to divide the input by: a share `strength` of its outliers moves into
        the weights (`calibration.ranges.migration`). Empty where it cannot be divided at no cost."""
        if not self.smoothable:
            return {}
        weights = np.max([column_peaks(weight) for weight in self.weights.values()], axis=0)
        return dict.fromkeys(self.weights, migration(self.peaks, weights, strength))

    def finish(self) -> None:
        """Bring the sum up to date."""
        if self.gram is not None and self._rows:
            x = np.concatenate(self._rows)
            self.gram += x.T @ x
            self._rows.clear()


class States:
    """What lies between two layers, of every example, in files; at first what the part reads. Layers may
    change the width.

    Args:
        path: of the files, each with its example's number before the suffix, float32 [1, n, width].
    """

    def __init__(self, examples: Examples, path: Path) -> None:
        self._paths = list[Path]()
        for index, example in enumerate(examples):
            self._paths.append(path.with_suffix(f".{index}{path.suffix}"))
            self[index] = example.embeds

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, example: int) -> np.ndarray:
        """float32 [1, n, width]"""
        return np.load(self._paths[example])

    def __setitem__(self, example: int, states: np.ndarray) -> None:
        np.save(self._paths[example], states)


def inputs_by_layer(
    name: str,
    part: Part,
    examples: Examples,
    states: States,
    grams: bool,
    scratch: Path,
    progress: Progress,
) -> Iterator[dict[str, Input]]:
    """Layer after layer, the inputs of its linear layers by the path of the first that reads each; at
    last of those behind the layers, unless the part keeps these at 8 bits (`Part.keep8`).

    Args:
        name: of the part.
        states: of the examples; when all layers were run, what `Layers.build_head` takes.
        grams: sum products of channels too.
        scratch: a folder for one layer's weights.

    Raises:
        CalibrationError: an input is not finite.
    """
    layers = part.layers
    assert layers is not None, "language models have layers"
    behind = Observer(lambda op, x: {})
    layers.build_head(behind)
    builds: list[Callable[[Quantizer], ir.Model]]
    builds = [partial(layers.build, index) for index in range(layers.count)]
    if not behind.weights.keys() <= part.keep8:
        builds.append(layers.build_head)
    floats = replace(examples.settings, cache_dtype="float32")  # single layers have no other
    for step, build in enumerate(builds):
        observer = Observer(lambda op, x: {INPUT: op.Identity(x)})
        model = build(observer)
        found = _inputs(observer, grams)
        observer.add_outputs(model)
        run = runner(model, scratch / "layer.onnx")
        for index, example in enumerate(examples):
            results = run(example.feeds(floats, states[index]))
            if step < layers.count:
                states[index] = results["output"]
            for first, kept in found.items() if index < len(examples.used) else ():
                rows = results[INPUT + first]
                if not np.isfinite(rows).all():
                    raise CalibrationError(f"the input of {first} is not finite in full precision")
                kept.add(rows[0])
        for kept in found.values():
            kept.finish()
        progress(f"calibrate {name}", step + 1, len(builds))
        yield found


Run = Callable[[Arrays], dict[str, np.ndarray]]


def runner(model: ir.Model, path: Path, frugal: bool = True) -> Run:
    """Outputs by name of a language part, one of its layers or what follows them, but for its cache. It
    picks what it reads from the inputs it is given.

    Args:
        path: where the graph is written.
        frugal: as in `open_session`.
    """
    graphs.save(model, path)
    return session_runner(path, frugal)


def session_runner(path: Path, frugal: bool) -> Run:
    """As `runner`, of a graph that is written."""
    session = open_session(path, path.stem, None, frugal)
    inputs = [spec.name for spec in session.get_inputs()]
    names = [s.name for s in session.get_outputs() if not s.name.startswith("present.")]

    def run(feeds: Arrays) -> dict[str, np.ndarray]:
        found = session.run(names, {name: feeds[name] for name in inputs})
        return dict(zip(names, found, strict=True))

    return run


def _inputs(observer: Observer, grams: bool) -> dict[str, Input]:
    """Nothing seen yet."""
    found = {}
    for first, kept in observer.observed.items():
        paths = [path for path, reader in observer.readers.items() if reader == first]
        weights = {path: observer.weights[path] for path in paths}
        width = observer.weights[first].shape[1]
        value = kept[INPUT].producer()
        assert value is not None and value.inputs[0] is not None  # the Identity's own input
        found[first] = Input(
            weights,
            fold.takes_factors(value.inputs[0]),
            np.zeros(width, np.float32),
            np.zeros((width, width), np.float32) if grams else None,
        )
    return found
