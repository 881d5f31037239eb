"""IDEFICS (Laurençon et al. 2023, arXiv 2306.16527), the open Flamingo (Alayrac et al. 2022, arXiv
2204.14198): CLIP's ViT, a Perceiver resampler or none, and a Llama that attends to pictures.

Reference: transformers' IdeficsForVisionText2Text and IdeficsProcessor.
"""

from __future__ import annotations

from dataclasses import replace

import tokenizers

from vlm_edge.errors import UnsupportedConfig
from vlm_edge.export.checkpoint import Checkpoint, Weights, refuse_quantized
from vlm_edge.export.connectors import perceiver
from vlm_edge.export.joined import JoinedRows
from vlm_edge.export.language import idefics
from vlm_edge.export.language.interface import decoder_part
from vlm_edge.export.model import Model
from vlm_edge.export.parts import connector_part, media_part, vision_part
from vlm_edge.export.processor import Processor
from vlm_edge.export.prompt_files import PromptFiles
from vlm_edge.export.vision import idefics_vision, tower
from vlm_edge.export.vision.patches import native_grid
from vlm_edge.runtime.manifest import CacheDtype, InterleaveSettings, PromptSettings
from vlm_edge.runtime.tiling.settings import SingleTile

MODEL_TYPES = ("idefics",)
RENAMES = ()  # all versions of transformers write the same names

IMAGE_TOKEN, AROUND_IMAGE = "<image>", "<fake_token_around_image>"


def read(
    checkpoint: Checkpoint,
    processor: Processor,
    prompt: PromptFiles,
    cache_dtype: CacheDtype = "float32",
) -> Model:
    """The checkpoint as vision, connector where there is a resampler, media_kv and llm.

    Args:
        cache_dtype: of the language model's keys and values.

    Raises:
        CheckpointError: config.json, the processor or a tensor is not what IDEFICS needs.
    """
    config, root = checkpoint.config, Weights(checkpoint)
    refuse_quantized(config)
    if processor.image_processor_type != "IdeficsImageProcessor":
        why = "the processor of IDEFICS is IdeficsImageProcessor"
        raise UnsupportedConfig("image_processor_type", processor.image_processor_type, why)
    image, weights = processor.image, root.sub("model")
    vision = idefics_vision.read(config.sub("vision_config"))
    native_grid(replace(vision.encoder, height=image.height, breadth=image.width), "IDEFICS")
    resampler = None
    if config.flag("use_resampler", False):
        resampler = perceiver.read(config.sub("perceiver_config"), vision.width)
    config.get("perceiver_config")
    language = idefics.read(config, vision.width, cache_dtype)
    config.finish()
    settings = _prompt(prompt, language.text.vocab_size)
    decoder = language.decoder(_end_token(prompt))

    features = vision.tokens, vision.width
    parts = {
        "vision": vision_part(
            image,
            features,
            lambda quantizer: tower.VisionTower(weights.sub("vision_model"), vision, quantizer),
        )
    }
    tokens = vision.tokens
    if resampler is not None:
        tokens, latents = resampler.latents, weights.sub("perceiver_resampler")
        parts["connector"] = connector_part(
            features,
            (tokens, vision.width),
            lambda quantizer: perceiver.Resampler(latents, resampler, quantizer),
        )
    parts["media_kv"] = media_part(
        vision.width,
        decoder.media,
        lambda quantizer: idefics.MediaKeysValues(weights, language, quantizer),
    )
    extra = language.additional
    table = _extended(weights.sub("embed_tokens"), "additional_embedding", extra)
    head = table if decoder.tied else _extended(root.sub("lm_head"), "additional_fc", extra)
    parts["llm"] = decoder_part(weights, head, decoder)
    return Model(
        architecture="flamingo",
        parts=parts,
        embeddings=table.tensor("weight", language.text.vocab_size, language.text.width),
        image=image,
        tiling=SingleTile("single", tokens),
        prompt=settings,
        decoder=decoder.settings(),
    )


def _extended(weights: Weights, name: str, rows: int) -> Weights:
    """A table, or the head, whose last rows are the additional vocabulary's."""
    if not rows:
        return weights
    return JoinedRows(weights.checkpoint, weights.path, more=weights.sub(name), rows=rows)


def _prompt(prompt: PromptFiles, vocabulary: int) -> PromptSettings:
    """Raises UnsupportedConfig where the tokenizer has not what IdeficsProcessor writes into a prompt."""
    token, index = prompt.image_token, prompt.image_token_id
    if token != IMAGE_TOKEN or index is None or index >= vocabulary:
        why = f"IDEFICS writes {IMAGE_TOKEN}, whose id should be below the {vocabulary} of the vocabulary"
        raise UnsupportedConfig("image_token", token, f"{why}; the tokenizer's is {index}")
    bos = prompt.special_tokens.get("bos_token")
    if bos is None:
        raise UnsupportedConfig("bos_token", None, "every prompt of IDEFICS begins with it")
    return PromptSettings(
        image_token=token,
        image_token_id=index,
        chat_template="chat_template.jinja" if prompt.chat_template else None,
        special_tokens=dict(prompt.special_tokens),
        # transformers 4 wrote <end_of_utterance> between two texts where the tokenizer had it; in version 5
        # the processor looks for it where it never is (`special_tokens_map`).
        interleave=InterleaveSettings(bos, AROUND_IMAGE, None),
    )


def _end_token(prompt: PromptFiles) -> int | None:
    """The id of the tokenizer's end token, whatever config.json says of it."""
    token = prompt.special_tokens.get("eos_token")
    core = tokenizers.Tokenizer.from_str(prompt.tokenizer_json)
    found: int | None = None if token is None else core.token_to_id(token)
    return found
