"""Tiny IDEFICS checkpoints with random weights, as transformers 5 and 4 wrote them.

Version 4 wrote the same tensor names, the first of them also buffers that are computed today; every default of
PretrainedConfig into the nested configs, whose model_type was "idefics" too; and an image processor of four
keys in a file of its own.
"""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tiny import draw
from tiny_blip2 import PRETRAINED
from tokens import tokenizer_of

VISION: dict[str, Any] = dict(
    embed_dim=36, intermediate_size=50, num_hidden_layers=3, num_attention_heads=3,
    image_size=30, patch_size=10, layer_norm_eps=1e-3,
)  # fmt: skip
PERCEIVER: dict[str, Any] = dict(
    resampler_depth=2, resampler_n_heads=3, resampler_head_dim=10, resampler_n_latents=7,
)  # fmt: skip
TEXT: dict[str, Any] = dict(
    hidden_size=48, intermediate_size=70, num_hidden_layers=4, num_attention_heads=4,
    max_position_embeddings=160, rms_norm_eps=1e-3,
)  # fmt: skip
FIRST = {  # keys of the published files that no model reads
    "cross_layer_activation_function": "swiglu", "ffn_dim": 64, "word_embed_proj_dim": 48,
    "max_new_tokens": 100, "max_sequence_length": 160,
}  # fmt: skip


@dataclass(frozen=True)
class TinyIdefics:
    """One checkpoint: what differs from the sizes above, and how its files are written.

    Attributes:
        additional: rows of the additional vocabulary, `<image>` the first of them; 0: all tokens are in
            the token table.
        utterances: the tokenizer has `<end_of_utterance>`.
    """

    text_args: dict[str, Any] = field(default_factory=dict)
    vision_args: dict[str, Any] = field(default_factory=dict)
    perceiver_args: dict[str, Any] | None = None  # None: no resampler
    every: int = 1
    qk_norms: bool = False
    alpha: Literal["float", "vector"] = "float"
    additional: int = 2
    tied: bool = False
    utterances: bool = False
    images: dict[str, Any] = field(default_factory=lambda: {"image_size": 30})
    layout: Literal["v5", "v4"] = "v5"
    dtype: str = "float32"
    shard: str = "5GB"
    salt: int = 0


IDEFICS_CASES: dict[str, TinyIdefics] = {
    "idefics": TinyIdefics(perceiver_args={}, every=2, qk_norms=True),  # as idefics-9b, but for sizes
    "idefics-v4": TinyIdefics(  # as idefics-9b-instruct
        perceiver_args=dict(qk_layer_norms_perceiver=True), every=4, qk_norms=True, additional=5,
        utterances=True, layout="v4", dtype="bfloat16", shard="60KB"),
    "idefics-plain": TinyIdefics(  # no resampler, a block before every layer, all in one table
        alpha="vector", additional=0, vision_args=dict(hidden_act="quick_gelu"),
        images={"size": {"height": 30, "width": 30}, "resample": 2, "image_mean": [0.4, 0.5, 0.6]}),
    "idefics-tied": TinyIdefics(
        perceiver_args=dict(resampler_depth=1, resampler_n_latents=1, resampler_n_heads=1), every=3,
        alpha="vector", additional=5, tied=True,
        text_args=dict(num_hidden_layers=6, hidden_size=40, num_attention_heads=5), salt=1),
    "idefics-tied-v4": TinyIdefics(
        alpha="vector", qk_norms=True, every=2, additional=0, tied=True, layout="v4",
        dtype="float16", vision_args=dict(embed_dim=40, num_attention_heads=5, patch_size=7)),
}  # fmt: skip


def build_idefics(name: str, folder: Path, spec: TinyIdefics | None = None) -> Path:
    """Write the checkpoint `name` of IDEFICS_CASES (or `spec`, with the seed of `name`) into `folder`."""
    import torch
    import transformers

    spec = spec or IDEFICS_CASES[name]
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = idefics_tokenizer(spec)
    model = transformers.IdeficsForVisionText2Text(config_of(spec, tokenizer))
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + spec.salt)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            parameter.copy_(_draw(parameter_name, parameter.shape, generator))
    model.to(getattr(torch, spec.dtype)).save_pretrained(folder, max_shard_size=spec.shard)
    transformers.IdeficsProcessor(
        transformers.IdeficsImageProcessorPil(**spec.images), tokenizer
    ).save_pretrained(folder)
    if spec.layout == "v4":
        _as_version_4(folder)
    return folder


def idefics_tokenizer(spec: TinyIdefics) -> Any:
    """Pieces as Llama's, then `<image>` and what stands around it."""
    tokenizer = tokenizer_of("pieces")  # <image> is its last token
    more = ["<end_of_utterance>"] if spec.utterances else []
    special = ["<image>", "<fake_token_around_image>", *more]
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.pad_token = "<unk>"  # the processor always pads
    return tokenizer


def config_of(spec: TinyIdefics, tokenizer: Any) -> Any:
    """The IdeficsConfig of a case."""
    import transformers

    image = tokenizer.convert_tokens_to_ids("<image>")
    return transformers.IdeficsConfig(
        vision_config={**VISION, **spec.vision_args},
        perceiver_config={**PERCEIVER, **(spec.perceiver_args or {})},
        use_resampler=spec.perceiver_args is not None,
        vocab_size=image if spec.additional else len(tokenizer) + 3,
        additional_vocab_size=spec.additional,
        cross_layer_interval=spec.every,
        qk_layer_norms=spec.qk_norms,
        alpha_type=spec.alpha,
        tie_word_embeddings=spec.tied,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=0,
        **{**TEXT, **spec.text_args},
    )


def _draw(name: str, shape: Any, generator: Any) -> Any:
    """As tiny.draw; gates of both signs, neither shut nor wide open."""
    noise = draw(name, shape, generator)
    if "alpha" in name:
        import torch

        return 0.8 * torch.randn(shape, generator=generator)
    if name.endswith("latents"):
        return noise * shape[-1] ** 0.5 / 1.5
    return noise


def _as_version_4(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["torch_dtype"] = config.pop("dtype")
    del config["rope_parameters"]
    for part in ("vision_config", "perceiver_config"):
        config[part] = PRETRAINED | config[part] | {"model_type": "idefics"}
    config["vision_config"]["vision_model_name"] = "somebody/CLIP-ViT-H-14"
    config |= FIRST
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    _add_buffers(folder)
    path = folder / "processor_config.json"
    image = json.loads(path.read_text())["image_processor"]
    path.unlink()
    kept = ("image_mean", "image_std", "image_num_channels", "image_size", "image_processor_type")
    image = {key: image[key] for key in kept} | {"processor_class": "IdeficsProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(image, indent=1))
    path = folder / "tokenizer_config.json"
    tokenizer = json.loads(path.read_text())
    tokenizer.pop("backend")
    tokenizer["additional_special_tokens"] = tokenizer.pop("extra_special_tokens")
    added = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    tokenizer["added_tokens_decoder"] = {str(token.pop("id")): token for token in added}
    tokenizer["tokenizer_class"] = "LlamaTokenizer"
    path.write_text(json.dumps(tokenizer, indent=1))


def _add_buffers(folder: Path) -> None:
    import numpy as np
    from safetensors.numpy import save_file

    buffers = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(6, np.float32),
        "model.vision_model.embeddings.position_ids": np.arange(10)[None],
    }
    index, name = folder / "model.safetensors.index.json", "buffers.safetensors"
    if index.is_file():
        save_file(buffers, folder / name, metadata={"format": "pt"})
        data = json.loads(index.read_text())
        data["weight_map"] |= dict.fromkeys(buffers, name)
        index.write_text(json.dumps(data))
