"""The vision engine: an encoder and the selection of its hidden states, as LLaVA-type configs say it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import onnx_ir as ir
from onnxscript import nn

from vlm_edge.errors import UnsupportedConfig
from vlm_edge.export.checkpoint import Weights
from vlm_edge.export.config import Config
from vlm_edge.export.quantizers import Quantizer
from vlm_edge.export.vision import clip, dinov2, siglip
from vlm_edge.export.vision.patches import VisionSettings, native_grid

ENCODERS: dict[str, ModuleType] = {
    kind: encoder for encoder in (clip, siglip, dinov2) for kind in encoder.MODEL_TYPES
}
RENAMES = (*clip.RENAMES, *dinov2.RENAMES)


@dataclass(frozen=True)
class TowerSettings:
    """An encoder and which of its hidden states make the features.

    Attributes:
        layers: hidden states by index, 0 being the embeddings; concatenated in this order. The last
            one is the last layer's output without the final norm, as in the reference.
        drop_first: the strategy "default", which drops the first token (the class token).
    """

    kind: str
    encoder: VisionSettings
    layers: tuple[int, ...]
    drop_first: bool

    @property
    def tokens(self) -> int:
        """Visual features of one tile."""
        extra = 0 if self.kind in siglip.MODEL_TYPES else 1
        return self.encoder.patches + extra - self.drop_first

    @property
    def grid(self) -> tuple[int, int] | None:
        """Features of one tile, down and across; None where they are not its patches alone, or the tile
        has so many pixels beyond its patches that a patch's size does not follow from the grid."""
        encoder = self.encoder
        (rows, columns), patch = encoder.grid, encoder.patch
        exact = (encoder.height // rows, encoder.breadth // columns) == (patch, patch)
        return encoder.grid if self.tokens == encoder.patches and exact else None

    @property
    def width(self) -> int:
        return self.encoder.width * len(self.layers)


def read_tower(config: Config, height: int, breadth: int) -> TowerSettings:
    """From `vision_config`, `vision_feature_layer` and `vision_feature_select_strategy`.

    Args:
        config: the whole config.json.
        height, breadth: of the tiles the processor makes, pixels.

    Raises:
        UnsupportedConfig: an encoder we do not have, or a layer it does not have.
    """
    vision = config.sub("vision_config")
    kind = vision.choice("model_type", "clip_vision_model", ENCODERS)
    encoder = ENCODERS[kind]
    settings = replace(encoder.read(vision), height=height, breadth=breadth)
    if kind not in dinov2.MODEL_TYPES:
        native_grid(settings, kind)
    vision.get("tie_word_embeddings")  # transformers 4 wrote it into every config
    vision.finish()
    asked = config.get("vision_feature_layer", -2)
    layers = []
    for layer in asked if isinstance(asked, list) else [asked]:
        if (
            isinstance(layer, bool)
            or not isinstance(layer, int)
            or not -depth(settings) <= layer <= settings.layers
        ):
            raise UnsupportedConfig(
                "vision_feature_layer", asked, f"the encoder has {settings.layers} layers"
            )
        layers.append(layer if layer >= 0 else layer + depth(settings))
    if not layers:
        raise UnsupportedConfig("vision_feature_layer", asked, "it names no layer")
    strategy = config.choice("vision_feature_select_strategy", "default", ("default", "full"))
    return TowerSettings(kind, settings, tuple(layers), strategy == "default")


def depth(settings: VisionSettings) -> int:
    """Number of hidden states: the embeddings and one a layer."""
    return settings.layers + 1


class VisionTower(nn.Module):
    """pixel_values [tiles, 3, height, width] -> features [tiles, tokens, width of all selected layers]."""

    def __init__(self, weights: Weights, settings: TowerSettings, quantizer: Quantizer) -> None:
        super().__init__("vision")
        self._settings = settings
        # Layers above the last selected one are never computed.
        needed = max(settings.layers)
        encoder = ENCODERS[settings.kind]
        self.encoder = encoder.Encoder(weights, settings.encoder, needed, quantizer)

    def forward(self, op: Any, pixels: ir.Value) -> ir.Value:
        states = self.encoder(op, pixels)
        for index, state in enumerate(states[1:]):
            state.name = f"vision.layers.{index}.output"
        chosen = [states[i] for i in self._settings.layers]
        if self._settings.drop_first:
            chosen = [op.Slice(state, [1], [1 << 31], [1]) for state in chosen]
        # Identity keeps a layer's own name beside the graph output's.
        return op.Concat(*chosen, axis=-1) if len(chosen) > 1 else op.Identity(chosen[0])
