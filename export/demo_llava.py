"""The built-in demo LLaVA: a DINOv2 ViT-S/14 and SmolLM2-135M-Instruct, joined by an MLP.

The connector was trained by ``vlm_edge.training.connector`` with both of them frozen (stage 1 of
LLaVA, arXiv:2304.08485). The folder is an ordinary ``LlavaForConditionalGeneration`` checkpoint.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vlm_edge.export.demo_parts import (
    DATA,
    GENERATION,
    HEADS,
    IMAGE,
    IMAGE_TOKEN_ID,
    LANGUAGE,
    MEAN,
    NORM_EPS,
    PATCH,
    STD,
    TOKENIZER,
    WIDTH,
    Arrays,
    Demo,
    Files,
    as_text,
    language_tensors,
    vision_tensors,
)

FEATURE_LAYERS = (2, 6, 10)  # an early layer for colour; never the last, which saliency tuned
WEIGHTS, TEMPLATE = "llava_connector.safetensors", "chat_template.jinja"


def model_config() -> dict[str, Any]:
    """The checkpoint's config.json."""
    vision = {
        "model_type": "dinov2", "hidden_size": WIDTH, "num_hidden_layers": 12,
        "num_attention_heads": HEADS, "mlp_ratio": 4, "hidden_act": "gelu", "qkv_bias": True,
        "layer_norm_eps": NORM_EPS, "image_size": IMAGE, "patch_size": PATCH, "num_channels": 3,
        "layerscale_value": 1.0, "use_swiglu_ffn": False,
    }  # fmt: skip
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "dtype": "float32",
        "image_token_index": IMAGE_TOKEN_ID,
        "image_seq_length": (IMAGE // PATCH) ** 2,
        "vision_feature_layer": list(FEATURE_LAYERS),
        "vision_feature_select_strategy": "default",
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "tie_word_embeddings": True,
        "vision_config": vision,
        "text_config": LANGUAGE,
    }


def tensors(parts: dict[str, Path]) -> Arrays:
    """The checkpoint's tensors, by its names."""
    from safetensors.numpy import load_file

    found: Arrays = {}
    for prefix, part in (
        ("language_model", language_tensors(parts["language"])),
        ("vision_tower", vision_tensors(parts["vision"])),
        ("multi_modal_projector", load_file(DATA / WEIGHTS)),
    ):
        found |= {f"model.{prefix}.{name}": array for name, array in part.items()}
    return found


def side_files(gguf_path: Path) -> Files:
    """The checkpoint's text files: configuration, tokenizer, template, processor."""
    image_processor = {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True, "do_resize": True, "size": {"shortest_edge": IMAGE},
        "resample": 3,  # PIL's bicubic
        "do_center_crop": True, "crop_size": {"height": IMAGE, "width": IMAGE},
        "do_rescale": True, "rescale_factor": 1 / 255,
        "do_normalize": True, "image_mean": MEAN, "image_std": STD,
    }  # fmt: skip
    processor = {
        "processor_class": "LlavaProcessor", "image_token": "<image>", "patch_size": PATCH,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,  # the CLS token, which "default" takes away again
    }  # fmt: skip
    owner = {"processor_class": "LlavaProcessor"}
    special = {"extra_special_tokens": {"image_token": "<image>"}}
    return as_text(
        {
            "config.json": model_config(),
            "generation_config.json": GENERATION,
            "preprocessor_config.json": image_processor | owner,
            "processor_config.json": processor | {"image_processor": image_processor},
            "tokenizer_config.json": TOKENIZER | owner | special,
        },
        gguf_path,
        TEMPLATE,
    )


DEMO = Demo(
    "llava", Path(__file__), (WEIGHTS, TEMPLATE), "llava_connector.json", tensors, side_files
)
