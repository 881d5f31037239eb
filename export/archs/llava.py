"""LLaVA and LLaVA-1.5 (Liu et al. 2023, arXiv 2304.08485, 2310.03744): ViT, MLP projector, decoder.

Reference: transformers' LlavaForConditionalGeneration and LlavaProcessor.
"""

from __future__ import annotations

from collections.abc import Callable

from vlm_edge.errors import UnsupportedConfig
from vlm_edge.export.checkpoint import Checkpoint, Weights, refuse_quantized
from vlm_edge.export.config import Config
from vlm_edge.export.connectors import mlp
from vlm_edge.export.language import llama
from vlm_edge.export.language.interface import decoder_part, decoder_settings
from vlm_edge.export.model import Model
from vlm_edge.export.parts import image_parts
from vlm_edge.export.processor import Processor
from vlm_edge.export.prompt_files import PromptFiles
from vlm_edge.export.vision import tower
from vlm_edge.runtime.manifest import CacheDtype, PromptSettings
from vlm_edge.runtime.tiling.settings import SingleTile, Tiling

MODEL_TYPES = ("llava",)

# transformers <= 4.51 wrote `language_model.model.*` and `vision_tower.vision_model.*`, later ones
# `model.language_model.*`; version 5 reads all and writes the first without `vision_model`.
RENAMES = (
    (r"^model\.(?=language_model\.|vision_tower\.|multi_modal_projector\.|image_newline$)", ""),
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^language_model\.model\.", "language_model."),
    *tower.RENAMES,
)


def read(
    checkpoint: Checkpoint,
    processor: Processor,
    prompt: PromptFiles,
    cache_dtype: CacheDtype = "float32",
) -> Model:
    """The checkpoint as three parts: vision, connector, llm.

    Args:
        cache_dtype: of the language model's keys and values.

    Raises:
        CheckpointError: config.json, the processor or a tensor is not what LLaVA needs.
    """

    def tiling(vision: tower.TowerSettings) -> Tiling:
        if processor.pinpoints is not None or processor.split is not None:
            raise UnsupportedConfig(
                "image_processor_type",
                processor.image_processor_type,
                "LLaVA sees one tile; tiles need config.json's model_type llava_next",
            )
        return SingleTile("single", vision.tokens)

    return assemble("llava", tiling, checkpoint, processor, prompt, cache_dtype)


def assemble(
    architecture: str,
    tiling: Callable[[tower.TowerSettings], Tiling],
    checkpoint: Checkpoint,
    processor: Processor,
    prompt: PromptFiles,
    cache_dtype: CacheDtype,
) -> Model:
    """What the LLaVA family shares: encoder, projector, language model and image token.

    Args:
        tiling: from what the encoder makes of a tile; reads and checks the family member's own keys.
    """
    config, weights = checkpoint.config, Weights(checkpoint)
    refuse_quantized(config)
    image = processor.image
    vision = tower.read_tower(config, image.height, image.width)
    text = config.sub("text_config")
    decoder = llama.read(text, cache_dtype)
    tied = config.flag("tie_word_embeddings", False) or decoder.tied
    _check_places(processor, vision.tokens)
    settings = prompt_settings(config, prompt)
    projector = mlp.read(config, vision.width, decoder.width)
    tiles = tiling(vision)
    config.get("vocab_size")  # LLaVA-1.5 repeats text_config's, which is the one that counts
    config.finish()

    table = weights.sub("language_model").sub("embed_tokens")
    head = table if tied else weights.sub("lm_head")
    parts = image_parts(
        image,
        (vision.tokens, vision.width),
        (vision.tokens, decoder.width),
        lambda quantizer: tower.VisionTower(weights.sub("vision_tower"), vision, quantizer),
        lambda quantizer: mlp.Projector(weights.sub("multi_modal_projector"), projector, quantizer),
    )
    parts["llm"] = decoder_part(weights.sub("language_model"), head, decoder)
    return Model(
        architecture=architecture,
        parts=parts,
        embeddings=table.tensor("weight", decoder.vocab_size, decoder.width),
        image=image,
        tiling=tiles,
        prompt=settings,
        decoder=decoder_settings(decoder),
        grid=vision.grid,
    )


def _check_places(processor: Processor, features: int) -> None:
    """The places a tile takes in the prompt, counted as LlavaProcessor does.

    Raises:
        UnsupportedConfig: they are not as many as there are features.
    """
    patch, strategy = processor.patch_size, processor.vision_feature_select_strategy
    if patch is None or strategy is None:
        return  # processors saved before 4.46 have neither key; the model's own count holds for them
    rows, columns = processor.image.height // patch, processor.image.width // patch
    extra = processor.num_additional_image_tokens or 0
    dropped = int(strategy == "default")
    places = rows * columns + extra - dropped
    if places != features:
        raise UnsupportedConfig(
            "processor.num_additional_image_tokens",
            extra,
            f"the processor makes {places} = {rows * columns} + {extra} - {dropped} places for a tile, "
            f"the encoder {features} features",
        )


def prompt_settings(config: Config, prompt: PromptFiles) -> PromptSettings:
    """The image token, which config.json and the tokenizer must agree on.

    Raises:
        UnsupportedConfig: they do not.
    """
    token, found = prompt.image_token, prompt.image_token_id
    index = config.get("image_token_index", config.get("image_token_id", 32000))
    config.get("image_token_id")
    if token is None or found != index:
        raise UnsupportedConfig(
            "image_token_index", index, f"the tokenizer's image token is {token!r} with id {found}"
        )
    return PromptSettings(
        image_token=token,
        image_token_id=index,
        chat_template="chat_template.jinja" if prompt.chat_template else None,
        special_tokens=dict(prompt.special_tokens),
    )
