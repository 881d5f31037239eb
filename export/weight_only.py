"""INT8 and INT4 of a language model: calibrated on pictures and texts, measured, mixed.

Prompts go through the runtime's own template and splice, pictures through the float vision encoder
and connector, so the language model is rounded for the inputs it will see: visual tokens too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vlm_edge.calibration import awq, gptq
from vlm_edge.calibration.data import CalibrationSet
from vlm_edge.calibration.ranges import migration
from vlm_edge.errors import CalibrationError, PromptError
from vlm_edge.export import fold, graphs, mixed
from vlm_edge.export.checkpoint import TensorRef
from vlm_edge.export.language_study import study
from vlm_edge.export.layerwise import Input, States, inputs_by_layer, runner, session_runner
from vlm_edge.export.model import Model, Part
from vlm_edge.export.prompt_files import PromptFiles
from vlm_edge.export.quantizers import (
    Float,
    Observer,
    Quantizer,
    Rounded,
    WeightOnly,
    block_size,
)
from vlm_edge.export.static import Progress
from vlm_edge.runtime.manifest import DecoderSettings
from vlm_edge.runtime.prompt import build_prompt
from vlm_edge.runtime.splice import splice
from vlm_edge.runtime.template import ChatTemplate
from vlm_edge.runtime.tokenizer import Tokenizer

BITS, BLOCK, BLOCK8 = 4, 32, 128
LOW, HIGH = -8, 7
LAST = 32  # positions of a prompt whose logits are compared
# KL divergence to full precision, nats a token: perplexity grows by a little more. INT8 is for those
# who want the same answers, INT4 for those who want it small.
BUDGET, BUDGET8 = 0.035, 0.02
# Of a model too large to be measured layer by layer: kinds of layers that go to INT8 first (the inputs
# of down_proj and the outputs of v_proj have the largest outliers: SmoothQuant, arXiv 2211.10438).
STEPS: tuple[tuple[str, ...], ...] = (
    (".v_proj", ".down_proj"),
    (".v_proj", ".down_proj", ".o_proj", ".q_proj", ".k_proj"),
)
TRIES = 4  # assignments written and measured after the first
STRENGTH = 0.65  # of the migration under INT8
PROMPTS8 = 32  # calibration prompts that INT8 needs: it asks for ranges only


def embedded_prompts(
    model: Model, files: PromptFiles, tokenizer: Path, data: CalibrationSet, features: np.ndarray
) -> list[np.ndarray]:
    """inputs_embeds float32 [1, n, width] of every calibration prompt, as the runtime makes them.

    Args:
        tokenizer: the bundle's tokenizer.json.
        features: image_features of every picture, [pictures, tokens, width].
    """
    core = Tokenizer(tokenizer)
    template = None
    if files.chat_template is not None:
        template = ChatTemplate(files.chat_template, model.prompt.special_tokens)
    table = _Rows(model.embeddings)
    embeds = []
    for prompt in data.prompts:
        images = [data.paths[index] for index in prompt.pictures]
        text, use = prompt.text, template is not None
        if not use and images:
            text = f"{model.prompt.image_token}\n" * len(images) + text
        try:
            built = build_prompt(text, images, model.prompt, core, template, use_template=use)
        except PromptError as error:
            raise CalibrationError(f"calibration prompt {prompt.text!r}: {error}") from error
        ids = np.asarray(built.token_ids, np.int64)
        parts = [features[index] for index in prompt.pictures]
        embeds.append(splice(ids, model.prompt.image_token_id, table, parts))
    return embeds


@dataclass(frozen=True)
class _Rows:
    """The checkpoint's token table as the runtime's `Embeddings`."""

    table: TensorRef

    def rows(self, ids: np.ndarray) -> np.ndarray:
        return np.asarray(self.table.view[ids], dtype=np.float32)


def write_int4(
    name: str,
    part: Part,
    settings: DecoderSettings,
    embeds: Sequence[np.ndarray],
    data: CalibrationSet,
    folder: Path,
    scratch: Path,
    progress: Progress,
    budget: float | None = None,
) -> dict[str, Any]:
    """Write `<name>.onnx` in INT4 by GPTQ, with as much INT8 as the budget asks for.

    One layer is in memory at a time, and one layer's weights are in `scratch` in float32; the states
    of all prompts are there too. Which layers go to INT8 is measured (`language_study`), if the model
    is small enough, once INT4 throughout has exceeded the budget.

    Args:
        budget: largest KL divergence to full precision, nats a token; None is BUDGET, and then the
            nearest that INT8 everywhere comes to it is taken.

    Returns:
        What the manifest says: method, KL divergence and top-1 agreement on held-out prompts, how many
        inputs were scaled, the assignments tried, and the layers (`mixed.Study.report`).

    Raises:
        CalibrationError: no assignment is within `budget`.
    """
    limit = BUDGET if budget is None else budget
    states = States(embeds, scratch / "states.npy")
    rounded: dict[str, Rounded] = {}
    smoothing: dict[str, np.ndarray] = {}
    held_out = data.held_out_prompts
    for inputs in calibrated_layers(part, settings, states, held_out, True, scratch, progress):
        for found in inputs.values():
            _round(found, part.keep8, scratch, rounded, smoothing)
    judge = Judge.of(part, settings, embeds, states, held_out, scratch)
    paths = frozenset(_paths(part)) - part.keep8

    def quantizer(int8: frozenset[str]) -> WeightOnly:
        return WeightOnly(BITS, BLOCK, part.keep8 | int8, rounded, BLOCK8, smoothing)

    tried: list[dict[str, Any]] = []

    def write(int8: frozenset[str]) -> float:
        figures = judge.write(name, part, quantizer(int8), folder, "int4", progress)
        tried.append({"int8_layers": len(int8 | part.keep8), **figures})
        return figures["kl"]

    studied, int8 = None, frozenset[str]()
    if write(int8) > limit:
        studied = study(
            name, part, settings, lambda: quantizer(frozenset()), judge.embeds, scratch, progress
        )
        if studied is None:
            int8 = _by_kind(paths, limit, write)
        else:
            int8 = _by_layer(studied, paths, limit, write)
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


def _by_layer(
    studied: mixed.Study,
    paths: frozenset[str],
    limit: float,
    write: Callable[[frozenset[str]], float],
) -> frozenset[str]:
    """The layers in INT8 that were written last: those that add most for the time they save."""
    aim, int8 = limit, frozenset[str]()
    for _ in range(TRIES):
        choice = studied.choose(aim)
        int8 = paths - choice.quantized
        kl = write(int8)
        if kl <= limit or int8 == paths:
            break
        # INT8 errs a little too, and the switches were compared on fewer prompts.
        aim = min(aim * limit / kl, float(np.nextafter(choice.error, 0)))
    return int8


def unmet(name: str, budget: float, least: float) -> CalibrationError:
    """The sentence for a budget that no assignment meets."""
    return CalibrationError(
        f"{name} cannot be quantized within --budget {budget:g}: the least KL divergence reached is "
        f"{least:.3g} nats; raise --budget, or keep the part in more bits with --precision {name}=int8 "
        f"or {name}=fp32"
    )


def write_int8(
    name: str,
    part: Part,
    settings: DecoderSettings,
    embeds: Sequence[np.ndarray],
    data: CalibrationSet,
    folder: Path,
    scratch: Path,
    progress: Progress,
    budget: float | None = None,
) -> dict[str, Any]:
    """Write `<name>.onnx` in INT8, inputs' outlying channels moved into the weights where that errs
    less: engines round activations to int8 too, a scale a block. Layers that the budget has no room
    for, and those that get no faster, stay in float.

    Args:
        budget: largest KL divergence to full precision, nats a token; None is BUDGET8.

    Returns:
        What the manifest says: method, relative errors of the weights, KL divergence and top-1
        agreement on held-out prompts, and the layers (`mixed.Study.report`).

    Raises:
        CalibrationError: no assignment is within `budget`.
    """
    limit = BUDGET8 if budget is None else budget
    used, judges = thinned(data)
    chosen = [embeds[index] for index in (*used, *judges)]
    held_out = range(len(used), len(chosen))
    states = States(chosen, scratch / "states.npy")
    smoothing: dict[str, np.ndarray] = {}
    for inputs in calibrated_layers(part, settings, states, held_out, False, scratch, progress):
        for found in inputs.values():
            if found.smoothable:
                weights = np.max([column_peaks(w) for w in found.weights.values()], axis=0)
                scales = migration(found.peaks, weights, STRENGTH)
                smoothing |= dict.fromkeys(found.weights, scales)
    judge = Judge.of(part, settings, chosen, states, held_out, scratch)
    candidates = {"nearest": {}, f"smooth-{STRENGTH * 100:.0f}": smoothing}
    tried: dict[str, dict[str, Any]] = {}

    def write(method: str, exact: frozenset[str] = frozenset()) -> dict[str, Any]:
        quantizer = WeightOnly(8, BLOCK8, smoothing=candidates[method], exact=exact)
        figures = judge.write(name, part, quantizer, folder, "int8", progress)
        errors = list(quantizer.errors.values()) or [0.0]
        weights = {"mean": sum(errors) / len(errors), "worst": max(errors)}
        return {"weight_error": weights, **figures}

    for method in candidates:
        tried[method] = write(method)
    best = min(tried, key=lambda method: tried[method]["kl"])
    studied = study(
        name, part, settings, lambda: WeightOnly(8, BLOCK8, smoothing=candidates[best]),
        judge.embeds, scratch, progress,
    )  # fmt: skip
    layers, exact = frozenset(_paths(part)), frozenset[str]()
    said, written, aim = tried[best], (method, exact), limit
    for _ in range(TRIES):
        choice = None if studied is None else studied.choose(aim)
        if choice is not None:
            exact = layers - choice.quantized
        if written != (best, exact):
            said, written = write(best, exact), (best, exact)
        if choice is None or said["kl"] <= limit or exact == layers:
            break
        aim = min(aim * limit / said["kl"], float(np.nextafter(choice.error, 0)))
    if budget is not None and (said["kl"] > budget or (layers and exact == layers)):
        raise unmet(name, budget, min(step["kl"] for step in tried.values()))
    report = {} if studied is None else studied.report(layers - exact, "int8")
    return {"method": best, "budget_kl": limit, **said, "tried": tried, "layers": report}


def thinned(data: CalibrationSet) -> tuple[list[int], list[int]]:
    """Prompts that set and that measure an INT8 model, taken evenly."""
    held_out = list(data.held_out_prompts)
    used = [index for index in range(len(data.prompts)) if index not in data.held_out_prompts]

    def evenly(indices: list[int], most: int) -> list[int]:
        count = min(len(indices), most)
        return [indices[i * len(indices) // count] for i in range(count)]

    return evenly(used, PROMPTS8), evenly(held_out, PROMPTS8 // 2)


def calibrated_layers(
    part: Part,
    settings: DecoderSettings,
    states: States,
    held_out: Sequence[int],
    grams: bool,
    scratch: Path,
    progress: Progress,
) -> Iterator[dict[str, Input]]:
    assert part.layers is not None, "language models have layers"
    return inputs_by_layer(
        part.layers, settings, states, frozenset(held_out), grams, scratch, progress
    )


def _paths(part: Part) -> Mapping[str, TensorRef]:
    """The part's linear layers, without running anything."""
    observer = Observer(lambda op, x: {})
    part.build(observer)
    return observer.weights


def column_peaks(weight: TensorRef) -> np.ndarray:
    """float32 [in]: the largest weight that reads each input."""
    return np.max([np.abs(rows).max(axis=0) for rows in weight.rows()], axis=0)


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


@dataclass(frozen=True)
class Judge:
    """Writes a quantized model and compares its logits with full precision's on held-out prompts."""

    settings: DecoderSettings
    embeds: Sequence[np.ndarray]
    reference: Sequence[np.ndarray]  # float32 [positions, vocab]

    @classmethod
    def of(
        cls,
        part: Part,
        settings: DecoderSettings,
        embeds: Sequence[np.ndarray],
        states: States,
        held_out: Sequence[int],
        scratch: Path,
    ) -> Judge:
        """From the states behind the last layer.

        Raises:
            CalibrationError: logits are not finite.
        """
        assert part.layers is not None
        run = runner(part.layers.build_head(Float()), settings, scratch / "head.onnx")
        reference = []
        for number, index in enumerate(held_out):
            logits = run(states[index], **_last(states[index]))["logits"][0]
            if not np.isfinite(logits).all():
                raise CalibrationError(
                    "the llm part's logits are not finite in full precision; the checkpoint's weights "
                    "are damaged, or too large for float32"
                )
            np.save(scratch / f"logits.{number}.npy", logits)
            reference.append(np.load(scratch / f"logits.{number}.npy", mmap_mode="r"))
        return cls(settings, [embeds[index] for index in held_out], reference)

    def write(
        self,
        name: str,
        part: Part,
        quantizer: Quantizer,
        folder: Path,
        precision: str,
        progress: Progress,
    ) -> dict[str, float]:
        """Write `<name>.onnx`; its KL divergence (nats a token) and top-1 agreement."""
        model = part.build(quantizer)
        fold.into_norms(model.graph)
        fold.into_products(model.graph)
        path = folder / f"{name}.onnx"
        graphs.save(model, path, lambda done, of: progress(f"write {name} {precision}", done, of))
        # Not frugal: unpacked INT4 weights are twenty times slower.
        run = session_runner(path, self.settings, frugal=False)
        found = (run(embed, **_last(embed))["logits"][0] for embed in self.embeds)
        kl, agreement = divergence(self.reference, found)
        return {"kl": kl, "top1_agreement": agreement}


def _last(states: np.ndarray) -> dict[str, np.ndarray]:
    count = states.shape[1]
    return {"logit_positions": np.arange(max(0, count - LAST), count)}


def divergence(
    reference: Sequence[np.ndarray], logits: Iterator[np.ndarray]
) -> tuple[float, float]:
    """Mean KL divergence (nats) and share of equal top tokens, over all positions."""
    divergences, same = [], []
    for expected, found in zip(reference, logits, strict=True):
        p, q = _log_softmax(expected), _log_softmax(found)
        divergences.append((np.exp(p) * (p - q)).sum(axis=1))
        same.append(expected.argmax(axis=1) == found.argmax(axis=1))
    return float(np.concatenate(divergences).mean()), float(np.concatenate(same).mean())


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
