"""Static INT8 of the vision encoder and the connector: calibrate, quantize, measure, choose.

Pictures go through the runtime's own preprocessing and the float engines in pipeline order, so each
part sees the inputs it will see when it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import onnxruntime

from vlm_edge.calibration import cache
from vlm_edge.calibration.data import CalibrationSet, evenly
from vlm_edge.calibration.ranges import (
    STRENGTHS,
    Ranges,
    Statistics,
    feature_error,
    magnitudes,
    migration,
)
from vlm_edge.calibration.sensitivity import RELATIVE, Readout, single_output
from vlm_edge.errors import CalibrationError, SettingError
from vlm_edge.export import fold, graphs, mixed
from vlm_edge.export.lowering import cpu
from vlm_edge.export.model import Part
from vlm_edge.export.parts import ARRANGEMENT
from vlm_edge.export.quantizers import Observer
from vlm_edge.export.quantizers.static_int8 import StaticInt8
from vlm_edge.export.tensors import column_peaks
from vlm_edge.runtime.images import decode
from vlm_edge.runtime.manifest import ImageSettings
from vlm_edge.runtime.ort import open_session
from vlm_edge.runtime.preprocess import preprocess
from vlm_edge.runtime.tiling.plan import Tiler

Method = Literal[
    "auto", "minmax", "average", "percentile", "entropy", "mse", "smooth-65", "smooth-80"
]
Progress = Callable[[str, int, int], Any]
Feed = Mapping[str, np.ndarray]  # a part's inputs, by name
# Relative error of features up to which layers stay in INT8: encoders measured have a cosine above
# 0.999 to full precision with it (errors at right angles to the features: 1 - 0.04 ** 2 / 2).
MAX_ERROR = 0.04
JUDGES = 8  # held-out tiles that assignments of precisions are compared on
# Each candidate costs a graph and a run: the moving average is as good as min-max, entropy errs most.
CANDIDATES = ("percentile", "minmax", "mse", *STRENGTHS)


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
class Feeds:
    """What a part is run on, one tile at a time, or one picture where it takes all tiles of one.

    Attributes:
        name: of the input that has a row a tile.
        rows: [tiles, ...], mapped.
        extras: the part's other inputs of each run, without the axis of tiles; their sizes may differ
            from run to run.
        spans: the rows of each run.
    """

    name: str
    rows: np.ndarray
    extras: Sequence[Feed]
    spans: Sequence[slice]

    def __getitem__(self, run: int) -> dict[str, np.ndarray]:
        own = {self.name: np.ascontiguousarray(self.rows[self.spans[run]])}
        return own | {name: values[None] for name, values in self.extras[run].items()}


@dataclass(frozen=True)
class Floats:
    """A part run in full precision over all calibration pictures.

    Attributes:
        feeds: its inputs.
        outputs: memory-mapped file [runs, ...]; of a part with several outputs [runs, outputs, ...]. A run is
            a tile, or a picture (`Feeds`).
        ranges: of the linear layers' inputs, over the tiles that are not held out.
        layers: the linear layers, with their weights.
    """

    feeds: Feeds
    outputs: np.ndarray
    ranges: Ranges
    layers: Observer

    def quantizer(self, method: str) -> StaticInt8:
        """INT8 with ranges by `method`."""
        if method not in STRENGTHS:
            return StaticInt8(self.ranges.limits[method])
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
        """Of each layer; every migration asks for them."""
        return {path: column_peaks(weight) for path, weight in self.layers.weights.items()}


@dataclass(frozen=True)
class Tiles:
    """Which calibration pictures the rows of an array [tiles, ...] belong to, in order.

    Attributes:
        names: of the pictures' files.
        counts: tiles of each picture.
        pictures_held_out: those that measure the error.
    """

    names: tuple[str, ...]
    counts: tuple[int, ...]
    pictures_held_out: tuple[int, ...]

    @cached_property
    def picture(self) -> np.ndarray:
        """int64 [tiles]: the picture of each."""
        return np.repeat(np.arange(len(self.counts)), self.counts)

    @cached_property
    def held_out(self) -> list[int]:
        """Tiles of the pictures that measure the error."""
        return np.flatnonzero(np.isin(self.picture, self.pictures_held_out)).tolist()

    def of(self, picture: int) -> slice:
        """The rows of one picture."""
        begin = sum(self.counts[:picture])
        return slice(begin, begin + self.counts[picture])

    def runs(self, part: Part) -> Tiles:
        """What the part is run on in turn: the tiles, or the pictures where it takes all tiles of one."""
        return replace(self, counts=(1,) * len(self.counts)) if _together(part) else self

    def spans(self, part: Part) -> list[slice]:
        """The rows of each run."""
        if _together(part):
            return [self.of(picture) for picture in range(len(self.counts))]
        return [slice(row, row + 1) for row in range(sum(self.counts))]


def _together(part: Part) -> bool:
    return ARRANGEMENT in part.interface.inputs


def arrangements(data: CalibrationSet, tiler: Tiler) -> list[Feed]:
    """What such a part reads beside a picture's tiles."""
    return [{ARRANGEMENT.name: np.array(tiler.plan(*size).arrangement)} for size in data.sizes]


def handed_on(part: Part, outputs: np.ndarray, tiles: Tiles) -> tuple[np.ndarray, Tiles]:
    """`Floats.outputs` as the next part's inputs [tiles, ...], and whose they are."""
    if not _together(part):
        return outputs, tiles
    counts = (outputs.shape[1],) * len(tiles.counts)  # room for empty tiles too
    return outputs.reshape(-1, *outputs.shape[2:]), replace(tiles, counts=counts)


def pixels(
    data: CalibrationSet, settings: ImageSettings, tiler: Tiler, scratch: Path
) -> tuple[np.ndarray, Tiles]:
    """float32 [tiles, 3, height, width] of all pictures in a mapped file, as the runtime makes them."""
    plans = [tiler.plan(*size) for size in data.sizes]
    tiles = Tiles(
        tuple(path.name for path in data.paths), tuple(p.tiles for p in plans), data.held_out
    )
    shape = (sum(tiles.counts), 3, settings.height, settings.width)
    array = np.lib.format.open_memmap(scratch / "pixels.npy", "w+", np.float32, shape)
    for index, (path, plan) in enumerate(zip(data.paths, plans, strict=True)):
        array[tiles.of(index)] = preprocess(decode(path).image, settings, plan.sheets)
    return array, tiles


def run_float(
    name: str,
    part: Part,
    inputs: np.ndarray,
    tiles: Tiles,
    scratch: Path,
    progress: Progress,
    extras: Sequence[Feed] | None = None,
) -> Floats:
    """Run `part` in full precision over `inputs` [tiles, ...], run by run (`Feeds`); or take what an
    earlier run of the same graph over the same inputs found (`calibration.cache`).

    Args:
        inputs: of the part's first input.
        extras: its other inputs, as `Feeds` has them; None where it has none. Small: the cache's key
            spells them out.

    Raises:
        CalibrationError: an activation or an output is not a finite number.
    """
    observer = Observer(magnitudes)
    model = part.build(observer)
    observer.add_outputs(model)
    path = scratch / f"{name}_float.onnx"
    weights = path.with_suffix(".data")
    graphs.save(model, path)
    files = {file.name: file for file in (path, weights) if file.is_file()}
    spans, runs = tiles.spans(part), tiles.runs(part)
    feeds = Feeds(part.interface.inputs[0].name, inputs, extras or [{}] * len(spans), spans)
    key = cache.key(
        files,
        inputs,
        extras=[
            {name: values.tolist() for name, values in extra.items()} for extra in feeds.extras
        ],
        held_out=runs.held_out,
        onnxruntime=onnxruntime.__version__,
    )
    kept = cache.load(key)
    if kept is not None:
        progress(f"calibrate {name}", len(spans), len(spans))
        ranges, outputs = kept
    else:
        ranges, outputs = _observe(name, part, path, observer, feeds, runs, progress)
        cache.keep(key, ranges, outputs)
    weights.unlink(missing_ok=True)
    return Floats(feeds, outputs, ranges, observer)


def _observe(
    name: str,
    part: Part,
    path: Path,
    observer: Observer,
    feeds: Feeds,
    tiles: Tiles,
    progress: Progress,
) -> tuple[Ranges, np.ndarray]:
    """The ranges of the graph at `path`, and its outputs in a mapped file beside it."""
    readout, count = _readout(part), len(feeds.spans)
    statistics, held_out = Statistics(), set(tiles.held_out)
    outputs: np.ndarray | None = None
    for index, produced in enumerate(_runs(path, name, (feeds[i] for i in range(count)))):
        if index not in held_out:
            statistics.add(produced)
        features = readout.of(index, produced)
        if not np.isfinite(features).all():
            picture = tiles.names[tiles.picture[index]]
            raise CalibrationError(
                f"the {name} part's output for {picture} is not finite in full precision; the "
                "checkpoint's weights are damaged, or too large for float32"
            )
        if outputs is None:
            outputs = np.lib.format.open_memmap(
                path.with_name(f"{name}.npy"), "w+", np.float32, (count, *features.shape[1:])
            )
        outputs[index] = features[0]
        progress(f"calibrate {name}", index + 1, count)
    assert outputs is not None  # a calibration set is never empty
    return statistics.ranges(observer.readers), outputs


def write_int8(
    name: str,
    part: Part,
    floats: Floats,
    tiles: Tiles,
    tried: tuple[str, ...],
    max_error: float | None,
    folder: Path,
    scratch: Path,
    progress: Progress,
    timed: bool = True,
) -> dict[str, Any]:
    """Write `<name>.onnx` in INT8 with the range method that errs least on the held-out pictures; in
    float the layers that get no faster, and those that the budget has no room for.

    Args:
        max_error: largest relative error of the part's output; None is MAX_ERROR, and then a part
            that no layer can be quantized in is written in full precision.
        timed: as in `mixed.study`.

    Returns:
        What the manifest says of it: method, cosine and relative error, those of the other methods
        with every layer quantized, the budget, and the layers (`mixed.Study.report`).

    Raises:
        CalibrationError: no layer can be quantized within `max_error`.
    """
    path = folder / f"{name}.onnx"
    held_out = tiles.runs(part).held_out
    readout = _readout(part)

    @lru_cache(maxsize=1)  # what was written last lies there
    def write(method: str, exact: frozenset[str]) -> dict[str, float]:
        """The graph with the layers `exact` in float, and its error."""
        quantizer = floats.quantizer(method).keeping(exact, floats.layers.readers)
        model = part.build(quantizer)
        fold.into_norms(model.graph)
        (folder / f"{name}.cpu.onnx").unlink(missing_ok=True)
        graphs.save(model, path, lambda done, of: progress(f"write {name} int8", done, of))
        lowered = path.with_name(cpu.lower(path) or path.name)  # all in float: nothing to lower
        runs = _runs(lowered, name, (floats.feeds[index] for index in held_out))
        error = feature_error(
            (readout.of(index, produced), floats.outputs[index])
            for index, produced in zip(held_out, runs, strict=True)
        )
        return {"cosine": error.cosine, "relative_error": error.relative}

    measured = {method: write(method, frozenset()) for method in tried}
    best = min(measured, key=lambda method: measured[method]["relative_error"])
    layers = frozenset(floats.layers.weights)
    said: dict[str, Any] = {"method": best, "tried": measured}
    budget = MAX_ERROR if max_error is None else max_error
    error = measured[tried[-1]]
    if not layers:
        return {**said, **error, "max_error": budget, "layers": {}}
    study = mixed.study(
        name,
        part.build,
        lambda: floats.quantizer(best),
        [floats.feeds[index] for index in evenly(held_out, JUDGES)],
        readout,
        RELATIVE,
        scratch,
        progress,
        timed=timed,
    )
    choice = study.fit(budget, lambda exact: write(best, exact)["relative_error"])
    if not choice.quantized and choice.least < float("inf") and max_error is not None:
        raise mixed.unmet(name, "--max-error", budget, choice)
    error = write(best, layers - choice.quantized)
    report = study.report(choice.quantized, "int8")
    return {**said, **error, "max_error": budget, "layers": report}


def _readout(part: Part) -> Readout:
    """A part's output [1, ...]; several of one shape (media_kv) as one array [1, outputs, ...], all tiles of
    a picture as [1, tiles, ...]."""
    names = [spec.name for spec in part.interface.outputs]
    if _together(part):
        return Readout(names, lambda _, found: found[names[0]][None])
    if len(names) == 1:
        return single_output(names[0])
    return Readout(names, lambda _, found: np.stack([found[name] for name in names], axis=1))


def _runs(path: Path, name: str, feeds: Iterable[Feed]) -> Iterator[dict[str, np.ndarray]]:
    session = open_session(path, name, None, frugal=True)
    names = [output.name for output in session.get_outputs()]
    for feed in feeds:
        yield dict(zip(names, session.run(names, dict(feed)), strict=True))
