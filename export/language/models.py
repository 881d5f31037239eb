"""A checkpoint's language model of whatever family as engines, settings and token table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vlm_edge.export.checkpoint import TensorRef, Weights
from vlm_edge.export.config import Config
from vlm_edge.export.language import families, t5
from vlm_edge.export.language.interface import DecoderFamily, decoder_part
from vlm_edge.export.language.t5_encoder import encoder_part
from vlm_edge.export.model import Part
from vlm_edge.runtime.manifest import CacheDtype, DecoderSettings

# Names of Llama-type models and OPT, whose head stands beside the rest, as T5's does.
RENAMES = ((r"^language_model\.model\.(?:decoder\.)?", "language_model."),)


@dataclass(frozen=True)
class Language:
    """Parts in pipeline order, what the manifest says of them, and the token table.

    Attributes:
        state_width: hidden size, which connectors project to; that of inputs_embeds may be another.
    """

    parts: dict[str, Part]
    settings: DecoderSettings
    embeddings: TensorRef
    state_width: int


def read_language(
    text: Config, weights: Weights, default: Literal["llama", "opt"], cache_dtype: CacheDtype
) -> Language:
    """From text_config and the tensors that `RENAMES` has brought to one spelling.

    Args:
        weights: at the checkpoint's root.
        default: the family where text_config names none.

    Raises:
        CheckpointError: a value, key or tensor is not what the family needs.
    """
    stack = weights.sub("language_model")
    parts, table = dict[str, Part](), stack.sub("embed_tokens")
    config: DecoderFamily
    if text.get("model_type", default) in t5.MODEL_TYPES:
        config, table = t5.read(text, stack, cache_dtype), stack.sub("shared")
        parts["llm_encoder"] = encoder_part(stack, config)
    else:
        config = families.read(text, default, cache_dtype)
    settings, head = config.settings(), table if config.tied else stack.sub("lm_head")
    return Language(
        parts | {"llm": decoder_part(stack, head, config)},
        settings,
        table.tensor("weight", settings.vocab_size, settings.width),
        config.state_width,
    )
