"""The frozen parts of the demo models in torch: vision tower, language model, tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer
from torch import nn
from transformers import Dinov2Config, Dinov2Model, LlamaConfig, LlamaModel

from vlm_edge.export import demo_llava, demo_parts


@dataclass(frozen=True)
class Frozen:
    """What stage 1 does not train. The language model is bfloat16: twice as fast on AVX512-BF16."""

    vision: nn.Module
    language: nn.Module
    table: torch.Tensor  # [vocab, width], the token embeddings and the output head
    encode: Callable[[str], list[int]]

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Token embeddings [rows, length, width]."""
        return self.table[ids]

    def word_norm(self) -> float:
        """The mean norm of a token's embedding."""
        return float(self.table.float().norm(dim=-1).mean())


def load_frozen(dtype: torch.dtype = torch.bfloat16) -> Frozen:
    """Read the parts of the demo models, as `vlm_edge.export.demo` does."""
    parts = demo_parts.find_parts()
    vision = load_vision(parts["vision"])
    language = LlamaModel(LlamaConfig(**demo_parts.LANGUAGE))
    tensors = demo_parts.language_tensors(parts["language"])
    language.load_state_dict({k: torch.from_numpy(v) for k, v in tensors.items()})
    language.to(dtype)
    language.eval().requires_grad_(False)
    tokenizer = Tokenizer.from_str(demo_parts.tokenizer_json(parts["language"]))
    return Frozen(
        vision,
        language,
        language.embed_tokens.weight,
        lambda text: tokenizer.encode(text, add_special_tokens=False).ids,
    )


def load_vision(onnx_path: Path) -> nn.Module:
    """The vision tower, float32."""
    vision = Dinov2Model(Dinov2Config(**demo_llava.model_config()["vision_config"]))
    vision.load_state_dict(renamed(demo_parts.vision_tensors(onnx_path), vision))
    return vision.eval().requires_grad_(False)


def renamed(tensors: dict[str, np.ndarray], module: nn.Module) -> dict[str, torch.Tensor]:
    """Checkpoint names -> module names, which newer transformers shortened."""
    new = {
        "attention.attention.query": "attention.q_proj",
        "attention.attention.key": "attention.k_proj",
        "attention.attention.value": "attention.v_proj",
        "attention.output.dense": "attention.o_proj",
    }
    found = {}
    for name, array in tensors.items():
        if name not in module.state_dict():
            for old, short in new.items():
                name = name.replace(old, short)
        found[name] = torch.tensor(array)  # a copy: the file is mapped read-only
    return found


def pixels(image: Image.Image) -> np.ndarray:
    """The processor's pixel values [3, 112, 112]: shortest edge resized, centre cropped."""
    width, height = image.size
    short = min(width, height)
    size = (int(demo_parts.IMAGE * width / short), int(demo_parts.IMAGE * height / short))
    image = image.convert("RGB").resize(size, Image.Resampling.BICUBIC)
    left, top = (size[0] - demo_parts.IMAGE) // 2, (size[1] - demo_parts.IMAGE) // 2
    image = image.crop((left, top, left + demo_parts.IMAGE, top + demo_parts.IMAGE))
    scaled = np.asarray(image, np.float32) / 255  # [112, 112, 3]
    normal = (scaled - np.asarray(demo_parts.MEAN, np.float32)) / np.asarray(
        demo_parts.STD, np.float32
    )
    return normal.transpose(2, 0, 1)


@torch.no_grad()
def image_features(frozen: Frozen, images: Sequence[Image.Image] | torch.Tensor) -> torch.Tensor:
    """The chosen layers side by side [images, patches, layers * width], without the CLS token."""
    if not isinstance(images, torch.Tensor):
        images = torch.from_numpy(np.stack([pixels(image) for image in images]))
    states = frozen.vision(images, output_hidden_states=True).hidden_states
    return torch.cat([states[layer][:, 1:] for layer in demo_llava.FEATURE_LAYERS], -1)


@torch.no_grad()
def hidden_state(
    frozen: Frozen, images: Sequence[Image.Image] | torch.Tensor, layers: int
) -> torch.Tensor:
    """What leaves the tower's first `layers` layers: [images, 1 + patches, width], CLS token first."""
    if not isinstance(images, torch.Tensor):
        images = torch.from_numpy(np.stack([pixels(image) for image in images]))
    tower: Any = frozen.vision
    states = tower.embeddings(images)
    for layer in tower.encoder.layer[:layers]:
        states = layer(states)
    return states
