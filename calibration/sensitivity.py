"""What each layer adds to the error of a part's output when it alone is quantized.

One session serves every assignment of precisions: each layer has a switch (`export.switched`), so N
layers need N runs and no N graphs.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlm_edge.calibration.divergence import divergence
from vlm_edge.calibration.ranges import feature_error
from vlm_edge.errors import CalibrationError

SWITCH, SHAPE = "switch.", "shape."

Pairs = Iterable[tuple[np.ndarray, np.ndarray]]  # (found, exact) outputs, sample by sample


@dataclass(frozen=True)
class Measure:
    """An error of a part's output.

    Attributes:
        of: the error over pairs of outputs; 0 where all are equal.
        power: errors of single layers, to this power, add up to that of all of them. The additions
            of layers are nearly independent, so squares of a root-mean-square error add; KL
            divergence is itself of second order in what is added.
    """

    of: Callable[[Pairs], float]
    power: int


RELATIVE = Measure(lambda pairs: feature_error(pairs).relative, 2)
KL = Measure(lambda pairs: divergence(pairs).kl, 1)


@dataclass(frozen=True)
class Readout:
    """What counts of a part's outputs.

    Attributes:
        outputs: their names.
        of: from the number of the sample and the outputs by name.
    """

    outputs: Sequence[str]
    of: Callable[[int, Mapping[str, np.ndarray]], np.ndarray]


def single_output(name: str) -> Readout:
    """One output as it is."""
    return Readout((name,), lambda _, outputs: outputs[name])


class Switchboard:
    """A part in one session, each of its layers in full precision or quantized as its switch says.

    Args:
        session: of a graph that `export.switched.write` wrote.
        layers: paths of the layers that have switches.
        feeds: the part's own inputs, one entry a sample.
        readout: whose error counts.
        measure: of that error.

    Attributes:
        shapes: shape of each layer's input in the first sample.
        seconds: one sample in full precision, the quickest: others may have been held up.

    Raises:
        CalibrationError: the part's output in full precision is not finite.
    """

    def __init__(
        self,
        session: Any,
        layers: Collection[str],
        feeds: Sequence[Mapping[str, np.ndarray]],
        readout: Readout,
        measure: Measure,
    ) -> None:
        self._session, self._feeds, self._readout, self._measure = session, feeds, readout, measure
        self._layers = tuple(layers)
        self._known: dict[tuple[frozenset[str], int], float] = {}
        shapes = session.run([SHAPE + path for path in self._layers], self._feed(0, ()))
        self.shapes = {
            path: tuple(int(size) for size in shape)
            for path, shape in zip(self._layers, shapes, strict=True)
        }
        self._exact, times = [], []
        for index in range(len(feeds)):
            begin = time.perf_counter()
            self._exact.append(self._run(index, ()))
            times.append(time.perf_counter() - begin)
        self.seconds = min(times)
        if not all(np.isfinite(exact).all() for exact in self._exact):
            raise CalibrationError(f"{readout.outputs[0]} is not finite in full precision")

    @property
    def samples(self) -> int:
        return len(self._feeds)

    def error(self, quantized: Collection[str], samples: int | None = None) -> float:
        """The error with these layers quantized and no other, over the first `samples` (None: all)."""
        on, count = frozenset(quantized), samples or self.samples
        if (on, count) not in self._known:
            found = ((self._run(index, on), self._exact[index]) for index in range(count))
            self._known[on, count] = self._measure.of(found) if on else 0.0
        return self._known[on, count]

    def _run(self, index: int, on: Collection[str]) -> np.ndarray:
        names = list(self._readout.outputs)
        found = self._session.run(names, self._feed(index, on))
        return self._readout.of(index, dict(zip(names, found, strict=True)))

    def _feed(self, index: int, on: Collection[str]) -> dict[str, np.ndarray]:
        switches = {SWITCH + path: np.array(path in on) for path in self._layers}
        return {**self._feeds[index], **switches}


@dataclass(frozen=True)
class Unit:
    """Layers that were measured together, and the error with only them quantized."""

    paths: tuple[str, ...]
    error: float


def kind(path: str) -> str:
    """What the layers of all blocks have in common: `vision.layers.3.mlp.fc1` -> `mlp.fc1`."""
    return re.split(r"\.\d+\.", path)[-1]


def measure_layers(
    groups: Sequence[Sequence[str]],
    error: Callable[[Collection[str]], float],
    most: int,
    tick: Callable[[int, int], Any] = lambda done, total: None,
) -> list[Unit]:
    """The error of every layer alone, or, where that takes more than `most` measurements, of
    neighbours together: the group that errs most is halved until no measurement is left, so that the
    time goes where the error is.

    Args:
        groups: layers of one kind and shape, in the part's order.
        error: of the part with these layers quantized.
        most: measurements; each group takes one at least.
        tick: told (measurements done, planned).
    """
    layers = [path for group in groups for path in group]
    alone = len(layers) <= most
    first = [(path,) for path in layers] if alone else [tuple(group) for group in groups]
    planned = len(first) if alone else max(most, len(first))
    done = 0

    def measured(paths: tuple[str, ...]) -> Unit:
        nonlocal done
        done += 1
        unit = Unit(paths, error(paths))
        tick(done, planned)
        return unit

    units = [measured(paths) for paths in first]
    while done + 2 <= most:
        whole = max((u for u in units if len(u.paths) > 1), key=lambda u: u.error, default=None)
        if whole is None:
            break
        half = len(whole.paths) // 2
        halves = [measured(whole.paths[:half]), measured(whole.paths[half:])]
        at = units.index(whole)
        units[at : at + 1] = halves
    return units
