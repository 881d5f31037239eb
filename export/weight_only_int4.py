"""INT4 of a language model: GPTQ over scaled inputs, with INT8 where the budget asks for it."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from vlm_edge.calibration import awq, gptq
from vlm_edge.errors import CalibrationError
from vlm_edge.export.examples import Examples
from vlm_edge.export.judge import Judge, unmet
from vlm_edge.export.language_study import TRIES, linear_layers, study
from vlm_edge.export.layerwise import Input, States, inputs_by_layer
from vlm_edge.export.model import Part
from vlm_edge.export.quantizers.rounding import block_size
from vlm_edge.export.quantizers.weight_only import Rounded, WeightOnly
from vlm_edge.export.static import Progress

BITS, BLOCK, BLOCK8 = 4, 32, 128
LOW, HIGH = -8, 7
# KL divergence to full precision, nats a token (perplexity grows by a little more): INT4 is for those
# who want the model small.
BUDGET = 0.035
# Of a model too large to be measured layer by layer: kinds of layers that go to INT8 first (the inputs
# of down_proj and the outputs of v_proj have the largest outliers: SmoothQuant, arXiv 2211.10438).
# In the names of Llama-type models, OPT and T5.
VALUES, DOWN = (".v_proj", ".v"), (".down_proj", ".fc2", ".wo")
ATTENTION = (".o_proj", ".q_proj", ".k_proj", ".out_proj", ".o", ".q", ".k")
STEPS: tuple[tuple[str, ...], ...] = ((*VALUES, *DOWN), (*VALUES, *DOWN, *ATTENTION))


def write_int4(
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
    """Write `<name>.onnx` in INT4 by GPTQ, with as much INT8 as the budget asks for.

    One layer is in memory at a time, and one layer's weights are in `scratch` in float32; the states
    of all prompts are there too. Which layers go to INT8 is measured (`language_study`), if the model
    is small enough, once INT4 throughout has exceeded the budget.

    Args:
        budget: largest KL divergence to full precision, nats a token; None is BUDGET, and then the
            nearest that INT8 everywhere comes to it is taken.
        timed: as in `mixed.study`.
        columns: as in `WeightOnly`.

    Returns:
        What the manifest says: method, KL divergence and top-1 agreement on held-out prompts, how many
        inputs were scaled, the assignments tried, and the layers (`mixed.Study.report`).

    Raises:
        CalibrationError: no assignment is within `budget`.
    """
    limit = BUDGET if budget is None else budget
    states = States(examples, scratch / "states.npy")
    rounded: dict[str, Rounded] = {}
    smoothing: dict[str, np.ndarray] = {}
    for inputs in inputs_by_layer(name, part, examples, states, True, scratch, progress):
        for found in inputs.values():
            _round(found, part.keep8, scratch, rounded, smoothing)
    judge = Judge.of(name, part, examples, states, scratch)
    paths = linear_layers(part) - part.keep8

    def quantizer(int8: frozenset[str]) -> WeightOnly:
        return WeightOnly(
            BITS, BLOCK, part.keep8 | int8, rounded, BLOCK8, smoothing, columns=columns
        )

    tried: list[dict[str, Any]] = []

    @lru_cache(maxsize=1)  # what was written last lies there
    def write(int8: frozenset[str]) -> float:
        figures = judge.write(name, part, quantizer(int8), folder, "int4", progress)
        tried.append({"int8_layers": len(int8 | part.keep8), **figures})
        return figures["kl"]

    studied, int8 = None, frozenset[str]()
    if write(int8) > limit:
        studied = study(
            name, part, examples, lambda: quantizer(frozenset()), scratch, progress, timed
        )
        if studied is None:
            int8 = _by_kind(paths, limit, write)
        else:
            int8 = paths - studied.fit(limit, write, paths, TRIES).quantized
    if budget is not None and tried[-1]["kl"] > budget:
        raise unmet(name, budget, min(step["kl"] for step in tried))
    layers = {} if studied is None else studied.report(paths - int8, "int4", "int8")
    for path in part.keep8 & layers.keys():
        layers[path]["reason"] = "output head"
    return {
        "method": "gptq", "scaled_layers": len(smoothing), "budget_kl": limit, **tried[-1],
        "tried": tried, "layers": layers,
    }  # fmt: skip


def _by_kind(
    paths: frozenset[str], limit: float, write: Callable[[frozenset[str]], float]
) -> frozenset[str]:
    """The layers in INT8 that were written last: all of some kinds."""
    int8 = frozenset[str]()
    for suffixes in STEPS:
        int8 = frozenset(path for path in paths if path.endswith(suffixes))
        if write(int8) <= limit:
            break
    return int8


def _round(
    found: Input,
    keep8: frozenset[str],
    scratch: Path,
    rounded: dict[str, Rounded],
    smoothing: dict[str, np.ndarray],
) -> None:
    """Round the layers that read one input, scaled where the input can be scaled back for nothing."""
    wanted = [path for path in found.weights if path not in keep8]
    if not wanted:
        return
    assert found.gram is not None
    hessian, upper = found.gram, gptq.factor(found.gram)  # query, key and value share it
    weights = {p: np.ascontiguousarray(found.weights[p].numpy().T) for p in wanted}  # [in, out]
    block = block_size(len(hessian), BLOCK)
    scales = None
    if found.smoothable:
        scales = awq.scales(hessian, upper, list(weights.values()), block, LOW, HIGH)
    if scales is not None:
        smoothing |= dict.fromkeys(found.weights, scales)
        hessian, upper = hessian / np.outer(scales, scales), upper * scales
        weights = {path: weight * scales[:, None] for path, weight in weights.items()}

    def choose(rows: np.ndarray, costs: np.ndarray) -> np.ndarray:
        return gptq.weighted_scales(rows, costs, LOW, HIGH)

    for path, weight in weights.items():
        if not np.isfinite(weight).all():
            raise CalibrationError(f"the weight of {path} holds values that are not finite numbers")
        values, steps = gptq.quantize(weight, upper, block, choose, LOW, HIGH)
        values, steps = gptq.refine(weight, hessian, values, steps, LOW, HIGH)
        for kind, array in (("values", values.astype(np.int8)), ("scales", steps)):
            np.save(scratch / f"{path}.{kind}.npy", array)
        files = (scratch / f"{path}.{kind}.npy" for kind in ("values", "scales"))
        rounded[path] = Rounded(*(np.load(file, mmap_mode="r") for file in files))
