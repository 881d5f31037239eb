"""Idefics3 and SmolVLM in transformers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from transformers.image_utils import load_image

from vlm_edge.export.verification import reference


class Reference(reference.Reference):
    """`Idefics3ForConditionalGeneration` or `SmolVLMForConditionalGeneration`, whichever config.json names:
    tiles and an overview a picture."""

    model_class = "AutoModelForImageTextToText"
    vision, connector, language = "vision_model", "connector", "text_model"

    def load_processor(self, source: str | Path) -> Any:
        """SmolVLMProcessor's, where it can be made: it wants num2words and torchvision, for video."""
        try:
            return super().load_processor(source)
        except ImportError:
            return _SmolVLMPictures.from_pretrained(source)

    def inputs(self, prompt: str, images: Sequence[Path], template: bool) -> reference.Inputs:
        """As the base, with the rows and columns that the processor keeps to itself."""
        pictures = [load_image(str(image)) for image in images]
        self._grids: dict[str, Any] = {"rows": [[]], "cols": [[]]}
        if pictures:
            image_processor = self.processor.image_processor
            self._grids = image_processor([pictures], return_row_col_info=True)
        return super().inputs(prompt, images, template)

    def tiles(self, tensors: Any) -> list[np.ndarray]:
        """All pictures' tiles come one after another; a picture that is cut has an overview besides."""
        grids = zip(self._grids["rows"][0], self._grids["cols"][0], strict=True)
        ends = np.cumsum([rows * columns + 1 for rows, columns in grids])
        return np.split(tensors["pixel_values"][0].numpy(), ends[:-1])

    def visual_tokens(self, tensors: Any, index: int) -> int:
        return super().visual_tokens(self._grids, index)


class _SmolVLMPictures(transformers.Idefics3Processor):
    """SmolVLMProcessor without video: what both do with pictures is the same but for the tokens' names."""

    def replace_image_token(self, image_inputs: Any, image_idx: int, **_kwargs: Any) -> str:
        smolvlm = transformers.models.smolvlm.processing_smolvlm
        names = self.tokenizer
        places: str = smolvlm.get_image_prompt_string(
            image_inputs["rows"][0][image_idx],
            image_inputs["cols"][0][image_idx],
            self.image_seq_len,
            getattr(names, "fake_image_token", self.fake_image_token),
            getattr(names, "image_token", self.image_token),
            getattr(names, "global_image_token", self.global_image_tag),
        )
        return places
