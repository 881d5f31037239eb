"""INT8 weights of a language model: plain or with outlying channels of the inputs moved into them."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from vlm_edge.export.examples import Examples
from vlm_edge.export.judge import Judge, unmet
from vlm_edge.export.language_study import TRIES, study
from vlm_edge.export.layerwise import States, inputs_by_layer
from vlm_edge.export.model import Part
from vlm_edge.export.quantizers.weight_only import WeightOnly
from vlm_edge.export.static import Progress

BLOCK = 128
# KL divergence to full precision, nats a token: INT8 is for those who want the same answers.
BUDGET = 0.02
STRENGTH = 0.65  # of the migration
EXAMPLES = 32  # for calibration; INT8 asks for ranges only


def write_int8(
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
    """Write `<name>.onnx` in INT8, inputs' outlying channels moved into the weights where that errs
    less: engines round activations to int8 too, a scale a block. Layers that the budget has no room
    for, and those that get no faster, stay in float.

    Args:
        budget: largest KL divergence to full precision, nats a token; None is BUDGET.
        timed: as in `mixed.study`.
        columns: as in `WeightOnly`.

    Returns:
        What the manifest says: method, relative errors of the weights, KL divergence and top-1
        agreement on held-out prompts, and the layers (`mixed.Study.report`).

    Raises:
        CalibrationError: no assignment is within `budget`.
    """
    limit = BUDGET if budget is None else budget
    examples = examples.thinned(EXAMPLES)
    states = States(examples, scratch / "states.npy")
    smoothing: dict[str, np.ndarray] = {}
    for inputs in inputs_by_layer(name, part, examples, states, False, scratch, progress):
        for found in inputs.values():
            smoothing |= found.smoothing(STRENGTH)
    judge = Judge.of(name, part, examples, states, scratch)
    candidates = {"nearest": {}, f"smooth-{STRENGTH * 100:.0f}": smoothing}

    def quantized(method: str, exact: frozenset[str] = frozenset()) -> WeightOnly:
        return WeightOnly(8, BLOCK, smoothing=candidates[method], exact=exact, columns=columns)

    @lru_cache(maxsize=1)  # what was written last lies there
    def write(method: str, exact: frozenset[str]) -> dict[str, Any]:
        quantizer = quantized(method, exact)
        figures = judge.write(name, part, quantizer, folder, "int8", progress)
        errors = list(quantizer.errors.values()) or [0.0]
        weights = {"mean": sum(errors) / len(errors), "worst": max(errors)}
        return {"weight_error": weights, **figures}

    tried = {method: write(method, frozenset()) for method in candidates}
    best = min(tried, key=lambda method: tried[method]["kl"])
    studied = study(name, part, examples, lambda: quantized(best), scratch, progress, timed)
    layers, exact = frozenset[str](), frozenset[str]()
    if studied is not None:
        layers = frozenset(studied.times)
        exact = layers - studied.fit(limit, lambda e: write(best, e)["kl"], tries=TRIES).quantized
    said = write(best, exact)
    if budget is not None and (said["kl"] > budget or (layers and exact == layers)):
        raise unmet(name, budget, min(step["kl"] for step in tried.values()))
    report = {} if studied is None else studied.report(layers - exact, "int8")
    return {"method": best, "budget_kl": limit, **said, "tried": tried, "layers": report}
