"""Calibration prompts as a connector and a language model read them.

Prompts go through the runtime's own template and splice, pictures through the float vision encoder
and connector, so the language model is rounded for the inputs it will see: visual tokens too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vlm_edge.calibration.data import CalibrationSet
from vlm_edge.errors import CalibrationError, PromptError
from vlm_edge.export import graphs
from vlm_edge.export.checkpoint import TensorRef
from vlm_edge.export.examples import Arrays, Example
from vlm_edge.export.model import Model, Part
from vlm_edge.export.prompt_files import PromptFiles
from vlm_edge.export.quantizers import Float
from vlm_edge.export.static import Feed, Tiles
from vlm_edge.runtime.manifest import PromptSettings
from vlm_edge.runtime.media import media
from vlm_edge.runtime.messages import Prompt
from vlm_edge.runtime.ort import open_session
from vlm_edge.runtime.prompt import build_prompt
from vlm_edge.runtime.splice import splice
from vlm_edge.runtime.template import ChatTemplate
from vlm_edge.runtime.tiling.plan import TilePlan
from vlm_edge.runtime.tokenizer import Tokenizer


@dataclass(frozen=True)
class Sample:
    """A calibration prompt without its pixels.

    Attributes:
        pictures: indices into `CalibrationSet.paths`, in order, and how each is tiled.
        instruction: token ids that the connector reads, as many as it has positions for; None where it
            reads none.
    """

    token_ids: list[int]
    pictures: list[tuple[int, TilePlan]]
    instruction: tuple[int, ...] | None


Visual = Callable[[int, Sample], np.ndarray]  # a picture's tile tokens [tiles, tokens, width]


def samples(model: Model, files: PromptFiles, folder: Path, data: CalibrationSet) -> list[Sample]:
    """Every calibration prompt as the runtime builds it.

    Args:
        folder: of the bundle, where its tokenizers are.

    Raises:
        CalibrationError: a prompt that the model cannot take.
    """
    settings, core = model.prompt, Tokenizer(folder / "tokenizer.json")
    template = reader = None
    if files.chat_template is not None:
        template = ChatTemplate(files.chat_template, settings.special_tokens)
    if settings.instruction is not None:
        reader = Tokenizer(folder / settings.instruction.tokenizer)
    tiler, found = model.tiler(), []
    for prompt in data.prompts:
        images = [data.paths[index] for index in prompt.pictures]
        use = template is not None
        asked, given = (prompt.text, images) if use else _own_form(prompt.text, images, settings)
        try:
            built = build_prompt(asked, given, settings, core, template, tiler, use_template=use)
        except PromptError as error:
            raise CalibrationError(f"calibration prompt {prompt.text!r}: {error}") from error
        plans = [picture.plan for picture in built.pictures]
        pictures = list(zip(prompt.pictures, plans, strict=True))
        instruction = None
        if reader is not None and settings.instruction is not None:
            read = reader.encode(built.text.replace(settings.image_token, ""))
            instruction = tuple(read[: settings.instruction.max_tokens])
        found.append(Sample(built.token_ids, pictures, instruction))
    return found


def _own_form(text: str, images: list[Path], settings: PromptSettings) -> tuple[Prompt, list[Path]]:
    """A prompt of a model without a chat template; several pictures where texts and pictures come in turn
    have the text behind each, as few-shot prompts do."""
    if settings.interleave is not None and len(images) > 1:
        return [part for image in images for part in (image, text)], []
    if not images or settings.visual_tokens_first or settings.interleave is not None:
        return text, images
    return f"{settings.image_token}\n" * len(images) + text, images


def instructions(prompts: Sequence[Sample], tiles: Tiles) -> list[Feed]:
    """What an instructed connector reads beside each tile: the first prompt about its picture."""
    first: dict[int, tuple[int, ...]] = {}
    for prompt in reversed(prompts):
        if prompt.instruction is not None:
            first |= dict.fromkeys((index for index, _ in prompt.pictures), prompt.instruction)
    spare = next(iter(first.values()), ())  # of a picture that no prompt is about
    return [
        {"instruction_ids": np.array(first.get(picture, spare), np.int64)}
        for picture in tiles.picture.tolist()
    ]


def kept_tokens(image_features: np.ndarray, tiles: Tiles) -> Visual:
    """Visual tokens that a connector gave for every tile, whatever the prompt."""
    return lambda index, _: image_features[tiles.of(index)]


def instructed_tokens(connector: Part, features: np.ndarray, tiles: Tiles, scratch: Path) -> Visual:
    """Visual tokens that the float connector gives for the vision features and a prompt's instruction."""
    path = scratch / "connector_instructed.onnx"
    graphs.save(connector.build(Float()), path)
    session = open_session(path, "connector", None, frugal=True)

    def visual(index: int, prompt: Sample) -> np.ndarray:
        rows = np.ascontiguousarray(features[tiles.of(index)])
        ids = np.array([prompt.instruction] * len(rows), np.int64)
        found: np.ndarray = session.run(None, {"features": rows, "instruction_ids": ids})[0]
        return found

    return visual


def examples(model: Model, prompts: Sequence[Sample], visual: Visual) -> list[Example]:
    """Every calibration prompt as the language model reads it when it runs, and no longer than it has
    positions."""
    table, tiler, most = _Rows(model.embeddings), model.tiler(), model.decoder.max_positions
    found = []
    for prompt in prompts:
        ids = np.asarray(prompt.token_ids, np.int64)
        if model.decoder.media is not None:
            attended = _Attended(model, prompt, visual, most)
            found.append(Example(table.rows(ids)[None, :most], attended))
            continue
        tokens = [tiler.assemble(plan, visual(index, prompt)) for index, plan in prompt.pictures]
        embeds = splice(ids, model.prompt.image_token_id, table, tokens)
        found.append(Example(embeds[:, :most]))
    return found


@dataclass(frozen=True)
class _Attended:
    """What a prompt's positions attend to, as inputs of the graph (Flamingo)."""

    model: Model
    prompt: Sample
    visual: Visual
    most: int | None

    def __call__(self) -> Arrays:
        settings = self.model.decoder.media
        assert settings is not None, "asked of models that attend to pictures"
        names = [spec.name for spec in settings.arrays()]
        pictures, tokens = [], []
        for index, plan in self.prompt.pictures:
            tokens.append(plan.tokens)
            rows = self.visual(index, self.prompt)  # [tiles, arrays, kv_heads, tokens, head_dim]
            pictures.append(
                {name: np.concatenate(list(rows[:, i]), axis=1) for i, name in enumerate(names)}
            )
        ids = np.asarray(self.prompt.token_ids, np.int64)
        found = media(ids, self.model.prompt.image_token_id, settings, pictures, tokens)
        return found.of(slice(self.most)).feeds()


@dataclass(frozen=True)
class _Rows:
    """The checkpoint's token table as the runtime's `Embeddings`."""

    table: TensorRef

    def rows(self, ids: np.ndarray) -> np.ndarray:
        return np.asarray(self.table.view[ids], dtype=np.float32)
