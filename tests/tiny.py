"""Tiny LLaVA checkpoints with random weights, written as transformers writes them today and did before 5.

What `vision_feature_layer` selects, measured on transformers 5.23 with forward hooks: `hidden_states`
has one entry more than the encoder has layers; [0] is the input of the first layer (in CLIP after
`pre_layrnorm`), [i] the output of layer i - 1, and [-1] the output of the last layer WITHOUT the final
norm, for CLIP, SigLIP and DINOv2 alike (`capture_outputs(tie_last_hidden_states=False)`). So
`post_layernorm`, DINOv2's `layernorm` and SigLIP's `head` are in the files and never applied.

Weights are drawn so that a wrong detail shows: transformers starts biases at 0, norms at 1 and all
else near 0, which hides a dropped bias, a swapped norm or a wrong epsilon.
"""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tokens import CHAT_TEMPLATES, tokenizer_of

Layout = Literal["v5", "v4", "native"]

# The sizes are odd on purpose: no powers of two, head counts that divide nothing else.
VISION: dict[str, dict[str, Any]] = {
    "clip": dict(hidden_size=36, intermediate_size=50, num_hidden_layers=3, num_attention_heads=3,
                 image_size=30, patch_size=10, layer_norm_eps=1e-3),
    "siglip": dict(hidden_size=40, intermediate_size=46, num_hidden_layers=3, num_attention_heads=5,
                   image_size=32, patch_size=10, layer_norm_eps=1e-3),
    "dinov2": dict(hidden_size=36, mlp_ratio=2, num_hidden_layers=3, num_attention_heads=3,
                   image_size=35, patch_size=7, layer_norm_eps=1e-3),
}  # fmt: skip
TEXT: dict[str, Any] = dict(
    hidden_size=48, intermediate_size=70, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=4, max_position_embeddings=640, rms_norm_eps=1e-3,
)  # fmt: skip
CLIP_IMAGES = {"size": {"shortest_edge": 30}, "crop_size": {"height": 30, "width": 30}}
SIGLIP_IMAGES = {"size": {"height": 32, "width": 32}}
DINO_IMAGES = {"size": {"shortest_edge": 32}, "crop_size": {"height": 28, "width": 28}}


@dataclass(frozen=True)
class Tiny:
    """One checkpoint: what differs from the sizes above, and how its files are written."""

    family: Literal["llava", "llava_next"] = "llava"
    vision: Literal["clip", "siglip", "dinov2"] = "clip"
    vision_args: dict[str, Any] = field(default_factory=dict)
    text: Literal["llama", "mistral", "qwen2"] = "llama"
    text_args: dict[str, Any] = field(default_factory=dict)
    layer: int | list[int] = -2
    strategy: Literal["default", "full"] = "default"
    projector_bias: bool = True
    projector_act: str = "gelu"
    processor: str = "CLIPImageProcessor"
    images: dict[str, Any] = field(default_factory=lambda: dict(CLIP_IMAGES))
    pinpoints: list[list[int]] | None = None  # of LLaVA-NeXT
    tokenizer: Literal["pieces", "bytes"] = "pieces"
    template: str | None = None  # of tokens.CHAT_TEMPLATES; None: the tokenizer's
    generation: dict[str, Any] = field(default_factory=dict)
    dtype: str = "float32"
    layout: Layout = "v5"
    shard: str = "5GB"  # max_shard_size of save_pretrained
    vocab_padding: int = 5  # rows of the token table that no token uses
    salt: int = 0  # changes the weights; chosen so that greedy tokens vary and are not near-ties


LLAMA3 = dict(rope_type="llama3", rope_theta=500000.0, factor=4.0, low_freq_factor=1.0,
              high_freq_factor=4.0, original_max_position_embeddings=64)  # fmt: skip
YARN = dict(rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=160)
LINEAR = dict(rope_type="linear", rope_theta=10000.0, factor=3.0)
DYNAMIC = dict(rope_type="dynamic", rope_theta=10000.0, factor=2.0)

CASES: dict[str, Tiny] = {
    "clip-llama": Tiny(),
    "clip-llama-v4": Tiny(  # as llava-hf/llava-1.5: GQA, half precision, several files
        vision_args=dict(hidden_act="gelu"), text_args=dict(
            num_attention_heads=6, num_key_value_heads=2, rope_parameters=LINEAR),
        projector_bias=False, dtype="float16", layout="v4", shard="60KB", salt=1),
    "clip-llama-native": Tiny(  # MQA, a head_dim that is not hidden / heads, two layers joined
        text_args=dict(hidden_size=40, num_attention_heads=5, num_key_value_heads=1, head_dim=12,
                       rope_parameters=LLAMA3),
        layer=[-3, -1], projector_act="relu", dtype="bfloat16", layout="native", shard="60KB",
        salt=2),
    "clip-llama-biases": Tiny(
        vision_args=dict(image_size=32), text_args=dict(
            attention_bias=True, mlp_bias=True,
            rope_parameters=dict(rope_type="default", rope_theta=500000.0)),
        strategy="full", layer=-1, projector_act="gelu_pytorch_tanh",
        images={"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32},
                "resample": 1}),
    "clip-mistral-window": Tiny(  # every query sees fewer keys than the prompt has
        text="mistral", text_args=dict(num_attention_heads=6, num_key_value_heads=2,
                                       sliding_window=11), tokenizer="bytes"),
    "clip-mistral-v4": Tiny(
        text="mistral", text_args=dict(hidden_size=40, num_attention_heads=5, num_key_value_heads=1,
                                       head_dim=10, sliding_window=None),
        layout="v4", layer=2, template="mistral", salt=1),
    "clip-padded-square": Tiny(  # images smaller than the crop, padded to squares first
        processor="LlavaImageProcessor", images={
            "size": {"shortest_edge": 24}, "crop_size": {"height": 30, "width": 30},
            "do_pad": True, "resample": 2, "image_mean": [0.4, 0.5, 0.6],
            "image_std": [0.2, 0.3, 0.25]},
        text_args=dict(rope_parameters=DYNAMIC), vocab_padding=0),
    "siglip-qwen2": Tiny(  # the first layer sees everything, the second a window
        vision="siglip", text="qwen2", text_args=dict(
            num_attention_heads=6, num_key_value_heads=3, tie_word_embeddings=True,
            use_sliding_window=True, sliding_window=9, max_window_layers=1),
        layer=-1, strategy="full", processor="SiglipImageProcessor", images=SIGLIP_IMAGES,
        tokenizer="bytes", dtype="bfloat16"),
    "siglip-qwen2-v4": Tiny(
        vision="siglip", vision_args=dict(vision_use_head=False), text="qwen2", text_args=dict(
            num_key_value_heads=2, use_sliding_window=False, sliding_window=32, max_window_layers=1),
        layer=[1], strategy="full", projector_act="silu", processor="SiglipImageProcessor",
        images=SIGLIP_IMAGES, tokenizer="bytes", layout="v4",
        generation={"repetition_penalty": 1.3}, salt=1),
    "siglip-llama-yarn-v4": Tiny(
        vision="siglip", vision_args=dict(hidden_act="gelu"), text_args=dict(
            tie_word_embeddings=True, rope_parameters=YARN),
        layer=1, strategy="full", processor="SiglipImageProcessor",
        images={**SIGLIP_IMAGES, "do_normalize": False}, layout="v4"),
    "dinov2-llama": Tiny(  # as the demo model: tied SmolLM2, positions interpolated 5x5 -> 4x4
        vision="dinov2", text_args=dict(num_attention_heads=3, num_key_value_heads=1,
                                        tie_word_embeddings=True),
        layer=-1, processor="BitImageProcessor", images=DINO_IMAGES, tokenizer="bytes"),
    "dinov2-swiglu": Tiny(  # [gate; up] in one tensor, positions 5x5 -> 4x6, all layers joined
        vision="dinov2", vision_args=dict(use_swiglu_ffn=True, qkv_bias=False),
        text_args=dict(rope_parameters=dict(YARN, attention_factor=1.3, beta_fast=8.0, beta_slow=2.0,
                                            truncate=False)),
        layer=[1, 2, -1], strategy="full", processor="BitImageProcessor",
        images={"size": {"height": 28, "width": 42}, "do_center_crop": False}),
    "dinov2-swiglu-native": Tiny(
        vision="dinov2", vision_args=dict(use_swiglu_ffn=True, image_size=28), text_args=dict(
            num_attention_heads=6, num_key_value_heads=2), processor="BitImageProcessor",
        images=DINO_IMAGES, layout="native"),
}  # fmt: skip


# family -> what transformers' classes begin with
CLASSES = {"llava": "Llava", "llava_next": "LlavaNext"}


def build(name: str, folder: Path, spec: Tiny | None = None) -> Path:
    """Write the checkpoint `name` of CASES or tiny_next.CASES (or `spec`, with the seed of `name`) into
    `folder`."""
    import tiny_next
    import torch
    import transformers

    spec = spec or {**CASES, **tiny_next.CASES}[name]
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = tokenizer_of(spec.tokenizer)
    config = config_of(spec, tokenizer)
    model = getattr(transformers, f"{CLASSES[spec.family]}ForConditionalGeneration")(config)
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + spec.salt)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            parameter.copy_(draw(parameter_name, parameter.shape, generator))
    model.generation_config.update(
        eos_token_id=config.text_config.eos_token_id, pad_token_id=0, **spec.generation
    )
    model.to(getattr(torch, spec.dtype)).save_pretrained(
        folder, max_shard_size=spec.shard, save_original_format=spec.layout != "native"
    )
    processor_of(spec, tokenizer).save_pretrained(folder)
    if spec.layout == "native":  # the other spelling that LlavaConfig reads
        edit_json(folder / "config.json", "image_token_id", config.image_token_index)
        edit_json(folder / "config.json", "image_token_index", ...)
    if spec.layout == "v4":
        from layout4 import rewrite

        rewrite(folder)
    return folder


def config_of(spec: Tiny, tokenizer: Any) -> Any:
    """The LlavaConfig or LlavaNextConfig of a case."""
    import transformers

    vision_class = {"clip": "CLIPVisionConfig", "siglip": "SiglipVisionConfig",
                    "dinov2": "Dinov2Config"}[spec.vision]  # fmt: skip
    text_class = {"llama": "LlamaConfig", "mistral": "MistralConfig", "qwen2": "Qwen2Config"}
    text = getattr(transformers, text_class[spec.text])(
        vocab_size=len(tokenizer) + spec.vocab_padding,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **{**TEXT, **spec.text_args},
    )
    tiling = {} if spec.pinpoints is None else {"image_grid_pinpoints": spec.pinpoints}
    return getattr(transformers, f"{CLASSES[spec.family]}Config")(
        vision_config=getattr(transformers, vision_class)(
            **{**VISION[spec.vision], **spec.vision_args}
        ),
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=spec.layer,
        vision_feature_select_strategy=spec.strategy,
        multimodal_projector_bias=spec.projector_bias,
        projector_hidden_act=spec.projector_act,
        tie_word_embeddings=text.tie_word_embeddings,
        **tiling,
    )


def draw(name: str, shape: Any, generator: Any) -> Any:
    """A random tensor for the parameter `name`, scaled so that activations and logits are of order 1.

    The token table is small beside what the layers add to it: with tied weights a large one makes
    every model repeat its last token.
    """
    import torch

    noise = torch.randn(shape, generator=generator)
    if name.endswith("bias"):
        return 0.3 * noise
    if "image_newline" in name:
        return noise
    if len(shape) == 1 and "class_embedding" not in name:  # norms, layer scales
        return 1 + 0.4 * noise
    if "lm_head" in name:
        return noise * 3 / shape[-1] ** 0.5
    if "embed_tokens" in name:
        return noise * 0.4
    if "embedding" in name and "patch_embedding" not in name or "token" in name:
        return noise
    fan_in = noise[0].numel()
    return noise * 1.5 / fan_in**0.5


def processor_of(spec: Tiny, tokenizer: Any) -> Any:
    """The processor of a case: its image processor, its tokenizer and a chat template."""
    import transformers

    tiling = {} if spec.pinpoints is None else {"image_grid_pinpoints": spec.pinpoints}
    return getattr(transformers, f"{CLASSES[spec.family]}Processor")(
        image_processor=getattr(transformers, spec.processor + "Pil")(**spec.images, **tiling),
        tokenizer=tokenizer,
        patch_size={**VISION[spec.vision], **spec.vision_args}["patch_size"],
        vision_feature_select_strategy=spec.strategy,
        num_additional_image_tokens=0 if spec.vision == "siglip" else 1,  # the class token
        chat_template=CHAT_TEMPLATES[spec.template or spec.tokenizer],
    )


def edit_json(path: Path, key: str, value: Any) -> None:
    """Set `key` of a JSON file, dots leading down; the value `...` removes it."""
    data = json.loads(path.read_text(encoding="utf-8"))
    *parents, last = key.split(".")
    inner = data
    for parent in parents:
        inner = inner[parent]
    if value is ...:
        del inner[last]
    else:
        inner[last] = value
    path.write_text(json.dumps(data, indent=1), encoding="utf-8")
