"""`vlm export`: a checkpoint becomes a bundle, step by step, without torch and without loading it whole."""

from __future__ import annotations

import logging
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

import vlm_edge
from vlm_edge.calibration import data as calibration_data
from vlm_edge.calibration.audit import audit, audit_prompts
from vlm_edge.calibration.data import CalibrationSet
from vlm_edge.errors import SettingError, TemplateError, UnsupportedConfig
from vlm_edge.export import archs, graphs, lowering, mixed, static, writer
from vlm_edge.export.answers import answered
from vlm_edge.export.checkpoint import Checkpoint
from vlm_edge.export.config import read_json
from vlm_edge.export.examples import Examples
from vlm_edge.export.lowering.cpu import Windows
from vlm_edge.export.memory import PeakMemory
from vlm_edge.export.model import Model, Part
from vlm_edge.export.parts import ARRANGEMENT, INSTRUCTION
from vlm_edge.export.precision import Budgets, PrecisionPlan
from vlm_edge.export.processor import read_processor
from vlm_edge.export.prompt_examples import (
    Sample,
    Visual,
    examples,
    instructed_tokens,
    instructions,
    kept_tokens,
    samples,
)
from vlm_edge.export.prompt_files import PromptFiles, read_prompt_files
from vlm_edge.export.quantizers import Float
from vlm_edge.export.source import resolve
from vlm_edge.export.static import Progress
from vlm_edge.export.tiling import OverlapOrder, with_overlap
from vlm_edge.export.w8a8 import write_w8a8
from vlm_edge.export.weight_only_int4 import write_int4
from vlm_edge.export.weight_only_int8 import EXAMPLES, write_int8
from vlm_edge.runtime.feeds import windows
from vlm_edge.runtime.manifest import (
    FORMAT,
    NAME,
    CacheDtype,
    EngineEntry,
    GenerationSettings,
    Manifest,
    Precision,
    Source,
    read_manifest,
)
from vlm_edge.runtime.template import ChatTemplate
from vlm_edge.runtime.tiling import AnyRes, Tiling
from vlm_edge.runtime.tokenizer import Tokenizer

log = logging.getLogger(__name__)
MOST_TILES = 160  # of calibration: beyond, ranges hardly change and each costs a run in float32
LANGUAGE = {"int4": write_int4, "int8": write_int8, "w8a8": write_w8a8}
Target = Literal["cpu", "tensorrt", "tensorrt-rtx"]  # what layers are quantized for


@dataclass(frozen=True)
class ExportReport:
    """What an export made.

    Attributes:
        bundle: its folder.
        architecture, tiling: as in the manifest.
        seconds: wall time.
        precisions: by part; fp32 where no layer was worth quantizing.
        sizes: bytes by part, and "embeddings", "other".
        errors: by quantized part; `cosine` and `relative_error` of its features on held-out
            pictures; of a language model in INT8 `weight_error`, the relative error of its layers
            (mean and worst), in INT4 `kl` and `top1_agreement` on held-out prompts. `layers`, where
            precisions are mixed by measurement, is `mixed.Study.report`.
        peak_rss_anon: bytes, once the source was there; 0 where the system does not say.
        warnings: a sentence for each path that calibration never exercised.
        target: as asked for.
    """

    bundle: Path
    architecture: str
    tiling: Tiling
    seconds: float
    precisions: dict[str, Precision]
    sizes: dict[str, int]
    errors: dict[str, dict[str, Any]]
    peak_rss_anon: int
    warnings: list[str]
    target: Target


def export(
    source: str | Path | None,
    output: Path | str,
    arch: str | None = None,
    precision: PrecisionPlan | None = None,
    calibration_images: Path | None = None,
    calibration_method: str = "auto",
    progress: Progress | None = None,
    revision: str | None = None,
    budgets: Budgets | None = None,
    cache_dtype: CacheDtype = "float32",
    tiling: OverlapOrder | None = None,
    target: Target = "cpu",
) -> ExportReport:
    """Export a checkpoint.

    Args:
        source: a Hugging Face checkpoint folder, a Hub name, or None for the demo model.
        output: the bundle's folder; an older bundle there is replaced once the new one is complete.
        arch: the architecture; None takes config.json's word.
        precision: by part; None is full precision everywhere.
        calibration_images: a folder of pictures, with prompts and texts if wanted
            (`calibration.data`); None takes the built-in ones.
        calibration_method: of static INT8 (`static.Method`); "auto" takes whichever errs least.
        progress: called with (step, done, total).
        revision: of a Hub repository.
        budgets: how far quantization may move the outputs; None is each part's default.
        cache_dtype: of the language model's keys and values; int8 takes a quarter of the memory.
        tiling: overlapping tiles for a model that sees one tile; None leaves the model's own.
        target: the engine that decides which layers are worth quantizing, and in which form. What a layer
            takes on this CPU says nothing of a GPU: for TensorRT layers are quantized by their error alone,
            and a language model's INT8 weights have a scale a column.

    Raises:
        CheckpointError, BundleExists, CalibrationError, SettingError.
    """
    begin = time.perf_counter()
    tick: Progress = progress or (lambda step, done, total: None)
    plan, budgets = precision or PrecisionPlan(), budgets or Budgets()
    if target not in get_args(Target):
        raise SettingError(f"target = {target!r}; it should be {', '.join(get_args(Target))}")
    if cache_dtype not in get_args(CacheDtype):
        kinds = " or ".join(get_args(CacheDtype))
        raise SettingError(f"cache_dtype = {cache_dtype!r}; it should be {kinds}")
    tried = static.methods(calibration_method)
    output = Path(output)
    writer.check_output(output)
    tick("read checkpoint", 0, 1)
    folder, name = resolve(source, revision, arch)
    with PeakMemory() as memory:
        checkpoint, model, prompt = read_model(folder, arch, cache_dtype)
        if tiling is not None:
            model = with_overlap(model, tiling)
        plan.check({part: model.parts[part].weight_only for part in model.parts})
        precisions = {n: plan.of(n, part.weight_only) for n, part in model.parts.items()}
        calibrated = [name for name, precision in precisions.items() if precision != "fp32"]
        if calibration_images is not None and not calibrated:
            raise SettingError("calibration pictures were given, but no part's precision uses them")
        budgets.check({n: (p, model.parts[n].weight_only) for n, p in precisions.items()})
        data = calibration_set(calibration_images, model) if calibrated else None
        for part in model.parts.values():
            part.build(Float())  # finds missing and misshapen tensors before the long steps
        tick("read checkpoint", 1, 1)
        with writer.new_folder(output) as temporary:
            steps = _Steps(temporary, tick, windows(model.decoder), target)
            _write_texts(temporary, model, prompt)
            audited = _audit(temporary, model, calibrated, precisions, data)
            if not steps.timed:
                audited["target"] = target
            if data is not None:
                _write_calibrated(
                    steps, model, prompt, calibrated, precisions, data, tried, budgets
                )
            _write_rest(steps, checkpoint, model, prompt, name, precisions, audited)
    manifest = read_manifest(output)
    return ExportReport(
        bundle=output,
        architecture=model.architecture,
        tiling=model.tiling,
        seconds=time.perf_counter() - begin,
        precisions={n: engine.precision for n, engine in manifest.engines.items()},
        sizes=writer.part_sizes(manifest),
        errors=(manifest.calibration or {}).get("parts", {}),
        peak_rss_anon=memory.peak,
        warnings=(manifest.calibration or {}).get("warnings", []),
        target=target,
    )


def calibration_set(folder: Path | None, model: Model) -> CalibrationSet:
    """The user's or the built-in data, thinned out where pictures become many tiles, but of every tiling
    that it has."""
    tiler = model.tiler()
    data = calibration_data.load(folder, large=tiler.grids() != ("1",))
    return data.within(tiler, MOST_TILES)


def read_model(
    folder: Path, arch: str | None = None, cache_dtype: CacheDtype = "float32"
) -> tuple[Checkpoint, Model, PromptFiles]:
    """Everything an export needs to know of a checkpoint; writes nothing.

    Raises:
        CheckpointError: the checkpoint cannot be exported.
    """
    asked = None if arch is None else archs.find(arch)  # named before any file is
    model_type = read_json(folder / "config.json").get("model_type") if folder.is_dir() else None
    name, module = archs.find_for(model_type) if arch is None or asked is None else (arch, asked)
    if model_type is not None and model_type not in module.MODEL_TYPES:
        types = ", ".join(module.MODEL_TYPES)
        raise UnsupportedConfig("model_type", model_type, f"--arch {name} reads {types}")
    checkpoint = Checkpoint(folder, module.RENAMES)
    prompt = read_prompt_files(folder, getattr(module, "INNER_GENERATION", False))
    if prompt.chat_template is not None:
        try:
            ChatTemplate(prompt.chat_template, prompt.special_tokens)
        except TemplateError as error:
            raise UnsupportedConfig("chat_template", "...", str(error)) from error
    model = module.read(checkpoint, read_processor(folder), prompt, cache_dtype)
    log.debug("%s: %s with parts %s", folder.name, name, ", ".join(model.parts))
    return checkpoint, model, prompt


@dataclass
class _Steps:
    """One export under way: the temporary folder and what the manifest will say."""

    folder: Path
    tick: Progress
    windows: Windows
    target: Target
    engines: dict[str, EngineEntry] = field(default_factory=dict)
    errors: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def timed(self) -> bool:
        """Is this machine the one that layers are timed for?"""
        return self.target == "cpu"

    def entry(self, name: str, part: Part, precision: Precision) -> None:
        self.engines[name] = EngineEntry(
            precision=precision,
            graph=f"{name}.onnx",
            lowered=lowering.lower(self.folder / f"{name}.onnx", self.windows),
            inputs=part.interface.inputs,
            outputs=part.interface.outputs,
        )

    def write_float(self, name: str, part: Part) -> None:
        graphs.save(
            part.build(Float()),
            self.folder / f"{name}.onnx",
            lambda done, of: self.tick(f"write {name} fp32", done, of),
        )
        self.entry(name, part, "fp32")


def _write_texts(folder: Path, model: Model, prompt: PromptFiles) -> None:
    (folder / "tokenizer.json").write_text(prompt.tokenizer_json, encoding="utf-8")
    if model.prompt.instruction is not None and prompt.instruction_tokenizer_json is not None:
        path = folder / model.prompt.instruction.tokenizer
        path.write_text(prompt.instruction_tokenizer_json, encoding="utf-8")
    if model.newline is not None and isinstance(model.tiling, AnyRes):
        np.save(folder / model.tiling.newline, model.newline.numpy())
    if prompt.chat_template is not None and model.prompt.chat_template is not None:
        (folder / model.prompt.chat_template).write_text(prompt.chat_template, encoding="utf-8")


def _write_rest(
    steps: _Steps,
    checkpoint: Checkpoint,
    model: Model,
    prompt: PromptFiles,
    name: str,
    precisions: dict[str, Precision],
    audited: dict[str, Any],
) -> None:
    """The parts that no data sets, the token table, and the manifest over all files."""
    folder, tick = steps.folder, steps.tick
    for part_name, part in model.parts.items():
        if part_name not in steps.engines:
            steps.write_float(part_name, part)
    tick("write token table", 0, 1)
    embeddings = writer.write_embeddings(model.embeddings, folder, precisions["llm"] != "fp32")
    tick("write token table", 1, 1)
    manifest = Manifest(
        format=FORMAT,
        producer=f"vlm-edge {vlm_edge.__version__}",
        architecture=model.architecture,
        source=Source(name, checkpoint.digest(), checkpoint.dtype()),
        engines={n: steps.engines[n] for n in model.parts},
        files=writer.file_entries(folder),
        image=model.image,
        tiling=model.tiling,
        prompt=model.prompt,
        decoder=model.decoder,
        generation=GenerationSettings(prompt.eos_token_ids, prompt.repetition_penalty),
        embeddings=embeddings,
        calibration={**audited, "parts": steps.errors} if steps.errors else None,
    )
    (folder / NAME).write_text(manifest.dump(), encoding="utf-8")


def _write_calibrated(
    steps: _Steps,
    model: Model,
    prompt: PromptFiles,
    calibrated: list[str],
    precisions: dict[str, Precision],
    data: CalibrationSet,
    tried: tuple[str, ...],
    budgets: Budgets,
) -> None:
    """Parts in pipeline order: each one's float outputs are the next one's inputs, whether or not it
    is quantized itself. The chain ends with the last part that has to be calibrated."""
    language = [name for name in calibrated if model.parts[name].weight_only]
    with tempfile.TemporaryDirectory(prefix=".scratch.", dir=steps.folder) as name_:
        scratch = Path(name_)
        prompts = list[Sample]()
        if language or model.prompt.instruction is not None:
            prompts = samples(model, prompt, steps.folder, data)
        visual = _write_images(steps, model, calibrated, prompts, data, tried, budgets, scratch)
        if not language:
            return
        every = examples(model, prompts, visual)
        asked = Examples.split(model.decoder, every, data.held_out_prompts)
        read = {"llm": asked}
        if model.decoder.start_token_id is not None:
            if {precisions[name] for name in language} == {"int8"}:
                asked = asked.thinned(EXAMPLES)  # to answer takes longer than to be calibrated
            read = answered(
                model.parts, asked, model.embeddings, prompt.eos_token_ids, scratch, steps.tick
            )
        for name in language:
            part, kind = model.parts[name], precisions[name]
            steps.errors[name] = LANGUAGE[kind](
                name, part, read[name], steps.folder, scratch, steps.tick, budgets.kl, steps.timed,
                columns=not steps.timed,  # the form that TensorRT multiplies as it is
            )  # fmt: skip
            layers = steps.errors[name].get("layers")
            steps.entry(name, part, mixed.precision_of(layers) if layers else kind)


def _write_images(
    steps: _Steps,
    model: Model,
    calibrated: list[str],
    prompts: list[Sample],
    data: CalibrationSet,
    tried: tuple[str, ...],
    budgets: Budgets,
    scratch: Path,
) -> Visual:
    """Vision encoder and connector; what they give, in float, for a picture of the data."""
    inputs, tiles = static.pixels(data, model.image, model.tiler(), scratch)
    visual: Visual = kept_tokens(inputs, tiles)
    for name, part in model.parts.items():
        if part.weight_only:
            break
        instructed = INSTRUCTION in part.interface.inputs
        if instructed:
            visual = instructed_tokens(part, inputs, tiles, scratch)
        extras = instructions(prompts, tiles) if instructed else None
        if ARRANGEMENT in part.interface.inputs:
            extras = static.arrangements(data, model.tiler())
        floats = static.run_float(name, part, inputs, tiles, scratch, steps.tick, extras)
        if name in calibrated:
            steps.errors[name] = static.write_int8(
                name, part, floats, tiles, tried, budgets.max_error, steps.folder, scratch,
                steps.tick, steps.timed,
            )  # fmt: skip
            steps.entry(name, part, mixed.precision_of(steps.errors[name]["layers"]))
        inputs, tiles = static.handed_on(part, floats.outputs, tiles)
        if not instructed:
            visual = kept_tokens(inputs, tiles)
        if name == calibrated[-1]:
            break
    return visual


def _audit(
    folder: Path,
    model: Model,
    calibrated: list[str],
    precisions: dict[str, Precision],
    data: CalibrationSet | None,
) -> dict[str, Any]:
    """The manifest's `calibration` but for the parts."""
    if data is None:
        return {"data": {}, "warnings": []}
    facts, warnings = audit(data, model.tiler())
    reader = next((name for name in calibrated if model.parts[name].weight_only), None)
    if reader is not None:  # the language model alone reads prompts, under INT8 not all of them
        used = [i for i in range(len(data.prompts)) if i not in data.held_out_prompts]
        if precisions[reader] == "int8":
            used = calibration_data.evenly(used, EXAMPLES)
        prompts = [data.prompts[index] for index in used]
        more, lacking = audit_prompts(prompts, Tokenizer(folder / "tokenizer.json"))
        facts, warnings = facts | more, warnings + lacking
    return {"data": facts, "warnings": warnings}
