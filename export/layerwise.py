"""A decoder's calibration one layer at a time, so that memory is one layer's whatever the model's size.

The states between layers of all calibration prompts lie in files. Each layer is a small graph in full
precision that gives the inputs of its linear layers and the next states.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import onnx_ir as ir

from vlm_edge.calibration.ranges import migration
from vlm_edge.errors import CalibrationError
from vlm_edge.export import fold, graphs
from vlm_edge.export.checkpoint import TensorRef
from vlm_edge.export.model import Part
from vlm_edge.export.quantizers import Observer
from vlm_edge.export.static import Progress
from vlm_edge.export.tensors import column_peaks
from vlm_edge.runtime.feeds import prefill_feeds
from vlm_edge.runtime.manifest import DecoderSettings
from vlm_edge.runtime.ort import open_session

INPUT = "input."
ROWS = 1024  # of an input added to the sums at once
LAST = 32  # positions of a prompt whose logits are compared


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
    """What lies between two layers, of every prompt, in files; at first the embedded prompts. Layers may
    change the width.

    Args:
        embeds: inputs_embeds float32 [1, n, width] of every prompt.
        path: of the files, each with its prompt's number before the suffix, float32 [1, n, width].
    """

    def __init__(self, embeds: Sequence[np.ndarray], path: Path) -> None:
        self._paths = [path.with_suffix(f".{n}{path.suffix}") for n in range(len(embeds))]
        for index, embed in enumerate(embeds):
            self[index] = embed

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, prompt: int) -> np.ndarray:
        """float32 [1, n, width]"""
        return np.load(self._paths[prompt])

    def __setitem__(self, prompt: int, states: np.ndarray) -> None:
        np.save(self._paths[prompt], states)


def inputs_by_layer(
    part: Part,
    settings: DecoderSettings,
    states: States,
    held_out: Collection[int],
    grams: bool,
    scratch: Path,
    progress: Progress,
) -> Iterator[dict[str, Input]]:
    """Layer after layer, the inputs of its linear layers by the path of the first that reads each.

    Args:
        part: a language model.
        states: of the prompts; when all layers were run, what `Layers.build_head` takes.
        held_out: prompts that are run and not taken in.
        grams: sum products of channels too.
        scratch: a folder for one layer's weights.

    Raises:
        CalibrationError: an input is not finite.
    """
    layers = part.layers
    assert layers is not None, "language models have layers"
    floats = replace(settings, cache_dtype="float32")  # single layers have no other
    for index in range(layers.count):
        observer = Observer(lambda op, x: {INPUT: op.Identity(x)})
        model = layers.build(index, observer)
        found = _inputs(observer, grams)
        observer.add_outputs(model)
        run = runner(model, floats, scratch / "layer.onnx")
        for prompt in range(len(states)):
            results = run(states[prompt])
            states[prompt] = results.pop("output")
            if prompt in held_out:
                continue
            for name, rows in results.items():
                first = name.removeprefix(INPUT)
                if not np.isfinite(rows).all():
                    raise CalibrationError(f"the input of {first} is not finite in full precision")
                found[first].add(rows[0])
        for kept in found.values():
            kept.finish()
        progress("calibrate llm", index + 1, layers.count)
        yield found


def last_positions(count: int) -> np.ndarray:
    """int64: those of a prompt of `count` tokens whose logits are compared."""
    return np.arange(max(0, count - LAST), count)


def runner(
    model: ir.Model, settings: DecoderSettings, path: Path, frugal: bool = True
) -> Callable[..., dict[str, np.ndarray]]:
    """`(states [1, n, width], **feeds) -> outputs by name` of a decoder, one of its layers or its head.

    Args:
        path: where the graph is written.
        frugal: as in `open_session`.
    """
    graphs.save(model, path)
    return session_runner(path, settings, frugal)


def session_runner(
    path: Path, settings: DecoderSettings, frugal: bool
) -> Callable[..., dict[str, np.ndarray]]:
    """As `runner`, of a graph that is written. Caches are not among the outputs."""
    session = open_session(path, "llm", None, frugal)
    inputs = {spec.name for spec in session.get_inputs()}
    names = [s.name for s in session.get_outputs() if not s.name.startswith("present.")]

    def run(states: np.ndarray, **feeds: np.ndarray) -> dict[str, np.ndarray]:
        every = {**prefill_feeds(settings, states), **feeds}
        found = session.run(names, {name: every[name] for name in inputs})
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
