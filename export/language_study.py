"""What each linear layer of a language model adds to the error of the next token, and the time it saves."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from pathlib import Path

from vlm_edge.calibration.sensitivity import KL, Readout
from vlm_edge.export import mixed
from vlm_edge.export.examples import Examples
from vlm_edge.export.model import Part
from vlm_edge.export.quantizers import Observer, Quantizer
from vlm_edge.export.static import Progress

LARGEST = 1 << 30  # bytes of float32 weights: both forms of every layer are in memory at once
SECONDS = 20  # spent on the errors; a model of 0.1 G parameters has some 150 runs in it
TRIES = 4  # assignments that are written and measured at most
JUDGES = 6  # held-out examples that assignments are compared on


def linear_layers(part: Part) -> frozenset[str]:
    """Paths of the part's linear layers, without running anything."""
    observer = Observer(lambda op, x: {})
    part.build(observer)
    return frozenset(observer.weights)


def study(
    name: str,
    part: Part,
    examples: Examples,
    quantizer: Callable[[], Quantizer],
    scratch: Path,
    progress: Progress,
    timed: bool = True,
) -> mixed.Study | None:
    """Measure every layer by KL divergence (nats a token) on examples that are held out, and its time: in
    a decode step, or of a part without a cache over a whole example.

    Args:
        quantizer: makes the quantizer under study, anew for each graph.
        timed: as in `mixed.study`.

    Returns:
        None where the model is too large to be in memory in both forms.
    """
    layers = Observer(lambda op, x: {})
    inputs = {value.name for value in part.build(layers).graph.inputs}
    if sum(4 * prod(weight.shape) for weight in layers.weights.values()) > LARGEST:
        return None
    every = examples.held_out
    judges = every[:: max(1, len(every) // JUDGES)][:JUDGES]
    feeds = [
        {key: value for key, value in judge.feeds(examples.settings).items() if key in inputs}
        for judge in judges
    ]
    outputs = [o.name for o in part.interface.outputs if not o.name.startswith("present.")]
    read = Readout(outputs, lambda index, found: judges[index].logits(found))
    return mixed.study(
        name, part.build, quantizer, feeds, read, KL, scratch, progress,
        rows=1 if "positions" in inputs else None, frugal=False, seconds=SECONDS, for_size=True,
        timed=timed,
    )  # fmt: skip
