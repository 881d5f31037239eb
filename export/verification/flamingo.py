"""IDEFICS in transformers; OpenFlamingo has a file of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers.image_utils import load_image

from vlm_edge.export.config import read_json
from vlm_edge.export.verification import open_flamingo
from vlm_edge.export.verification.reference import Inputs, keep
from vlm_edge.export.verification.reference import Reference as Base

PLACE = "<fake_token_around_image><image><fake_token_around_image>"


def Reference(source: str | Path) -> Base:
    """Of whichever of the two the checkpoint is."""
    folder = Path(source)
    if folder.is_dir() and read_json(folder / "config.json").get("model_type") == "open_flamingo":
        return open_flamingo.Reference(folder)
    return Idefics(source)


class Idefics(Base):
    """`IdeficsForVisionText2Text`. Its processor takes texts and pictures in turn, and no template."""

    model_class = "IdeficsForVisionText2Text"

    def inputs(self, prompt: str, images: Sequence[Path], template: bool) -> Inputs:
        pictures = [load_image(str(image)) for image in images]
        parts: list[Any] = [*pictures, prompt]
        if template:
            content = [{"type": "image"} for _ in images]
            rendered = self.render([*content, {"type": "text", "text": prompt}])
            rendered = rendered.removeprefix(
                self.processor.tokenizer.bos_token
            )  # the processor's to add
            first, *rest = rendered.split(PLACE)
            parts = [first]
            for picture, text in zip(pictures, rest, strict=True):
                parts += [picture, text]
            parts = [part for part in parts if part != ""]
        tensors = self.processor(text=parts, return_tensors="pt")
        pixels = tensors["pixel_values"][0].numpy()  # one blank picture where there is none
        return Inputs(
            token_ids=tensors["input_ids"][0].tolist(),
            tiles=[pixels[index][None] for index in range(len(pictures))],
            visual_tokens=[self._tokens()] * len(pictures),
            tensors=tensors,
        )

    def _tokens(self) -> int:
        config = self.model.config
        if config.use_resampler:
            return int(config.perceiver_config.resampler_n_latents)
        return int(self.model.model.vision_model.embeddings.num_positions)

    def stacks(self) -> dict[str, Any]:
        return {"vision": self.model.model.vision_model, "llm": self.model.model}

    def hook_stages(self, hook: Callable[[Any, Any], None], found: dict[str, np.ndarray]) -> None:
        core = self.model.model
        hook(core.embed_tokens, keep(found, "embeddings"))
        hook(core.vision_model, _keep_features(found))
        if self.model.config.use_resampler:
            hook(core.perceiver_resampler, keep(found, "image_features"))
        for index, block in enumerate(core.gated_cross_attn_layers):
            attention, count = block.cross_attn, self._tokens()
            split = _keep_heads(found, f"media.key.{index}", attention.head_dim, count)
            if attention.qk_layer_norms:
                hook(attention.k_layer_norm, _keep_tiles(found, f"media.key.{index}", count))
            else:
                hook(attention.k_proj, split)
            hook(
                attention.v_proj,
                _keep_heads(found, f"media.value.{index}", attention.head_dim, count),
            )


def _keep_features(found: dict[str, np.ndarray]) -> Any:
    def hook(_module: Any, _args: Any, _kwargs: Any, result: Any) -> None:
        found["features"] = result.last_hidden_state.numpy()

    return hook


def _keep_heads(found: dict[str, np.ndarray], name: str, head_dim: int, tokens: int) -> Any:
    """Of a projection [1, tiles * tokens, heads * head_dim]: [tiles, heads, tokens, head_dim]."""

    def hook(_module: Any, _args: Any, _kwargs: Any, result: Any) -> None:
        rows = result.numpy()[0].reshape(-1, tokens, result.shape[-1] // head_dim, head_dim)
        found[name] = rows.transpose(0, 2, 1, 3)

    return hook


def _keep_tiles(found: dict[str, np.ndarray], name: str, tokens: int) -> Any:
    """Of keys [1, heads, tiles * tokens, head_dim]: [tiles, heads, tokens, head_dim]."""

    def hook(_module: Any, _args: Any, _kwargs: Any, result: Any) -> None:
        heads, _, head_dim = result.shape[1:]
        found[name] = result.numpy()[0].reshape(heads, -1, tokens, head_dim).transpose(1, 0, 2, 3)

    return hook
