"""W8A8 of a language model: INT8 products where one scale for all activations is enough, else blocks.

What INT8 matrix units want (prefill; TensorRT) is one calibrated scale for a layer's input. In Llama-type
models the inputs of query, key, value, gate and up take one once outlying channels are moved into the
weights (SmoothQuant, arXiv 2211.10438, folded into the norm before them), and that of the output
projection takes one as it is. The input of down_proj does not: the first token's can be a thousand times
any other's (massive activations, Sun et al. 2024, arXiv 2402.17762). It keeps float activations and
weights in blocks, as under `int8`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from onnxscript import nn

from vlm_edge.export.checkpoint import TensorRef
from vlm_edge.export.examples import Examples
from vlm_edge.export.judge import Judge, unmet
from vlm_edge.export.layerwise import States, inputs_by_layer
from vlm_edge.export.model import Part
from vlm_edge.export.quantizers.static_int8 import StaticInt8
from vlm_edge.export.quantizers.weight_only import WeightOnly
from vlm_edge.export.static import Progress
from vlm_edge.export.weight_only_int8 import BLOCK, EXAMPLES

STRENGTH = 0.8  # of the migration: weights have finer scales, so most of the difficulty goes there
BUDGET = 0.03  # KL divergence to full precision, nats a token
# Layers with float activations; the next of these where the budget is not met, at last all.
STEPS: tuple[tuple[str, ...], ...] = (
    (".down_proj", ".fc2", ".wo"),
    (".down_proj", ".fc2", ".wo", ".o_proj", ".out_proj", ".o"),
    ("",),
)


class W8A8:
    """Static INT8 for the layers that have a range, blocks of weights for the others.

    Args:
        ranges: as `StaticInt8` takes them; layers that share an input are all in it or none is.
        smoothing: float32 [in] by path, for both kinds.
        columns: as in `WeightOnly`.
    """

    def __init__(
        self,
        ranges: Mapping[str, float],
        smoothing: Mapping[str, np.ndarray],
        columns: bool = False,
    ) -> None:
        static = {path: scales for path, scales in smoothing.items() if path in ranges}
        others = {path: scales for path, scales in smoothing.items() if path not in ranges}
        self._ranges = ranges
        self._static = StaticInt8(ranges, static)
        self._blocks = WeightOnly(8, BLOCK, smoothing=others, columns=columns)

    def product(self, path: str, weight: TensorRef) -> nn.Module:
        quantizer = self._static if path in self._ranges else self._blocks
        return quantizer.product(path, weight)


def write_w8a8(
    name: str,
    part: Part,
    examples: Examples,
    folder: Path,
    scratch: Path,
    progress: Progress,
    budget: float | None = None,
    timed: bool = True,
    columns: bool = False,
) -> dict[str, Any]:
    """Write `<name>.onnx` with as many static layers as the budget allows.

    Args:
        budget: largest KL divergence to full precision, nats a token; None is BUDGET, and then no
            static layer is the nearest to it.
        timed: as elsewhere; nothing is timed here.
        columns: as in `WeightOnly`, of the layers with float activations.

    Returns:
        What the manifest says: KL divergence and top-1 agreement on held-out prompts, the kinds of
        layer with float activations, and what was tried.

    Raises:
        CalibrationError: even without a static layer it is not within `budget`.
    """
    limit = BUDGET if budget is None else budget
    examples = examples.thinned(EXAMPLES)
    states = States(examples, scratch / "states.npy")
    smoothing: dict[str, np.ndarray] = {}
    ranges: dict[str, float] = {}
    for inputs in inputs_by_layer(name, part, examples, states, False, scratch, progress):
        for found in inputs.values():
            factors = found.smoothing(STRENGTH)
            smoothing |= factors
            for path in found.weights:
                ranges[path] = float((found.peaks / factors.get(path, 1)).max())
    judge = Judge.of(name, part, examples, states, scratch)
    tried: list[dict[str, Any]] = []
    for suffixes in STEPS:
        static = {path: peak for path, peak in ranges.items() if not path.endswith(suffixes)}
        figures = judge.write(
            name, part, W8A8(static, smoothing, columns), folder, "w8a8", progress
        )
        tried.append(
            {"float_activations": [s.removeprefix(".") or "all" for s in suffixes], **figures}
        )
        if figures["kl"] <= limit:
            break
    if budget is not None and tried[-1]["kl"] > budget:
        raise unmet(name, budget, tried[-1]["kl"])
    return {
        "method": f"smooth-{STRENGTH * 100:.0f}", "budget_kl": limit, **tried[-1], "tried": tried,
    }  # fmt: skip
