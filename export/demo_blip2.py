"""The built-in demo BLIP-2: a DINOv2 ViT-S/14 and SmolLM2-135M-Instruct, joined by a Q-Former.

BLIP-2 reads one hidden state of its tower, so DINOv2 is cut after its fourth layer, where colour
and shape can both be read, and written as BLIP-2's ViT. The Q-Former was trained by
``vlm_edge.training.qformer`` in BLIP-2's two stages (arXiv:2301.12597) with both sides frozen. The
folder is an ordinary ``Blip2ForConditionalGeneration`` checkpoint.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

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

VISION_LAYERS = 4
QUERIES = 32
WEIGHTS, TEMPLATE = "blip2_qformer.safetensors", "blip2_chat_template.jinja"
QFORMER: dict[str, Any] = {
    "model_type": "blip_2_qformer", "hidden_size": 256, "num_hidden_layers": 4,
    "num_attention_heads": 4, "intermediate_size": 1024, "hidden_act": "gelu",
    "cross_attention_frequency": 2, "encoder_hidden_size": WIDTH, "layer_norm_eps": 1e-12,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    "use_qformer_text_input": False,
}  # fmt: skip


def model_config() -> dict[str, Any]:
    """The checkpoint's config.json."""
    vision = {
        "model_type": "blip_2_vision_model", "hidden_size": WIDTH, "intermediate_size": 4 * WIDTH,
        "num_hidden_layers": VISION_LAYERS, "num_attention_heads": HEADS, "hidden_act": "gelu",
        "image_size": IMAGE, "patch_size": PATCH, "layer_norm_eps": NORM_EPS, "qkv_bias": True,
        "attention_dropout": 0.0,
    }  # fmt: skip
    return {
        "architectures": ["Blip2ForConditionalGeneration"],
        "model_type": "blip-2",
        "dtype": "float32",
        "image_token_index": IMAGE_TOKEN_ID,
        "num_query_tokens": QUERIES,
        "image_text_hidden_size": 256,  # of retrieval, which this checkpoint has no weights for
        "tie_word_embeddings": True,
        "vision_config": vision,
        "qformer_config": QFORMER,
        "text_config": LANGUAGE,
    }


def tower(dinov2: Arrays) -> Arrays:
    """DINOv2's first layers as Blip2VisionModel's tensors, all but the norm after them.

    q, k and v become one projection; DINOv2's LayerScale, which BLIP-2's ViT lacks, goes into the
    linear layer before it.
    """
    found = {
        "embeddings.class_embedding": dinov2["embeddings.cls_token"],
        "embeddings.position_embedding": dinov2["embeddings.position_embeddings"],
    }
    patches = "embeddings.patch_embeddings.projection"
    for kind in ("weight", "bias"):
        found[f"embeddings.patch_embedding.{kind}"] = dinov2[f"{patches}.{kind}"]
    for number in range(VISION_LAYERS):
        old, new = f"encoder.layer.{number}", f"encoder.layers.{number}"
        after_attention = dinov2[f"{old}.layer_scale1.lambda1"]  # [width]
        after_mlp = dinov2[f"{old}.layer_scale2.lambda1"]
        for kind in ("weight", "bias"):

            def named(name: str, layer: str = old, kind: str = kind) -> np.ndarray:
                return dinov2[f"{layer}.{name}.{kind}"]

            def scaled(name: str, scale: np.ndarray) -> np.ndarray:
                array = named(name)
                return array * (scale[:, None] if array.ndim == 2 else scale)

            qkv = [named(f"attention.attention.{part}") for part in ("query", "key", "value")]
            found |= {
                f"{new}.layer_norm1.{kind}": named("norm1"),
                f"{new}.self_attn.qkv.{kind}": np.concatenate(qkv),
                f"{new}.self_attn.projection.{kind}": scaled(
                    "attention.output.dense", after_attention
                ),
                f"{new}.layer_norm2.{kind}": named("norm2"),
                f"{new}.mlp.fc1.{kind}": named("mlp.fc1"),
                f"{new}.mlp.fc2.{kind}": scaled("mlp.fc2", after_mlp),
            }
    return found


def tensors(parts: dict[str, Path]) -> Arrays:
    """The checkpoint's tensors, by its names."""
    from safetensors.numpy import load_file

    found = {
        f"language_model.model.{name}": array
        for name, array in language_tensors(parts["language"]).items()
    }
    for name, array in tower(vision_tensors(parts["vision"])).items():
        found[f"vision_model.{name}"] = array
    return found | load_file(DATA / WEIGHTS)


def side_files(gguf_path: Path) -> Files:
    """The checkpoint's text files: configuration, tokenizer, template, processor."""
    image_processor = {
        "image_processor_type": "BlipImageProcessor",
        "do_convert_rgb": True, "do_resize": True, "size": {"height": IMAGE, "width": IMAGE},
        "resample": 3,  # PIL's bicubic
        "do_rescale": True, "rescale_factor": 1 / 255,
        "do_normalize": True, "image_mean": MEAN, "image_std": STD,
    }  # fmt: skip
    owner = {"processor_class": "Blip2Processor"}
    return as_text(
        {
            "config.json": model_config(),
            "generation_config.json": GENERATION,
            "processor_config.json": owner
            | {"num_query_tokens": QUERIES, "image_processor": image_processor},
            "tokenizer_config.json": TOKENIZER | owner,
        },
        gguf_path,
        TEMPLATE,
    )


DEMO = Demo("blip2", Path(__file__), (WEIGHTS, TEMPLATE), "blip2_qformer.json", tensors, side_files)
