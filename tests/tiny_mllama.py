"""Tiny checkpoints of Llama 3.2 Vision with random weights, as transformers 5 and 4 wrote them."""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tiny import LLAMA3, draw
from tiny_blip2 import PRETRAINED

VISION: dict[str, Any] = dict(
    hidden_size=24, intermediate_size=34, num_hidden_layers=4, num_global_layers=2, attention_heads=3,
    image_size=20, patch_size=7, norm_eps=1e-3, max_num_tiles=4, intermediate_layers_indices=[1, 3, 0],
    vision_output_dim=96,
)  # fmt: skip
TEXT: dict[str, Any] = dict(
    hidden_size=48, intermediate_size=70, num_hidden_layers=6, num_attention_heads=4,
    num_key_value_heads=2, cross_attention_layers=[1, 4], max_position_embeddings=256,
    rms_norm_eps=1e-3, pad_token_id=0,
)  # fmt: skip
# The published one without its tools: content is a text, or parts.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{% if message['content'] is string %}{{ message['content'] | trim }}{% else %}"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}{{ '<|image|>' }}"
    "{% elif content['type'] == 'text' %}{{ content['text'] | trim }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)


@dataclass(frozen=True)
class TinyMllama:
    """One checkpoint: what differs from the sizes above, and how its files are written.

    Attributes:
        spare: rows of the vocabulary that no token uses.
    """

    text_args: dict[str, Any] = field(default_factory=dict)
    vision_args: dict[str, Any] = field(default_factory=dict)
    images: dict[str, Any] = field(default_factory=dict)
    spare: int = 3
    layout: Literal["v5", "v4", "native"] = "v5"
    dtype: str = "float32"
    shard: str = "5GB"
    salt: int = 0


MLLAMA_CASES: dict[str, TinyMllama] = {
    "mllama": TinyMllama(text_args=dict(rope_parameters=LLAMA3)),
    "mllama-v4": TinyMllama(  # as Llama-3.2-11B-Vision-Instruct, a cross-attention layer first of all
        text_args=dict(
            rope_parameters=LLAMA3, cross_attention_layers=[0, 2, 5], num_hidden_layers=7
        ),
        layout="v4", dtype="bfloat16", shard="60KB", salt=1),
    "mllama-native": TinyMllama(  # tiles of 3 x 3 patches, up to six of them; no scaling of RoPE
        vision_args=dict(
            max_num_tiles=6, image_size=21, hidden_act="quick_gelu",
            intermediate_layers_indices=[-2], vision_output_dim=48,
        ),
        images={"resample": 3, "image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.25]},
        text_args=dict(
            num_key_value_heads=4, rope_parameters=dict(rope_type="default", rope_theta=10000.0)
        ),
        layout="native", dtype="float16", salt=2),
}  # fmt: skip


def build_mllama(name: str, folder: Path, spec: TinyMllama | None = None) -> Path:
    """Write the checkpoint `name` of MLLAMA_CASES (or `spec`, with the seed of `name`) into `folder`."""
    import torch
    import transformers

    spec = spec or MLLAMA_CASES[name]
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = mllama_tokenizer(spec.spare)
    config = config_of(spec, tokenizer)
    model = transformers.MllamaForConditionalGeneration(config)
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + spec.salt)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            parameter.copy_(_draw(parameter_name, parameter.shape, generator))
    model.generation_config.update(eos_token_id=[tokenizer.eos_token_id, 1], pad_token_id=0)
    model.to(getattr(torch, spec.dtype)).save_pretrained(
        folder, max_shard_size=spec.shard, save_original_format=spec.layout != "native"
    )
    vision = config.vision_config
    transformers.MllamaProcessor(
        transformers.MllamaImageProcessorPil(
            size={"height": vision.image_size, "width": vision.image_size},
            max_image_tiles=vision.max_num_tiles,
            **spec.images,
        ),
        tokenizer,
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)
    if spec.layout == "v4":
        _as_version_4(folder)
    return folder


def mllama_tokenizer(spare: int) -> Any:
    """As Llama 3's: bytes, bos in front of every text; `<|image|>` is behind the vocabulary, of which `spare`
    ids are reserved."""
    from tokenizers import processors
    from tokens import _bytes
    from transformers import PreTrainedTokenizerFast

    core = _bytes()
    named = ["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]
    named += [f"<|reserved_special_token_{index}|>" for index in range(spare)]
    core.add_special_tokens([*named, "<|python_tag|>", "<|image|>"])
    bos = "<|begin_of_text|>"
    core.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, core.token_to_id(bos))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=bos, eos_token="<|eot_id|>",
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def config_of(spec: TinyMllama, tokenizer: Any) -> Any:
    """The MllamaConfig of a case."""
    import transformers

    from vlm_edge.runtime.tiling.mllama import arrangements

    image = tokenizer.convert_tokens_to_ids("<|image|>")
    vision = {**VISION, **spec.vision_args}
    ratios = [list(grid) for grid in arrangements(vision["max_num_tiles"])]
    return transformers.MllamaConfig(
        vision_config=transformers.MllamaVisionConfig(supported_aspect_ratios=ratios, **vision),
        text_config=transformers.MllamaTextConfig(
            vocab_size=image, bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id, **{**TEXT, **spec.text_args},
        ),
        image_token_index=image,
    )  # fmt: skip


def _draw(name: str, shape: Any, generator: Any) -> Any:
    """As tiny.draw; gates of both signs, neither shut nor wide open."""
    import torch

    if "gate" in name and "gate_proj" not in name:
        return 0.8 * torch.randn(shape, generator=generator)
    if name.endswith("gated_positional_embedding.embedding"):
        return torch.randn(shape, generator=generator)
    return draw(name, shape, generator)


def _as_version_4(folder: Path) -> None:
    """Every default of PretrainedConfig in the nested configs, RoPE's keys, and the processor's file."""
    config = json.loads((folder / "config.json").read_text())
    dtype = config["torch_dtype"] = config.pop("dtype")
    for part in ("vision_config", "text_config"):
        inner = config[part]
        inner.pop("dtype", None)
        config[part] = PRETRAINED | inner | {"torch_dtype": dtype}
    text = config["text_config"]
    rope = text.pop("rope_parameters")
    text["rope_theta"] = rope.pop("rope_theta")
    text["rope_scaling"] = rope
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    path = folder / "processor_config.json"
    image = json.loads(path.read_text())["image_processor"]
    path.unlink()
    image |= {"image_processor_type": "MllamaImageProcessor", "processor_class": "MllamaProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(image, indent=1))
    path = folder / "chat_template.jinja"
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": path.read_text()}))
    path.unlink()
    path = folder / "tokenizer_config.json"
    tokenizer = json.loads(path.read_text())
    tokenizer.pop("backend")
    added = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    tokenizer["added_tokens_decoder"] = {str(token.pop("id")): token for token in added}
    tokenizer["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(tokenizer, indent=1))
