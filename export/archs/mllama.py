"""Llama 3.2 Vision (Dubey et al. 2024, arXiv 2407.21783, section 7): a ViT over all tiles of a picture, and
Llama 3.1 with layers between its own that attend to pictures.

Reference: transformers' MllamaForConditionalGeneration and MllamaProcessor.
"""

from __future__ import annotations

from vlm_edge.errors import UnsupportedConfig
from vlm_edge.export.checkpoint import Checkpoint, Weights, refuse_quantized
from vlm_edge.export.language import mllama as language
from vlm_edge.export.language.interface import decoder_part
from vlm_edge.export.layers.linear import Linear
from vlm_edge.export.model import Model
from vlm_edge.export.parts import arranged_vision_part, connector_part, media_part
from vlm_edge.export.processor import Processor
from vlm_edge.export.prompt_files import PromptFiles
from vlm_edge.export.vision import mllama as vision
from vlm_edge.runtime.manifest import CacheDtype, PromptSettings
from vlm_edge.runtime.tiling.settings import Mllama

MODEL_TYPES = ("mllama",)

# transformers 4 wrote `language_model.model.*` and no `model.` in front; version 5 reads and writes that too
# unless asked for its own names.
RENAMES = (
    (r"^model\.(?=language_model\.|vision_model\.|multi_modal_projector\.)", ""),
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^language_model\.model\.", "language_model."),
)


def read(
    checkpoint: Checkpoint,
    processor: Processor,
    prompt: PromptFiles,
    cache_dtype: CacheDtype = "float32",
) -> Model:
    """The checkpoint as vision, connector, media_kv and llm.

    Args:
        cache_dtype: of the language model's keys and values.

    Raises:
        CheckpointError: config.json, the processor or a tensor is not what Llama 3.2 Vision needs.
    """
    config, weights = checkpoint.config, Weights(checkpoint)
    refuse_quantized(config)
    image = processor.image
    if processor.max_image_tiles is None or image.resize is None:
        why = "the processor of Llama 3.2 Vision is MllamaImageProcessor"
        raise UnsupportedConfig("image_processor_type", processor.image_processor_type, why)
    seeing = vision.read(config.sub("vision_config"))
    if (image.height, processor.max_image_tiles) != (seeing.vit.image, seeing.tiles):
        why = (
            f"the processor makes up to {processor.max_image_tiles} tiles of {image.height} pixels, which "
            f"are {seeing.tiles} of {seeing.vit.image} here"
        )
        raise UnsupportedConfig("vision_config.image_size", seeing.vit.image, why)
    text = language.read(config.sub("text_config"), cache_dtype)
    for key in ("image_token_index", "image_token_id"):
        config.get(key)  # `prompt` has it
    config.get("tie_word_embeddings")
    config.finish()
    rows = text.text.vocab_size + language.EXTRA_ROWS
    settings = _prompt(prompt, rows)
    decoder = text.decoder()

    width = text.text.width
    stack, projector = weights.sub("language_model"), weights.sub("multi_modal_projector")
    features = seeing.tokens, seeing.width
    parts = {
        "vision": arranged_vision_part(
            image,
            seeing.tiles,
            features,
            lambda quantizer: vision.Encoder(weights.sub("vision_model"), seeing, quantizer),
        ),
        "connector": connector_part(
            features,
            (seeing.tokens, width),
            lambda quantizer: Linear(projector, seeing.width, width, True, quantizer),
        ),
        "media_kv": media_part(
            width,
            decoder.media,
            lambda quantizer: language.MediaKeysValues(stack, text, quantizer),
        ),
        "llm": decoder_part(stack, weights.sub("lm_head"), decoder),
    }
    return Model(
        architecture="mllama",
        parts=parts,
        embeddings=stack.sub("embed_tokens").tensor("weight", rows, width),
        image=image,
        tiling=Mllama("mllama", seeing.tokens, seeing.tiles, image.resize.resample),
        prompt=settings,
        decoder=decoder.settings(),
    )


def _prompt(prompt: PromptFiles, rows: int) -> PromptSettings:
    """Raises UnsupportedConfig where the tokenizer lacks what MllamaProcessor writes into a prompt."""
    token, index = prompt.image_token, prompt.image_token_id
    if token is None or index is None or index >= rows:
        why = f"the image token's id should be below the {rows} rows of the token table; it is {index}"
        raise UnsupportedConfig("image_token_index", token, why)
    if "bos_token" not in prompt.special_tokens:
        raise UnsupportedConfig("bos_token", None, "every prompt of Llama 3.2 Vision has it")
    return PromptSettings(
        image_token=token,
        image_token_id=index,
        chat_template="chat_template.jinja" if prompt.chat_template else None,
        special_tokens=dict(prompt.special_tokens),
        bos_behind_images=True,
    )
