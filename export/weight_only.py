"""INT4 of a language model: rounded with GPTQ on pictures and texts, measured, mixed with INT8.

Prompts go through the runtime's own template and splice, pictures through the float vision encoder
and connector, so the language model is rounded for the inputs it will see: visual tokens too.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from vlm_edge.calibration import gptq
from vlm_edge.calibration.data import CalibrationSet
from vlm_edge.errors import CalibrationError, PromptError
from vlm_edge.export import graphs
from vlm_edge.export.checkpoint import TensorRef
from vlm_edge.export.model import Model, Part
from vlm_edge.export.prompt_files import PromptFiles
from vlm_edge.export.quantizers import (
    Float,
    Observer,
    Rounded,
    WeightOnly,
    best_scales,
    block_size,
)
from vlm_edge.export.static import Progress
from vlm_edge.runtime.feeds import prefill_feeds
from vlm_edge.runtime.manifest import DecoderSettings
from vlm_edge.runtime.ort import open_session
from vlm_edge.runtime.prompt import build_prompt
from vlm_edge.runtime.splice import splice
from vlm_edge.runtime.template import ChatTemplate
from vlm_edge.runtime.tokenizer import Tokenizer

BITS, BLOCK, BLOCK8 = 4, 32, 128
HESSIAN_BYTES = 160 << 20  # of sums kept at once; more layers take another pass over the prompts
MOST_PASSES = 8  # a model that needs more is rounded to nearest: the passes would take hours
WIDEST = 4096  # inputs of a layer; the inverse of their sums takes 32 bytes a pair while it is made
LAST = 16  # positions of a prompt whose logits are compared
BUDGET = 0.05  # KL divergence to full precision (nats a token) up to which INT4 stays everywhere
# Layers whose rounding hurts most go to INT8 first (the inputs of down_proj and the outputs of v_proj
# have the largest outliers: SmoothQuant, arXiv 2211.10438).
STEPS: tuple[tuple[str, ...], ...] = ((), (".v_proj", ".down_proj"))
GRAM = "gram."


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
        pictures = [] if prompt.picture is None else [prompt.picture]
        images = [data.paths[index] for index in pictures]
        text, use = prompt.text, template is not None
        if not use and images:
            text = f"{model.prompt.image_token}\n{text}"
        try:
            built = build_prompt(text, images, model.prompt, core, template, use_template=use)
        except PromptError as error:
            raise CalibrationError(f"calibration prompt {prompt.text!r}: {error}") from error
        ids = np.asarray(built.token_ids, np.int64)
        parts = [features[index] for index in pictures]
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
) -> dict[str, Any]:
    """Write `<name>.onnx` in INT4, with as much INT8 as the budget asks for.

    A model for which `fits` says no is not to come here: it would take hours and its size in float32
    on disk.

    Returns:
        What the manifest says: method, KL divergence and top-1 agreement on held-out prompts, the
        layers that are INT8, and the steps tried.
    """
    held_out = [embeds[i] for i in data.held_out_prompts]
    used = [e for i, e in enumerate(embeds) if i not in data.held_out_prompts]
    path = folder / f"{name}.onnx"
    float_path = scratch / f"{name}_float.onnx"
    layers = observed(part)
    graphs.save(part.build(Float()), float_path)
    reference = list(_logits(float_path, settings, held_out, frugal=True))
    rounded = _gptq(part, layers, settings, used, float_path, scratch, progress)
    tried = []
    for suffixes in STEPS:
        kept = (
            frozenset(p for p in layers.weights if p.endswith(suffixes))
            if suffixes
            else frozenset()
        )
        quantizer = WeightOnly(BITS, BLOCK, part.keep8 | kept, rounded, BLOCK8)
        graphs.save(
            part.build(quantizer), path, lambda done, of: progress(f"write {name} int4", done, of)
        )
        # Not frugal: unpacked INT4 weights are twenty times slower.
        kl, agreement = _divergence(reference, _logits(path, settings, held_out, frugal=False))
        kinds = [suffix.removeprefix(".") for suffix in suffixes]
        tried.append({"int8": kinds, "kl": kl, "top1_agreement": agreement})
        if kl <= BUDGET:
            break
    return {"method": "gptq", "budget_kl": BUDGET, **tried[-1], "tried": tried}


def gram(op: Any, x: ir.Value) -> dict[str, ir.Value]:
    """Of x [batch, s, in] the sum of x x^T over positions, [in, in]."""
    width = op.Slice(op.Shape(x), [-1], [1 << 31], [0])
    flat = op.Reshape(x, op.Concat([-1], width, axis=0))
    return {GRAM: op.MatMul(op.Transpose(flat, perm=[1, 0]), flat)}


def _gptq(
    part: Part,
    layers: Observer,
    settings: DecoderSettings,
    embeds: Sequence[np.ndarray],
    float_path: Path,
    scratch: Path,
    progress: Progress,
) -> dict[str, Rounded]:
    """Every layer that may be INT4, rounded."""
    wanted = _wanted(part, layers)
    groups = _groups(layers, wanted)
    rounded: dict[str, Rounded] = {}
    for number, group in enumerate(groups):
        step = f"gptq pass {number + 1} of {len(groups)}"
        sums = _sums(
            part, settings, embeds, group, float_path.with_name("gram.onnx"), progress, step
        )
        for first, hessian in sums.items():
            upper = gptq.factor(hessian)  # query, key and value share it
            for path in (p for p in wanted if layers.readers[p] == first):
                rounded[path] = _round(path, layers.weights[path], upper, scratch)
    return rounded


def observed(part: Part) -> Observer:
    """The part's layers and which of them share an input, without running anything."""
    layers = Observer(lambda op, x: {})
    part.build(layers)
    return layers


def fits(part: Part) -> bool:
    """Can GPTQ be run in reasonable time? Otherwise weights are rounded to nearest."""
    layers = observed(part)
    wanted = _wanted(part, layers)
    widest = max(layers.weights[path].shape[1] for path in wanted)
    return widest <= WIDEST and len(_groups(layers, wanted)) <= MOST_PASSES


def _wanted(part: Part, layers: Observer) -> set[str]:
    return layers.weights.keys() - part.keep8


def _groups(layers: Observer, wanted: Collection[str]) -> list[list[str]]:
    """Observed inputs by pass, in order, each pass within HESSIAN_BYTES (or a single input)."""
    firsts = [p for p in layers.observed if any(layers.readers[w] == p for w in wanted)]
    groups: list[list[str]] = [[]]
    size = 0
    for first in firsts:
        need = 4 * layers.weights[first].shape[1] ** 2
        if groups[-1] and size + need > HESSIAN_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(first)
        size += need
    return groups


def _sums(
    part: Part,
    settings: DecoderSettings,
    embeds: Sequence[np.ndarray],
    group: Sequence[str],
    path: Path,
    progress: Progress,
    step: str,
) -> Mapping[str, np.ndarray]:
    observer = Observer(gram, only=group)
    model = part.build(observer)
    observer.add_outputs(model)
    graphs.save(model, path)
    session = open_session(path, "llm", None, frugal=True)
    names = [GRAM + first for first in observer.observed]
    sums: dict[str, np.ndarray] = {}
    for index, embed in enumerate(embeds):
        outputs = session.run(names, _feeds(session, settings, embed))
        for first, found in zip(observer.observed, outputs, strict=True):
            if not np.isfinite(found).all():
                raise CalibrationError(f"the input of {first} is not finite in full precision")
            sums[first] = (
                found if first not in sums else np.add(sums[first], found, out=sums[first])
            )
        progress(step, index + 1, len(embeds))
    return sums


def _round(path: str, weight: TensorRef, upper: np.ndarray, scratch: Path) -> Rounded:
    inputs = weight.shape[1]
    values, scales = gptq.quantize(
        np.ascontiguousarray(weight.numpy().T),
        upper,
        block_size(inputs, BLOCK),
        lambda block: best_scales(block[None], BITS)[0, 0],
        -8,
        7,
    )
    for kind, array in (("values", values.astype(np.int8)), ("scales", scales)):
        np.save(scratch / f"{path}.{kind}.npy", array)
    mapped = [np.load(scratch / f"{path}.{k}.npy", mmap_mode="r") for k in ("values", "scales")]
    return Rounded(*mapped)


def _feeds(session: Any, settings: DecoderSettings, embeds: np.ndarray) -> dict[str, np.ndarray]:
    inputs = {spec.name for spec in session.get_inputs()}
    feeds = prefill_feeds(settings, embeds)
    count = embeds.shape[1]
    feeds["logit_positions"] = np.arange(max(0, count - LAST), count)
    return {name: value for name, value in feeds.items() if name in inputs}


def _logits(
    path: Path, settings: DecoderSettings, embeds: Sequence[np.ndarray], frugal: bool
) -> Iterator[np.ndarray]:
    """float32 [positions, vocab] of each prompt's last positions."""
    session = open_session(path, "llm", None, frugal)
    for embed in embeds:
        yield session.run(["logits"], _feeds(session, settings, embed))[0][0]


def _divergence(
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
