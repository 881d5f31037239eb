"""Llama 3.2 Vision in transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from vlm_edge.export.verification.reference import Inputs, keep
from vlm_edge.export.verification.reference import Reference as Base


class Reference(Base):
    """`MllamaForConditionalGeneration`."""

    model_class = "MllamaForConditionalGeneration"
    vision = "vision_model"

    def tiles(self, tensors: Any) -> list[np.ndarray]:
        pixels = tensors["pixel_values"][0].numpy()  # [pictures, most tiles, 3, height, width]
        return [picture[:count] for picture, count in zip(pixels, _counts(tensors), strict=True)]

    def visual_tokens(self, tensors: Any, index: int) -> int:
        return _counts(tensors)[index] * int(self.model.model.vision_model.num_patches)

    def stacks(self) -> dict[str, Any]:
        core = self.model.model
        return {"vision": core.vision_model.transformer, "llm": core.language_model}

    def hook_stages(self, hook: Callable[[Any, Any], None], found: dict[str, np.ndarray]) -> None:
        core = self.model.model
        first = core.vision_model.config.num_hidden_layers
        for index, layer in enumerate(core.vision_model.global_transformer.layers):
            hook(layer, keep(found, f"vision.layers.{first + index}"))
        hook(core.language_model.embed_tokens, keep(found, "embeddings"))
        hook(core.multi_modal_projector, _keep_tiles(found))
        tokens = int(core.vision_model.num_patches)
        layers = [core.language_model.layers[i] for i in core.language_model.cross_attention_layers]
        for index, layer in enumerate(layers):
            attention = layer.cross_attn
            hook(attention.k_norm, _keep_keys(found, f"media.key.{index}", tokens))
            hook(attention.v_proj, _keep_values(found, f"media.value.{index}", attention.head_dim))

    def forward(self, inputs: Inputs) -> Any:
        # Without pictures its own layers are left out only while nothing is cached.
        return self.model(**inputs.tensors, logits_to_keep=1, use_cache=False).logits


def _counts(tensors: Any) -> list[int]:
    """Tiles of each picture."""
    return [int(count) for count in tensors["aspect_ratio_mask"][0].sum(dim=-1)]


def _keep_tiles(found: dict[str, np.ndarray]) -> Any:
    """What the projector reads and gives, [1, pictures, tiles, tokens, width]: tile by tile."""

    def hook(_module: Any, args: Any, _kwargs: Any, result: Any) -> None:
        for name, value in (("features", args[0]), ("image_features", result)):
            found[name] = value.numpy().reshape(-1, *value.shape[-2:])

    return hook


def _keep_keys(found: dict[str, np.ndarray], name: str, tokens: int) -> Any:
    """Keys [1, heads, tiles * tokens, head_dim] as [tiles, heads, tokens, head_dim]."""

    def hook(_module: Any, _args: Any, _kwargs: Any, result: Any) -> None:
        heads, _, head_dim = result.shape[1:]
        found[name] = result.numpy()[0].reshape(heads, -1, tokens, head_dim).transpose(1, 0, 2, 3)

    return hook


def _keep_values(found: dict[str, np.ndarray], name: str, head_dim: int) -> Any:
    """Values [tiles, tokens, heads * head_dim] as [tiles, heads, tokens, head_dim]."""

    def hook(_module: Any, _args: Any, _kwargs: Any, result: Any) -> None:
        rows = result.numpy()
        found[name] = rows.reshape(*rows.shape[:2], -1, head_dim).transpose(0, 2, 1, 3)

    return hook
