"""The open Flamingos (Alayrac et al. 2022, arXiv 2204.14198): CLIP's ViT, a Perceiver resampler, and a
language model that attends to pictures.

IDEFICS (Laurençon et al. 2023, arXiv 2306.16527) is a Llama, with or without resampler; its reference are
transformers' IdeficsForVisionText2Text and IdeficsProcessor. OpenFlamingo (Awadalla et al. 2023, arXiv
2308.01390) has a language model of several families, and lies in a folder that `export/open_flamingo.py` has
put together; its reference is the package open-flamingo 2.0.1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import tokenizers
from onnxscript import nn

from vlm_edge.errors import UnsupportedConfig
from vlm_edge.export.checkpoint import Checkpoint, Weights, refuse_quantized
from vlm_edge.export.config import Config
from vlm_edge.export.connectors import perceiver
from vlm_edge.export.joined import JoinedRows
from vlm_edge.export.language import families, idefics, open_flamingo
from vlm_edge.export.language.gated import Gated
from vlm_edge.export.language.interface import decoder_part
from vlm_edge.export.layers.activations import ACTIVATIONS
from vlm_edge.export.model import Model, Part
from vlm_edge.export.parts import connector_part, media_part, vision_part
from vlm_edge.export.processor import Processor
from vlm_edge.export.prompt_files import PromptFiles
from vlm_edge.export.quantizers import Quantizer
from vlm_edge.export.vision import idefics_vision, tower
from vlm_edge.export.vision.patches import native_grid
from vlm_edge.runtime.manifest import (
    CacheDtype,
    ImageSettings,
    InterleaveSettings,
    MediaSettings,
    PromptSettings,
)
from vlm_edge.runtime.tiling.settings import SingleTile

MODEL_TYPES = ("idefics", "open_flamingo")
RENAMES = (  # of OpenFlamingo's pieces; IDEFICS has the same names in all versions of transformers
    (r"^(?:gpt_neox|transformer)\.", "model."),
    (r"^(?=(?:embeddings|encoder|pre_layrnorm|post_layernorm)\.)", "vision_model."),
)

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
        CheckpointError: config.json, the processor or a tensor is not what the model needs.
    """
    refuse_quantized(checkpoint.config)
    kind = checkpoint.config.choice("model_type", MODEL_TYPES[0], MODEL_TYPES)
    reader = _read_idefics if kind == "idefics" else _read_open_flamingo
    return reader(checkpoint, processor, prompt, cache_dtype)


# -- IDEFICS ------------------------------------------------------------------------------------


def _read_idefics(
    checkpoint: Checkpoint, processor: Processor, prompt: PromptFiles, cache_dtype: CacheDtype
) -> Model:
    config, root = checkpoint.config, Weights(checkpoint)
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
    parts = _image_parts(
        image,
        vision,
        weights.sub("vision_model"),
        resampler,
        weights.sub("perceiver_resampler"),
        decoder.media,
        lambda quantizer: idefics.MediaKeysValues(weights, language, quantizer),
    )
    extra = language.additional
    table = _extended(weights.sub("embed_tokens"), "additional_embedding", extra)
    head = table if decoder.tied else _extended(root.sub("lm_head"), "additional_fc", extra)
    parts["llm"] = decoder_part(weights, head, decoder)
    return _model(parts, table, image, vision, resampler, settings, decoder)


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


# -- OpenFlamingo -------------------------------------------------------------------------------


def _read_open_flamingo(
    checkpoint: Checkpoint, processor: Processor, prompt: PromptFiles, cache_dtype: CacheDtype
) -> Model:
    config, root, image = checkpoint.config, Weights(checkpoint), processor.image
    own = root.sub("flamingo")
    vision = tower.read_tower(config, image.height, image.width)
    resampler = perceiver.ResamplerSettings(
        latents=config.size("resampler_n_latents", 64),
        width=vision.width,
        hidden=open_flamingo.EXPANSION * vision.width,
        layers=config.size("resampler_depth", 6),
        heads=open_flamingo.HEADS,
        head_dim=open_flamingo.HEAD_DIM,
        qk_norms=False,
        act=ACTIVATIONS["gelu"],
    )
    base = families.read(config.sub("text_config"), "llama", cache_dtype)
    immediate = config.flag("only_attend_immediate_media", True)
    blocks = open_flamingo.Blocks(
        base,
        _layers(config, base.settings().layers),
        vision.width,
        "immediate" if immediate else "previous",
        own.sub("gated_cross_attn_layers"),
    )
    config.finish()
    decoder = blocks.decoder()
    parts = _image_parts(
        image,
        vision,
        root.sub("vision_model"),
        resampler,
        own.sub("perceiver"),
        decoder.media,
        lambda quantizer: open_flamingo.MediaKeysValues(blocks, quantizer),
    )
    table = own.sub("embed_tokens")
    head = table if decoder.tied else own.sub("lm_head")
    parts["llm"] = decoder_part(root.sub("model"), head, decoder)
    if prompt.image_token is None or prompt.image_token_id is None:
        raise UnsupportedConfig("image_token", None, f"the tokenizer has no {IMAGE_TOKEN}")
    settings = PromptSettings(
        image_token=prompt.image_token,
        image_token_id=prompt.image_token_id,
        chat_template=None,  # the language model's own knows no pictures
        special_tokens=dict(prompt.special_tokens),
        # Texts are the caller's to the last space, `<|endofchunk|>` included; bos is the tokenizer's.
        interleave=InterleaveSettings(None, "", None, strip=False),
    )
    return _model(parts, table, image, vision, resampler, settings, decoder)


def _layers(config: Config, count: int) -> tuple[int, ...]:
    """Which of the decoder's layers have a block before them."""
    key = "cross_attention_layers"
    found = config.get(key)
    known = isinstance(found, list) and all(type(layer) is int for layer in found)
    if not known or not found or sorted({*found} & {*range(count)}) != found:
        raise UnsupportedConfig(key, found, f"it should name some of the {count} layers, ascending")
    return tuple(found)


# -- both ---------------------------------------------------------------------------------------


def _image_parts(
    image: ImageSettings,
    vision: tower.TowerSettings,
    encoder: Weights,
    resampler: perceiver.ResamplerSettings | None,
    latents: Weights,
    media: MediaSettings,
    keys_values: Callable[[Quantizer], nn.Module],
) -> dict[str, Part]:
    """Vision, connector where there is a resampler, and media_kv.

    Args:
        encoder, latents: weights of the vision encoder and the resampler.
        keys_values: makes the module of media_kv.
    """
    features = vision.tokens, vision.width
    parts = {
        "vision": vision_part(
            image, features, lambda quantizer: tower.VisionTower(encoder, vision, quantizer)
        )
    }
    if resampler is not None:
        parts["connector"] = connector_part(
            features,
            (resampler.latents, vision.width),
            lambda quantizer: perceiver.Resampler(latents, resampler, quantizer),
        )
    parts["media_kv"] = media_part(vision.width, media, keys_values)
    return parts


def _model(
    parts: dict[str, Part],
    table: Weights,
    image: ImageSettings,
    vision: tower.TowerSettings,
    resampler: perceiver.ResamplerSettings | None,
    prompt: PromptSettings,
    decoder: Gated,
) -> Model:
    settings = decoder.settings()
    return Model(
        architecture="flamingo",
        parts=parts,
        embeddings=table.tensor("weight", settings.vocab_size, settings.width),
        image=image,
        tiling=SingleTile("single", vision.tokens if resampler is None else resampler.latents),
        prompt=prompt,
        decoder=settings,
    )
