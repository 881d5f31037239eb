"""Rewrites a checkpoint that transformers 5 saved into the files transformers 4 would have written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

TYPES = {
    "clip_vision_model": "CLIPVisionConfig",
    "siglip_vision_model": "SiglipVisionConfig",
    "dinov2": "Dinov2Config",
    "llama": "LlamaConfig",
    "mistral": "MistralConfig",
    "qwen2": "Qwen2Config",
}

OLD_ROPES = ("linear", "dynamic")


def rewrite(folder: Path) -> None:
    """Tensor names, config.json and the processor's files, in place."""
    config = json.loads((folder / "config.json").read_text())
    _tensors(folder, wrapped=config["vision_config"]["model_type"] != "dinov2")
    (folder / "config.json").write_text(json.dumps(old_config(config), indent=2))
    _processor(folder)


def old_config(config: dict[str, Any]) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling`, `torch_dtype`, and only those keys that are not the defaults."""
    import transformers

    dtype = config.pop("dtype")
    for part in ("text_config", "vision_config"):
        inner = config[part]
        defaults = getattr(transformers, TYPES[inner["model_type"]])().to_dict()
        rope = inner.pop("rope_parameters", None)
        if inner.get("head_dim") == inner["hidden_size"] // inner["num_attention_heads"]:
            del inner["head_dim"]
        inner = {
            key: value
            for key, value in inner.items()
            if key == "model_type" or key not in defaults or defaults[key] != value
        }
        if rope is not None:
            kind, theta = rope.pop("rope_type"), rope.pop("rope_theta")
            if theta != 10000.0:
                inner["rope_theta"] = theta
            if kind != "default":
                # "rope_type" came with Llama 3.1; the older kinds had "type"
                inner["rope_scaling"] = {"type" if kind in OLD_ROPES else "rope_type": kind, **rope}
        config[part] = {"_name_or_path": "", "torch_dtype": dtype, **inner}
    if config["vision_config"]["model_type"] == "clip_vision_model":
        config["vision_config"]["vocab_size"] = 32000  # as in llava-1.5-7b-hf; it means nothing
    if config["model_type"] == "llava_next":
        config["use_image_newline_parameter"] = True  # as in llava-v1.6-mistral-7b-hf
    tied = config["text_config"].get("tie_word_embeddings", False)
    config |= {
        "ignore_index": -100,
        "tie_word_embeddings": False,  # version 4 wrote it so whatever the language model did
        "torch_dtype": dtype,
        "transformers_version": "4.47.0",
    }
    if tied:
        config["text_config"]["tie_word_embeddings"] = True
    return config


def _tensors(folder: Path, wrapped: bool) -> None:
    """`vision_tower.vision_model.`, and the buffers that early versions saved with the weights."""
    import torch
    from safetensors.torch import load_file, save_file

    names: dict[str, str] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors = load_file(path)
        if wrapped:
            tensors = {
                name.replace("vision_tower.", "vision_tower.vision_model.", 1): tensor
                for name, tensor in tensors.items()
            }
        if not names:
            tensors["vision_tower.vision_model.embeddings.position_ids"] = torch.arange(10)[None]
            tensors["language_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(6)
        save_file(tensors, path, metadata={"format": "pt"})
        names |= dict.fromkeys(tensors, path.name)
    index = folder / "model.safetensors.index.json"
    if index.exists():
        index.write_text(json.dumps({"metadata": {}, "weight_map": names}, indent=2))


def _processor(folder: Path) -> None:
    """preprocessor_config.json, processor_config.json and chat_template.json as separate files."""
    processor = json.loads((folder / "processor_config.json").read_text())
    images = processor.pop("image_processor")
    images["image_processor_type"] = images["image_processor_type"].removesuffix("Pil")
    images["processor_class"] = processor["processor_class"]
    if "image_grid_pinpoints" in images:
        images["aspect_ratio_setting"] = "anyres"
    (folder / "preprocessor_config.json").write_text(json.dumps(images, indent=2))
    (folder / "processor_config.json").write_text(json.dumps(processor, indent=2))
    template = folder / "chat_template.jinja"
    (folder / "chat_template.json").write_text(
        json.dumps({"chat_template": template.read_text()}, indent=2)
    )
    template.unlink()
    path = folder / "tokenizer_config.json"
    tokenizer = json.loads(path.read_text())
    tokenizer.pop("backend")
    tokenizer["additional_special_tokens"] = tokenizer.pop("extra_special_tokens")
    added = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    tokenizer["added_tokens_decoder"] = {str(token.pop("id")): token for token in added}
    llama = "bos_token" in tokenizer
    tokenizer["tokenizer_class"] = "LlamaTokenizer" if llama else "PreTrainedTokenizerFast"
    path.write_text(json.dumps(tokenizer, indent=2))
