"""BLIP-2 (Li et al. 2023, arXiv 2301.12597): EVA-ViT-g, Q-Former, and OPT, Flan-T5 or a Llama-type model.

Reference: transformers' Blip2ForConditionalGeneration and Blip2Processor.
"""

from __future__ import annotations

from dataclasses import replace

from vlm_edge.errors import UnsupportedConfig
from vlm_edge.export.checkpoint import Checkpoint, Weights, refuse_quantized
from vlm_edge.export.config import Config
from vlm_edge.export.connectors import qformer
from vlm_edge.export.connectors.qformer import QFormerSettings
from vlm_edge.export.language import models, t5
from vlm_edge.export.model import Model
from vlm_edge.export.parts import INSTRUCTION, image_parts
from vlm_edge.export.processor import Processor
from vlm_edge.export.prompt_files import PromptFiles
from vlm_edge.export.vision import eva
from vlm_edge.export.vision.patches import native_grid
from vlm_edge.runtime.manifest import CacheDtype, InstructionSettings, PromptSettings
from vlm_edge.runtime.tiling.settings import SingleTile

MODEL_TYPES = ("blip-2",)
RENAMES = models.RENAMES
# `generate` is the language model's own: what ends an answer is in text_config.
INNER_GENERATION = True


def read(
    checkpoint: Checkpoint,
    processor: Processor,
    prompt: PromptFiles,
    cache_dtype: CacheDtype = "float32",
) -> Model:
    """The checkpoint as vision, connector and llm; with Flan-T5 llm_encoder before llm.

    Args:
        cache_dtype: of the language model's keys and values.

    Raises:
        CheckpointError: config.json, the processor or a tensor is not what BLIP-2 needs.
    """
    return assemble("blip2", None, checkpoint, processor, prompt, cache_dtype)


def assemble(
    architecture: str,
    instruction: InstructionSettings | None,
    checkpoint: Checkpoint,
    processor: Processor,
    prompt: PromptFiles,
    cache_dtype: CacheDtype,
) -> Model:
    """What BLIP-2 and InstructBLIP share.

    Args:
        instruction: how the connector reads the prompt's text; None where it does not.
    """
    config, weights = checkpoint.config, Weights(checkpoint)
    refuse_quantized(config)
    if processor.split is not None or processor.pinpoints is not None:
        why = "BLIP-2 sees one tile; its processor is BlipImageProcessor"
        raise UnsupportedConfig("image_processor_type", processor.image_processor_type, why)
    image = processor.image
    vision = eva.read(config.sub("vision_config"))
    native_grid(replace(vision, height=image.height, breadth=image.width), "EVA")
    text = config.sub("text_config")
    language = models.read_language(text, weights, "opt", cache_dtype)
    connector = qformer.read(config, vision.width, language.state_width, language.settings.width)
    _check_places(processor, connector)
    settings = _prompt(config, prompt, instruction)
    decoder_only = text.get("model_type", "opt") not in t5.MODEL_TYPES
    why = "text_config's model_type says otherwise"
    config.only("use_decoder_only_language_model", decoder_only, decoder_only, why)
    config.get("tie_word_embeddings")  # the language model's own is the one that counts
    config.finish()

    tokens = 1 + vision.patches  # the class token is among them
    parts = image_parts(
        image,
        (tokens, vision.width),
        (connector.queries, language.settings.width),
        lambda quantizer: eva.Encoder(weights.sub("vision_model"), vision, quantizer),
        lambda quantizer: qformer.Connector(weights, connector, quantizer),
        extra=() if instruction is None else (INSTRUCTION,),
    )
    return Model(
        architecture=architecture,
        parts=parts | language.parts,
        embeddings=language.embeddings,
        image=image,
        tiling=SingleTile("single", connector.queries),
        prompt=settings,
        decoder=language.settings,
    )


def _check_places(processor: Processor, connector: QFormerSettings) -> None:
    """The places a picture takes in the prompt are the processor's own number, where it says one (those
    saved before 4.46 do not, and the model put its queries in front).

    Raises:
        UnsupportedConfig: the Q-Former has another number of queries.
    """
    if processor.num_query_tokens not in (None, connector.queries):
        raise UnsupportedConfig(
            "processor_config.json: num_query_tokens",
            processor.num_query_tokens,
            f"the Q-Former has {connector.queries} queries",
        )


def _prompt(
    config: Config, prompt: PromptFiles, instruction: InstructionSettings | None
) -> PromptSettings:
    """Raises UnsupportedConfig where config.json and the tokenizer do not agree on the image token."""
    index = config.get("image_token_index", config.get("image_token_id", prompt.image_token_id))
    config.get("image_token_id")
    if prompt.image_token is None or prompt.image_token_id != index:
        found = f"{prompt.image_token!r} with id {prompt.image_token_id}"
        raise UnsupportedConfig(
            "image_token_index", index, f"the tokenizer's image token is {found}"
        )
    return PromptSettings(
        image_token=prompt.image_token,
        image_token_id=index,
        chat_template="chat_template.jinja" if prompt.chat_template else None,
        special_tokens=dict(prompt.special_tokens),
        visual_tokens_first=True,
        instruction=instruction,
    )
