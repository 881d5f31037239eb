"""Calibration prompts as a language model reads them.

Prompts go through the runtime's own template and splice, pictures through the float vision encoder
and connector, so the language model is rounded for the inputs it will see: visual tokens too.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vlm_edge.calibration.data import CalibrationSet
from vlm_edge.errors import CalibrationError, PromptError
from vlm_edge.export.checkpoint import TensorRef
from vlm_edge.export.model import Model
from vlm_edge.export.prompt_files import PromptFiles
from vlm_edge.export.static import Tiles
from vlm_edge.runtime.prompt import build_prompt
from vlm_edge.runtime.splice import splice
from vlm_edge.runtime.template import ChatTemplate
from vlm_edge.runtime.tokenizer import Tokenizer


def embedded_prompts(
    model: Model,
    files: PromptFiles,
    tokenizer: Path,
    data: CalibrationSet,
    features: np.ndarray,
    tiles: Tiles,
) -> list[np.ndarray]:
    """inputs_embeds float32 [1, n, width] of every calibration prompt, as the runtime makes them.

    Args:
        tokenizer: the bundle's tokenizer.json.
        features: image_features of every picture, [tiles, tile tokens, width].
        tiles: which rows are whose.
    """
    core = Tokenizer(tokenizer)
    template = None
    if files.chat_template is not None:
        template = ChatTemplate(files.chat_template, model.prompt.special_tokens)
    table, tiler = _Rows(model.embeddings), model.tiler()
    embeds = []
    for prompt in data.prompts:
        images = [data.paths[index] for index in prompt.pictures]
        text, use = prompt.text, template is not None
        if not use and images:
            text = f"{model.prompt.image_token}\n" * len(images) + text
        try:
            built = build_prompt(
                text, images, model.prompt, core, template, tiler, use_template=use
            )
        except PromptError as error:
            raise CalibrationError(f"calibration prompt {prompt.text!r}: {error}") from error
        ids = np.asarray(built.token_ids, np.int64)
        parts = [
            tiler.assemble(picture.plan, features[tiles.of(index)])
            for index, picture in zip(prompt.pictures, built.pictures, strict=True)
        ]
        embeds.append(splice(ids, model.prompt.image_token_id, table, parts))
    return embeds


@dataclass(frozen=True)
class _Rows:
    """The checkpoint's token table as the runtime's `Embeddings`."""

    table: TensorRef

    def rows(self, ids: np.ndarray) -> np.ndarray:
        return np.asarray(self.table.view[ids], dtype=np.float32)
