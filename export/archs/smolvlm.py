"""Idefics3 (Laurençon et al. 2024, arXiv 2408.12637), SmolVLM and SmolVLM2 (Marafioti et al. 2025, arXiv
2504.05299): SigLIP on tiles, pixel shuffle, a Llama-type decoder. Pictures only: video is not read.

Reference: transformers' Idefics3ForConditionalGeneration and SmolVLMForConditionalGeneration (one model
under two names), Idefics3Processor and SmolVLMProcessor.
"""

from __future__ import annotations

import tokenizers

from vlm_edge.errors import UnsupportedConfig
from vlm_edge.export.checkpoint import Checkpoint, Weights, refuse_quantized
from vlm_edge.export.config import Config
from vlm_edge.export.connectors import pixel_shuffle
from vlm_edge.export.language import llama
from vlm_edge.export.language.interface import decoder_part, decoder_settings
from vlm_edge.export.model import Model
from vlm_edge.export.parts import image_parts
from vlm_edge.export.processor import Processor
from vlm_edge.export.prompt_files import PromptFiles
from vlm_edge.export.vision import idefics3
from vlm_edge.runtime.manifest import CacheDtype, PromptSettings
from vlm_edge.runtime.tiling.settings import Split

MODEL_TYPES = ("idefics3", "smolvlm")

RENAMES = ((r"^model\.(?=vision_model\.|connector\.|text_model\.)", ""),)

# Keys of the published text_config that come from the training code and that transformers never reads.
_TRAINING = (
    "_flash_attn_2_enabled", "is_llama_config", "neftune_noise_alpha", "perceiver_config",
    "pixel_shuffle_factor", "transformers.js_config",
)  # fmt: skip
IMAGE_SEQ_LEN = 169  # of a processor_config.json that does not say


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
        CheckpointError: config.json, the processor or a tensor is not what Idefics3 needs.
    """
    config, weights = checkpoint.config, Weights(checkpoint)
    refuse_quantized(config)
    image, split = processor.image, processor.split
    if split is None or image.resize is None:
        why = "tiles of Idefics3 are made by Idefics3ImageProcessor or SmolVLMImageProcessor"
        raise UnsupportedConfig("image_processor_type", processor.image_processor_type, why)
    vision = idefics3.read(config.sub("vision_config"), image.height)
    text = config.sub("text_config")
    for key in _TRAINING:
        text.get(key)
    decoder = llama.read(text, cache_dtype)
    connector = pixel_shuffle.read(config, vision.width, decoder.width, vision.grid)
    _check_places(processor, connector)
    settings = _prompt(config, prompt)
    fake_token, global_token = _announcing(config, processor, prompt)
    # Version 5 heeds the whole model's word alone; version 4 heeded text_config's and wrote no head then.
    tied = config.flag("tie_word_embeddings", False)
    tied = tied or (decoder.tied and not weights.has("lm_head.weight"))
    config.get("vocab_size")  # repeats text_config's, which is the one that counts
    config.get("_pad_token_id")  # of training
    config.get("use_reentrant_checkpointing")
    config.get("transformers.js_config")
    config.finish()

    table = weights.sub("text_model").sub("embed_tokens")
    head = table if tied else weights.sub("lm_head")
    parts = image_parts(
        image,
        (vision.patches, vision.width),
        (connector.tokens, decoder.width),
        lambda quantizer: idefics3.Encoder(weights.sub("vision_model"), vision, quantizer),
        lambda quantizer: pixel_shuffle.Connector(weights.sub("connector"), connector, quantizer),
    )
    parts["llm"] = decoder_part(weights.sub("text_model"), head, decoder)
    return Model(
        architecture="smolvlm",
        parts=parts,
        embeddings=table.tensor("weight", decoder.vocab_size, decoder.width),
        image=image,
        tiling=Split(
            "split",
            tokens=connector.tokens,
            longest_edge=split.longest_edge,
            split=split.split,
            resample=image.resize.resample,
            fake_token=fake_token,
            global_token=global_token,
        ),
        prompt=settings,
        decoder=decoder_settings(decoder),
    )


def _check_places(processor: Processor, connector: pixel_shuffle.ShuffleSettings) -> None:
    """The places a tile takes in the prompt are the processor's own number.

    Raises:
        UnsupportedConfig: the connector makes another number of tokens.
    """
    places = processor.image_seq_len or IMAGE_SEQ_LEN
    if places != connector.tokens:
        (rows, columns), factor = connector.grid, connector.factor
        raise UnsupportedConfig(
            "processor_config.json: image_seq_len",
            processor.image_seq_len,
            f"the processor makes {places} places for a tile, the connector {connector.tokens} tokens of "
            f"its {rows} x {columns} patches by scale_factor {factor}",
        )


def _prompt(config: Config, prompt: PromptFiles) -> PromptSettings:
    """The image token, which config.json and the tokenizer must agree on.

    Raises:
        UnsupportedConfig: they do not.
    """
    index = config.size("image_token_id", 128257)
    if prompt.image_token is None or prompt.image_token_id != index:
        found = f"{prompt.image_token!r} with id {prompt.image_token_id}"
        raise UnsupportedConfig("image_token_id", index, f"the tokenizer's image token is {found}")
    return PromptSettings(
        image_token=prompt.image_token,
        image_token_id=index,
        chat_template="chat_template.jinja" if prompt.chat_template else None,
        special_tokens=dict(prompt.special_tokens),
    )


def _announcing(config: Config, processor: Processor, prompt: PromptFiles) -> tuple[str, str]:
    """What stands around tiles and before the overview: SmolVLMProcessor asks the tokenizer for their
    names, Idefics3Processor has them fixed and adds to the vocabulary what is not there.

    Raises:
        UnsupportedConfig: the vocabulary lacks one that Idefics3Processor would add.
    """
    fake, overview = "<fake_token_around_image>", "<global-img>"
    names = {"idefics3": "Idefics3Processor", "smolvlm": "SmolVLMProcessor"}
    if (processor.processor_class or names[config.get("model_type")]) == "SmolVLMProcessor":
        tokens = prompt.special_tokens
        return tokens.get("fake_image_token", fake), tokens.get("global_image_token", overview)
    vocabulary = tokenizers.Tokenizer.from_str(prompt.tokenizer_json)
    for token in (fake, "<image>", "<end_of_utterance>"):
        if vocabulary.token_to_id(token) is None:
            why = "the tokenizer lacks it; write it once with Idefics3Processor.save_pretrained"
            raise UnsupportedConfig("tokenizer.json", token, why)
    return fake, overview
