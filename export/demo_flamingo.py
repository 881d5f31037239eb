"""The built-in demo Flamingo: a DINOv2 ViT-S/14 and SmolLM2-135M-Instruct, joined by gated layers.

A Perceiver resampler reads the tower cut after its fourth layer, and three gated cross-attention
layers look at its latents from inside the language model (arXiv:2204.14198). They were trained by
``vlm_edge.training.flamingo`` with both sides frozen. The folder is an ordinary
``IdeficsForVisionText2Text`` checkpoint.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from vlm_edge.export import demo_blip2
from vlm_edge.export.demo_parts import (
    DATA,
    GENERATION,
    HEADS,
    IMAGE,
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
    tokenizer_json,
    vision_tensors,
)

VISION_LAYERS = demo_blip2.VISION_LAYERS
INTERVAL = 10  # a gated layer stands before every tenth of the thirty layers
LATENTS = 16
AROUND, IMAGE_TOKEN = "<fake_token_around_image>", "<image>"
ADDED = (AROUND, IMAGE_TOKEN)  # ids right after SmolLM2's vocabulary
WEIGHTS, TEMPLATE = "flamingo_gated.safetensors", "flamingo_chat_template.jinja"
SHIFT = "vision_model.shift"  # not of the checkpoint: see `without_norm`


def model_config() -> dict[str, Any]:
    """The checkpoint's config.json."""
    vision = {
        "model_type": "idefics_vision", "embed_dim": WIDTH, "intermediate_size": 4 * WIDTH,
        "num_hidden_layers": VISION_LAYERS, "num_attention_heads": HEADS, "hidden_act": "gelu",
        "image_size": IMAGE, "patch_size": PATCH, "num_channels": 3, "layer_norm_eps": NORM_EPS,
        "attention_dropout": 0.0,
    }  # fmt: skip
    perceiver = {
        "model_type": "idefics_perciever",  # its name in transformers
        "use_resampler": True, "resampler_n_latents": LATENTS, "resampler_depth": 1,
        "resampler_n_heads": 4, "resampler_head_dim": 64, "qk_layer_norms_perceiver": True,
    }  # fmt: skip
    same = (
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "hidden_act", "vocab_size", "rms_norm_eps", "max_position_embeddings",
        "tie_word_embeddings", "rope_parameters", "bos_token_id", "pad_token_id",
    )  # fmt: skip
    return {
        "architectures": ["IdeficsForVisionText2Text"],
        "model_type": "idefics",
        "dtype": "float32",
        **{name: LANGUAGE[name] for name in same},
        "eos_token_id": 0,  # the tokenizer's: after <|im_end|> the answer still sees the image
        "additional_vocab_size": len(ADDED),
        "cross_layer_interval": INTERVAL,
        "qk_layer_norms": True,
        "use_resampler": True,
        "alpha_type": "float",
        "alpha_initializer": "zeros",
        "dropout": 0.0,
        "vision_config": vision,
        "perceiver_config": perceiver,
    }


def without_norm(shift: np.ndarray) -> Arrays:
    """The weights [width] of a LayerNorm that gives x back, but for its mean, from x + `shift`.

    IDEFICS normalises what enters the tower, DINOv2 does not. A constant `shift` of mean 0, long
    beside x and across all directions in which x varies, gives every token nearly the same
    deviation, which the norm's weight takes back, as its bias does the shift. What is left over is
    |x|^2 / 2|shift| along the shift; the mean that is lost is lost in the tower's own norms too.
    """
    scale = np.linalg.norm(shift) / np.sqrt(len(shift))
    return {"weight": np.full_like(shift, scale), "bias": -shift}


def tower(dinov2: Arrays, shift: np.ndarray) -> Arrays:
    """DINOv2's first layers as IdeficsVisionTransformer's tensors."""
    found: Arrays = {}
    for name, array in demo_blip2.tower(dinov2).items():
        if ".qkv." in name:
            for part, rows in zip("qkv", np.split(array, 3), strict=True):
                found[name.replace("qkv", f"{part}_proj")] = rows
        else:
            found[name.replace("self_attn.projection", "self_attn.out_proj")] = array
    patch_bias = found.pop("embeddings.patch_embedding.bias")  # no place for it: into positions
    positions = found.pop("embeddings.position_embedding")[0] + shift
    positions[1:] += patch_bias
    found["embeddings.position_embedding.weight"] = positions
    found["embeddings.class_embedding"] = found["embeddings.class_embedding"].reshape(-1)
    found |= {f"pre_layrnorm.{kind}": array for kind, array in without_norm(shift).items()}
    # of the pooled output, which the model does not read
    return found | {"post_layernorm.weight": np.ones(WIDTH), "post_layernorm.bias": np.zeros(WIDTH)}


def repeat_heads(projection: np.ndarray) -> np.ndarray:
    """A key or value projection [kv heads * head_dim, width] with a head for each query head.

    IDEFICS has no grouped-query attention: three query heads share a key head, so it is there
    three times, and the model is exactly the same.
    """
    kv_heads, heads = LANGUAGE["num_key_value_heads"], LANGUAGE["num_attention_heads"]
    grouped = projection.reshape(kv_heads, -1, projection.shape[1])
    return grouped.repeat(heads // kv_heads, axis=0).reshape(-1, projection.shape[1])


def multiplied(trained: Arrays) -> Arrays:
    """The trained weights in float32, those of low rank (`.0` and then `.1`) multiplied out."""
    found = {}
    for name, array in trained.items():
        if name.endswith(".1.weight"):
            continue
        array = array.astype(np.float32)
        if name.endswith(".0.weight") and ".mlp." in name:
            name = name.removesuffix(".0.weight")
            array = trained[f"{name}.1.weight"].astype(np.float32) @ array
            name += ".weight"
        found[name] = array
    return found


def tensors(parts: dict[str, Path]) -> Arrays:
    """The checkpoint's tensors, by its names."""
    from safetensors.numpy import load_file

    found = {}
    for name, array in language_tensors(parts["language"]).items():
        shared = name.endswith(("k_proj.weight", "v_proj.weight"))
        found[name] = repeat_heads(array) if shared else array
    trained = multiplied(load_file(DATA / WEIGHTS))
    shift = trained.pop(SHIFT)
    for name, array in tower(vision_tensors(parts["vision"]), shift).items():
        found[f"vision_model.{name}"] = array
    return {f"model.{name}": array for name, array in (found | trained).items()}


def side_files(gguf_path: Path) -> Files:
    """The checkpoint's text files: configuration, tokenizer, template, processor."""
    image_processor = {
        "image_processor_type": "IdeficsImageProcessor", "image_num_channels": 3,
        "do_convert_rgb": True, "do_resize": True, "size": {"height": IMAGE, "width": IMAGE},
        "resample": 3,  # PIL's bicubic
        "do_rescale": True, "rescale_factor": 1 / 255,
        "do_normalize": True, "image_mean": MEAN, "image_std": STD,
    }  # fmt: skip
    owner = {"processor_class": "IdeficsProcessor"}
    files = as_text(
        {
            "config.json": model_config(),
            "generation_config.json": GENERATION,
            "preprocessor_config.json": image_processor | owner,
            "processor_config.json": owner | {"image_processor": image_processor},
            # IdeficsProcessor hides the image after an eos token, which <|im_end|> must not be
            "tokenizer_config.json": TOKENIZER | owner | {"eos_token": "<|endoftext|>"},
        },
        gguf_path,
        TEMPLATE,
    )
    return files | {"tokenizer.json": tokenizer_json(gguf_path, ADDED)}


DEMO = Demo(
    "flamingo", Path(__file__), (WEIGHTS, TEMPLATE), "flamingo_gated.json", tensors, side_files
)
