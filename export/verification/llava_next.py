"""LLaVA-NeXT in transformers."""

from __future__ import annotations

from typing import Any

import numpy as np

from vlm_edge.export.verification.reference import Reference as Base


class Reference(Base):
    """`LlavaNextForConditionalGeneration`: an overview and tiles a picture."""

    model_class = "LlavaNextForConditionalGeneration"

    def tiles(self, tensors: Any) -> list[np.ndarray]:
        """Its processor pads each picture with black tiles to as many as the one with the most has."""
        # Imported here, so that a missing transformers is the base class's own sentence.
        from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

        config = self.model.config
        counts = [
            image_size_to_num_patches(
                size, config.image_grid_pinpoints, config.vision_config.image_size
            )
            for size in tensors["image_sizes"]
        ]
        pixels = tensors["pixel_values"].numpy()
        return [tiles[:count] for tiles, count in zip(pixels, counts, strict=True)]
