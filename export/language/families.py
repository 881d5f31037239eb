"""Decoder-only language models by the model_type that a text_config names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from vlm_edge.export.config import Config
from vlm_edge.export.language import gpt_neox, llama, mpt, opt
from vlm_edge.export.language.interface import DecoderFamily
from vlm_edge.runtime.manifest import CacheDtype

READERS: dict[str, Callable[[Config, CacheDtype], DecoderFamily]] = {
    **dict.fromkeys(llama.MODEL_TYPES, llama.read),
    **dict.fromkeys(opt.MODEL_TYPES, opt.read),
    **dict.fromkeys(gpt_neox.MODEL_TYPES, gpt_neox.read),
    **dict.fromkeys(mpt.MODEL_TYPES, mpt.read),
}


def read(
    config: Config, default: Literal["llama", "opt"], cache_dtype: CacheDtype = "float32"
) -> DecoderFamily:
    """text_config of a language model, and how its cache is to be stored.

    Args:
        default: what it is where it names no model_type: llama in LLaVA, opt in BLIP-2.

    Raises:
        UnsupportedConfig: a model_type we do not have, or a value or key the graph cannot honour.
    """
    return READERS[config.choice("model_type", default, READERS)](config, cache_dtype)
