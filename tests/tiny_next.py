"""Tiny LLaVA-NeXT checkpoints with random weights: encoders, language models and file layouts in which
published ones come."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tiny import LLAMA3, Tiny

# As the published ones, of tiles of 30 pixels: 9 tokens each.
SHAPES = [[30, 60], [60, 30], [60, 60], [90, 30], [30, 90]]


def _next(**differences: Any) -> Tiny:
    shared = Tiny(family="llava_next", processor="LlavaNextImageProcessor", pinpoints=SHAPES)
    return replace(shared, **differences)


CASES: dict[str, Tiny] = {
    "next-clip-mistral": _next(  # as llava-v1.6-mistral-7b
        text="mistral", text_args=dict(num_attention_heads=6, num_key_value_heads=2,
                                       sliding_window=None), template="mistral"),
    "next-clip-vicuna-v4": _next(  # as llava-v1.6-vicuna-7b in half precision, several files
        dtype="float16", layout="v4", shard="60KB"),
    "next-siglip-qwen2": _next(  # all tokens, patches that leave a rest of the tile, no centre crop
        vision="siglip", text="qwen2", text_args=dict(
            num_attention_heads=6, num_key_value_heads=3, tie_word_embeddings=True),
        layer=-1, strategy="full", tokenizer="bytes", dtype="bfloat16",
        images={"size": {"height": 32, "width": 32}, "crop_size": None, "do_center_crop": False,
                "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 2},
        pinpoints=[[64, 64], [32, 128], [96, 64], [32, 64]], salt=8),
    "next-clip-llama3-v4": _next(  # as llama3-llava-next-8b
        text_args=dict(num_attention_heads=6, num_key_value_heads=2, rope_parameters=LLAMA3),
        tokenizer="bytes", layout="v4", dtype="bfloat16"),
    # Tiles of 100 tokens, so prompts of several prefill chunks; tiles and overview are resized and cropped
    # once more.
    "next-fine-native": _next(
        vision_args=dict(image_size=40, patch_size=4), text_args=dict(
            num_key_value_heads=2, max_position_embeddings=4096), layer=[-2, -1],
        images={"size": {"shortest_edge": 44}, "crop_size": {"height": 40, "width": 40},
                "resample": 1},
        pinpoints=[[80, 80], [120, 120], [160, 40], [40, 160]], layout="native", dtype="float16",
        salt=2),
    "next-defaults": _next(  # nothing said: transformers' own resolutions
        vision_args=dict(image_size=336, patch_size=112), pinpoints=None,
        images={"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}, salt=3),
}  # fmt: skip
