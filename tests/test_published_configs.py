"""config.json as published checkpoints have it: sizes, defaults left out, keys that mean nothing."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from vlm_edge.errors import UnsupportedConfig
from vlm_edge.export.config import Config
from vlm_edge.export.language import llama
from vlm_edge.export.vision import tower

CLIP_L = {
    "hidden_size": 1024, "image_size": 336, "intermediate_size": 4096,
    "model_type": "clip_vision_model", "num_attention_heads": 16, "num_hidden_layers": 24,
    "patch_size": 14, "projection_dim": 768, "vocab_size": 32000,
}  # fmt: skip

PUBLISHED: dict[str, dict[str, Any]] = {
    "llava-hf/llava-1.5-7b-hf": {
        "architectures": ["LlavaForConditionalGeneration"], "ignore_index": -100,
        "image_token_index": 32000, "model_type": "llava", "pad_token_id": 32001,
        "projector_hidden_act": "gelu",
        "text_config": {
            "_name_or_path": "lmsys/vicuna-7b-v1.5", "architectures": ["LlamaForCausalLM"],
            "max_position_embeddings": 4096, "model_type": "llama", "rms_norm_eps": 1e-05,
            "torch_dtype": "float16", "vocab_size": 32064,
        },
        "tie_word_embeddings": False, "torch_dtype": "float16",
        "transformers_version": "4.36.0.dev0", "vision_config": CLIP_L,
        "vision_feature_layer": -2, "vision_feature_select_strategy": "default",
        "vocab_size": 32064,
    },
    "a Mistral inside": {
        "image_token_index": 32000, "model_type": "llava", "projector_hidden_act": "gelu",
        "text_config": {
            "_name_or_path": "mistralai/Mistral-7B-Instruct-v0.2", "intermediate_size": 14336,
            "architectures": ["MistralForCausalLM"], "max_position_embeddings": 32768,
            "model_type": "mistral", "num_key_value_heads": 8, "rms_norm_eps": 1e-05,
            "rope_theta": 1000000.0, "sliding_window": None, "torch_dtype": "bfloat16",
            "vocab_size": 32064,
        },
        "vision_config": CLIP_L, "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default", "vocab_size": 32064,
    },
    "SigLIP and Qwen2": {
        "image_token_index": 151646, "model_type": "llava", "projector_hidden_act": "gelu",
        "text_config": {
            "_name_or_path": "Qwen/Qwen1.5-0.5B-Chat", "architectures": ["Qwen2ForCausalLM"],
            "bos_token_id": 151643, "eos_token_id": 151645, "hidden_size": 1024,
            "intermediate_size": 2816, "max_window_layers": 21, "model_type": "qwen2",
            "num_attention_heads": 16, "num_hidden_layers": 24, "num_key_value_heads": 16,
            "rope_theta": 1000000.0, "sliding_window": 32768, "torch_dtype": "bfloat16",
            "vocab_size": 152000,
        },
        "vision_config": {
            "hidden_size": 1152, "image_size": 384, "intermediate_size": 4304,
            "model_type": "siglip_vision_model", "num_attention_heads": 16,
            "num_hidden_layers": 26, "patch_size": 14, "vision_use_head": False,
        },
        "vision_feature_layer": -1, "vision_feature_select_strategy": "full",
    },
}  # fmt: skip

# What transformers 4 wrote into every sub-config when it wrote all keys.
GENERIC = {
    "_name_or_path": "", "add_cross_attention": False, "bad_words_ids": None,
    "chunk_size_feed_forward": 0, "diversity_penalty": 0.0, "do_sample": False,
    "encoder_no_repeat_ngram_size": 0, "id2label": {"0": "LABEL_0"}, "is_decoder": False,
    "label2id": {"LABEL_0": 0}, "length_penalty": 1.0, "max_length": 20, "min_length": 0,
    "num_beam_groups": 1, "num_beams": 1, "num_return_sequences": 1, "prefix": None,
    "pruned_heads": {}, "remove_invalid_values": False, "return_dict": True, "temperature": 1.0,
    "tf_legacy_loss": False, "top_k": 50, "top_p": 1.0, "torchscript": False, "typical_p": 1.0,
    "use_bfloat16": False,
}  # fmt: skip


def read(config: dict[str, Any]) -> tuple[tower.TowerSettings, llama.DecoderConfig]:
    side = config["vision_config"]["image_size"]
    return tower.read_tower(Config(config), side, side), llama.read(
        Config(config).sub("text_config")
    )


@pytest.mark.parametrize(
    ("name", "tokens", "vision_width", "layers", "heads", "kv_heads", "width", "positions"),
    [
        ("llava-hf/llava-1.5-7b-hf", 576, 1024, 32, 32, 32, 4096, 4096),
        ("a Mistral inside", 576, 1024, 32, 32, 8, 4096, 32768),
        ("SigLIP and Qwen2", 729, 1152, 24, 16, 16, 1024, 32768),
    ],
)
def test_sizes(
    name: str,
    tokens: int,
    vision_width: int,
    layers: int,
    heads: int,
    kv_heads: int,
    width: int,
    positions: int,
) -> None:
    vision, text = read(PUBLISHED[name])
    assert (vision.tokens, vision.width) == (tokens, vision_width)
    assert (text.layers, text.heads, text.kv_heads) == (layers, heads, kv_heads)
    assert (text.width, text.max_positions) == (width, positions)
    assert text.window is None
    assert text.qkv_bias == (name == "SigLIP and Qwen2")


@pytest.mark.parametrize("name", PUBLISHED)
def test_keys_that_transformers_4_wrote_everywhere_are_accepted(name: str) -> None:
    config = copy.deepcopy(PUBLISHED[name])
    config["text_config"] |= GENERIC
    config["vision_config"] |= GENERIC
    assert read(config) is not None


def test_an_encoder_we_do_not_have_is_named_with_those_we_have() -> None:
    config = copy.deepcopy(PUBLISHED["SigLIP and Qwen2"])
    config["vision_config"]["model_type"] = "pixtral"
    with pytest.raises(UnsupportedConfig, match=r"pixtral.*clip_vision_model.*siglip_vision_model"):
        read(config)
