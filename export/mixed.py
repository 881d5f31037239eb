"""Which layers of a part are quantized: those that get faster by it, within a budget for the error.

Works for every quantizer, part and error: vision features and their relative error, a language
model's logits and their KL divergence.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from vlm_edge.calibration.sensitivity import (
    Measure,
    Readout,
    Switchboard,
    Unit,
    kind,
    measure_layers,
)
from vlm_edge.errors import CalibrationError
from vlm_edge.export import layer_times, switched
from vlm_edge.export.layer_times import Shape, Times
from vlm_edge.export.quantizers import Quantizer
from vlm_edge.runtime.manifest import Precision
from vlm_edge.runtime.ort import open_session

SECONDS = 60  # spent on the layers of one part; an encoder of 0.3 G parameters has 40 runs in it
SAMPLES = 2  # that a layer's own error is measured on, where time allows; it hardly varies
LITTLE = 1e-6  # milliseconds, of a layer that saves none
NOT_FASTER, BUDGET = "not faster", "budget"  # reasons to stay in float

Tick = Callable[[str, int, int], Any]


@dataclass(frozen=True)
class Choice:
    """An assignment of precisions.

    Attributes:
        quantized: paths of the layers that are quantized.
        error: of the part's output, by its switches; 0 where nothing is quantized.
        least: the error nearest to 0 that was seen with anything quantized; infinite where no layer
            gets faster.
        least_paths: what was quantized then.
    """

    quantized: frozenset[str]
    error: float
    least: float
    least_paths: tuple[str, ...]


@dataclass(frozen=True)
class Study:
    """A part's layers: what each adds to the error, and the time it saves.

    Attributes:
        board: the part with its switches.
        units: every layer, alone or with those it was measured with; of one kind and shape.
        times: of every layer, by path; None where they were not measured, because the engine that will
            run them is elsewhere.
    """

    board: Switchboard
    units: tuple[Unit, ...]
    times: Mapping[str, Times | None]
    power: int
    for_size: bool = False

    def choose(self, budget: float) -> Choice:
        """The assignment of this budget: as few layers in float as it takes, those that add most to
        the error for each millisecond they save, and those that are not faster; where no times are
        known, those that add most to the error."""
        units = [u for u in self.units if self._worth_it(u.paths[0])]
        saved = [max(sum(map(self._saved, u.paths)), LITTLE) for u in units]
        return choose(units, saved, self.board.error, budget, self.power)

    def _worth_it(self, path: str) -> bool:
        times = self.times[path]
        return self.for_size or times is None or times.faster

    def _saved(self, path: str) -> float:
        times = self.times[path]
        return 1.0 if times is None else times.saved

    def fit(
        self,
        budget: float,
        write: Callable[[frozenset[str]], float],
        layers: Collection[str] | None = None,
        tries: int | None = None,
    ) -> Choice:
        """The assignment that meets the budget once it is written.

        The switches, on a few samples, are a little kinder than the graph as it is run: where that is
        over the budget, they are asked for less.

        Args:
            write: writes the part with these layers not quantized; the error of its output.
            layers: that may be quantized; None is all.
            tries: to be written at most; None goes on until nothing is quantized.

        Returns:
            The last one that was written.
        """
        every = frozenset(self.times if layers is None else layers)
        aim, tried = budget, 0
        while True:
            choice = self.choose(aim)
            rest = every - choice.quantized
            error, tried = write(rest), tried + 1
            if error <= budget or rest == every or tried == tries:
                return choice
            aim = min(aim * budget / error, float(np.nextafter(choice.error, 0)))

    def report(
        self, quantized: Collection[str], precision: str, rest: str = "fp32"
    ) -> dict[str, dict[str, Any]]:
        """By layer: `precision` (`rest` where it is not quantized), `error` (of the part's output with
        only this layer quantized), `ms_float`, `ms_quantized` where it was timed; `measured_with`, the
        number of layers that share the error, where it was not measured alone; `reason` of a layer that
        is not quantized."""
        rows: dict[str, dict[str, Any]] = {}
        for unit in self.units:
            for path in unit.paths:
                times = self.times[path]
                rows[path] = {
                    "precision": precision if path in quantized else rest,
                    "error": _short(unit.error),
                }
                if times is not None:
                    rows[path]["ms_float"] = _short(times.exact)
                    rows[path]["ms_quantized"] = _short(times.quantized)
                if len(unit.paths) > 1:
                    rows[path]["measured_with"] = len(unit.paths)
                if path not in quantized:
                    rows[path]["reason"] = BUDGET if self._worth_it(path) else NOT_FASTER
        return {path: rows[path] for path in self.times}  # in the part's order


def study(
    name: str,
    build: Callable[[Quantizer], ir.Model],
    quantizer: Callable[[], Quantizer],
    feeds: Sequence[Mapping[str, np.ndarray]],
    readout: Readout,
    measure: Measure,
    scratch: Path,
    tick: Tick,
    rows: int | None = None,
    frugal: bool = True,
    seconds: float | None = None,
    for_size: bool = False,
    timed: bool = True,
) -> Study:
    """Measure every linear layer of a part.

    Args:
        name: of the part, for progress and errors.
        build: the part's graph by a quantizer (`Part.build`).
        quantizer: makes the quantizer under study, anew for each graph.
        feeds: the part's inputs, one entry a sample; all of them judge an assignment.
        readout: whose error counts.
        measure: of that error.
        scratch: folder for the graphs.
        rows: of the calls that are timed; None: as many as in the first sample.
        frugal: leave the weights in their mapped file. Not for weight-only quantization: unpacked,
            its kernels keep activations in float, and packed they round them.
        seconds: to be spent on the errors of layers; None is SECONDS.
        for_size: as in `Study`.
        timed: measure what each layer takes on this machine.
    """
    path = scratch / f"{name}_switched.onnx"
    graph = switched.write(build, quantizer(), path)
    layers = tuple(graph.weights)
    board = Switchboard(open_session(path, name, None, frugal), layers, feeds, readout, measure)
    shapes = {}
    for layer in layers:
        outputs, inputs = graph.weights[layer].shape
        count = rows or prod(board.shapes[layer][:-1])
        shapes[layer] = Shape(count, inputs, outputs, graph.has_bias(layer))
    groups: dict[tuple[str, Shape], list[str]] = {}
    for layer in layers:
        groups.setdefault((kind(layer), shapes[layer]), []).append(layer)
    example = {shape: layer for layer, shape in shapes.items()}
    times: dict[Shape, Times] = {}
    for done, (shape, layer) in enumerate(example.items() if timed else ()):
        times[shape] = layer_times.measure(shape, layer, quantizer(), scratch)
        tick(f"time {name} layers", done + 1, len(example))
    limit = SECONDS if seconds is None else seconds
    samples = min(SAMPLES, board.samples)
    if len(layers) * samples * board.seconds > limit:
        samples = 1
    units = measure_layers(
        list(groups.values()),
        lambda paths: board.error(paths, samples),
        int(limit / (samples * board.seconds)),
        lambda done, total: tick(f"sensitivity of {name}", done, total),
    )
    by_layer = {layer: times.get(shapes[layer]) for layer in layers}
    return Study(board, tuple(units), by_layer, measure.power, for_size)


def choose(
    units: Sequence[Unit],
    saved: Sequence[float],
    error: Callable[[Collection[str]], float],
    budget: float,
    power: int,
) -> Choice:
    """The smallest number of units in float, taken in falling order of error per millisecond, that
    keeps the error within `budget`.

    The sum of the units' errors says where to look, `error` decides. Where the error falls with every
    unit in float, a larger budget never leaves more of them there.

    Args:
        units: layers that get faster.
        saved: milliseconds that each unit saves.
        error: of the part's output with these layers quantized.
        power: errors to this power add up (`sensitivity.Measure`).
    """
    ranked = sorted(
        zip(units, saved, strict=True),
        key=lambda pair: pair[0].error ** power / pair[1],
        reverse=True,
    )
    order = [unit for unit, _ in ranked]
    rest = [0.0]  # what the units from this one on add up to
    for unit in reversed(order):
        rest.insert(0, rest[0] + unit.error**power)

    def quantized(first: int) -> frozenset[str]:
        return frozenset(path for unit in order[first:] for path in unit.paths)

    def expected(failed: int) -> int:
        """Where the budget should be met, from the error measured at `failed`."""
        scale = error(quantized(failed)) ** power / rest[failed] if rest[failed] else 1.0
        meets = (i for i in range(failed + 1, len(order)) if scale * rest[i] <= budget**power)
        return next(meets, len(order))

    count = len(order)
    if not count:
        return Choice(frozenset(), 0.0, float("inf"), ())
    if error(quantized(0)) <= budget:
        return _choice(quantized(0), error)
    over, within = 0, count  # in float: too few, enough
    guess, step = expected(0), 1
    while within - over > 1:
        middle = guess if over < guess < within else (over + within) // 2
        if error(quantized(middle)) <= budget:
            within, guess = middle, middle - step
        else:
            over, guess = middle, max(expected(middle), middle + step)
        step *= 2  # a wrong sum costs few tries
    if within < count:
        return _choice(quantized(within), error)
    gentlest = min(order, key=lambda unit: unit.error)
    alone = frozenset(gentlest.paths)
    if error(alone) <= budget:
        return _choice(alone, error)
    return Choice(frozenset(), 0.0, error(alone), gentlest.paths)


def _choice(quantized: frozenset[str], error: Callable[[Collection[str]], float]) -> Choice:
    found = error(quantized)
    return Choice(quantized, found, found, tuple(sorted(quantized)))


def unmet(part: str, option: str, budget: float, choice: Choice) -> CalibrationError:
    """The sentence for a budget within which no layer can be quantized."""
    names = choice.least_paths
    what = names[0] if len(names) == 1 else f"{len(names)} layers such as {names[0]}"
    return CalibrationError(
        f"no layer of {part} can be quantized within {option} {budget:g}: the least error is "
        f"{choice.least:.3g}, with {what} alone; raise {option}, or keep the part in full precision "
        f"with --precision {part}=fp32"
    )


def precision_of(layers: Mapping[str, Mapping[str, Any]]) -> Precision:
    """A part's precision from its report: the one of fewest bits among its layers."""
    found = {row["precision"] for row in layers.values()}
    return "int4" if "int4" in found else "int8" if "int8" in found else "fp32"


def _short(value: float) -> float:
    return float(f"{value:.3g}")
