"""LLaVA-NeXT, also called LLaVA-1.6 (Liu et al. 2024, "LLaVA-NeXT: Improved reasoning, OCR, and world
knowledge"): LLaVA whose encoder sees an overview of the picture and tiles of the best of some resolutions.

Reference: transformers' LlavaNextForConditionalGeneration, LlavaNextProcessor, LlavaNextImageProcessor.
"""

from __future__ import annotations

from dataclasses import replace

from vlm_edge.errors import UnsupportedConfig
from vlm_edge.export.archs import llava
from vlm_edge.export.checkpoint import Checkpoint, Weights
from vlm_edge.export.config import Config
from vlm_edge.export.model import Model
from vlm_edge.export.processor import PINPOINTS, Processor
from vlm_edge.export.prompt_files import PromptFiles
from vlm_edge.export.vision.tower import TowerSettings
from vlm_edge.runtime.manifest import CacheDtype
from vlm_edge.runtime.tiling.settings import AnyRes, Size

MODEL_TYPES = ("llava_next",)

RENAMES = llava.RENAMES

NEWLINE = "image_newline.npy"


def read(
    checkpoint: Checkpoint,
    processor: Processor,
    prompt: PromptFiles,
    cache_dtype: CacheDtype = "float32",
) -> Model:
    """As `llava.read`, with tiles and the vector that ends their rows.

    Raises:
        CheckpointError: config.json, the processor or a tensor is not what LLaVA-NeXT needs.
    """

    def tiling(vision: TowerSettings) -> AnyRes:
        return read_tiling(checkpoint.config, processor, vision)

    model = llava.assemble("llava_next", tiling, checkpoint, processor, prompt, cache_dtype)
    newline = Weights(checkpoint).tensor("image_newline", model.decoder.width)
    return replace(model, newline=newline)


def read_tiling(config: Config, processor: Processor, vision: TowerSettings) -> AnyRes:
    """From the processor's resolutions, which config.json repeats.

    Raises:
        UnsupportedConfig: the two differ, or a tile is not what the model takes it for.
    """
    config.only(
        "use_image_newline_parameter", True, True, "each row of tokens ends with image_newline"
    )
    pinpoints = processor.pinpoints
    if pinpoints is None:
        raise UnsupportedConfig(
            "image_processor_type",
            processor.image_processor_type,
            "LLaVA-NeXT needs a LlavaNextImageProcessor",
        )
    given = config.get("image_grid_pinpoints", PINPOINTS)
    found = [list(resolution) for resolution in pinpoints.resolutions]
    if given != found:
        why = f"the processor's are {found}; both files should say the same, in the same order"
        raise UnsupportedConfig("image_grid_pinpoints", given, why)
    return AnyRes(
        kind="anyres",
        grid=_grid(processor, vision),
        resolutions=pinpoints.resolutions,
        overview=pinpoints.overview,
        resample=pinpoints.resample,
        newline=NEWLINE,
    )


def _grid(processor: Processor, vision: TowerSettings) -> Size:
    """Tokens of a tile, down and across."""
    image, encoder = processor.image, vision.encoder
    # The model counts tiles and their tokens by vision_config alone, whatever its encoder could take.
    if (image.height, image.width) != (encoder.image, encoder.image):
        raise UnsupportedConfig(
            "vision_config.image_size",
            encoder.image,
            f"the processor's tiles have {image.height} x {image.width} pixels; both should be the same",
        )
    if vision.grid is None:
        rows, columns = encoder.grid
        raise UnsupportedConfig(
            "vision_feature_select_strategy",
            "default" if vision.drop_first else "full",
            f"a tile would have {vision.tokens} features, which are not its {rows} rows and {columns} "
            "columns of patches; CLIP's class token needs default, SigLIP has none and needs full",
        )
    patch = processor.patch_size
    if patch is not None and (image.height // patch, image.width // patch) != vision.grid:
        why = f"the encoder's patches have {encoder.patch} pixels; both should be the same"
        raise UnsupportedConfig("processor.patch_size", patch, why)
    return vision.grid
