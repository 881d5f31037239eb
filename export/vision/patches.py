"""Patch embedding and sizes that every ViT of this project shares."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript import nn

from vlm_edge.errors import UnsupportedConfig
from vlm_edge.export.checkpoint import Weights
from vlm_edge.export.config import Config
from vlm_edge.export.layers.activations import Activation, activation
from vlm_edge.export.layers.linear import parameter
from vlm_edge.export.tensors import constant


@dataclass(frozen=True)
class VisionSettings:
    """All an encoder's graph needs of vision_config, and the tile it is exported for (pixels)."""

    width: int
    hidden: int  # of the feed-forward, before DINOv2's SwiGLU takes its two thirds
    layers: int
    heads: int
    patch: int
    image: int  # side the position embeddings were trained for, pixels
    epsilon: float
    act: Activation
    qkv_bias: bool = True
    swiglu: bool = False
    height: int = 0  # of a tile; 0 until the processor is known
    breadth: int = 0

    @property
    def grid(self) -> tuple[int, int]:
        """Patches of a tile, down and across."""
        return self.height // self.patch, self.breadth // self.patch

    @property
    def patches(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def native_patches(self) -> int:
        return (self.image // self.patch) ** 2


def read_sizes(
    config: Config,
    *,
    hidden: int,
    patch: int,
    epsilon: float,
    act: str,
    width: int = 768,
    layers: int = 12,
    heads: int = 12,
) -> VisionSettings:
    """The keys that all encoders have; the others are the model type's defaults (most ViTs we read are
    a ViT-B at 224 px where their config says nothing).

    Raises:
        UnsupportedConfig: a size that is not a positive integer, heads that do not divide the width,
            or an image that has not three channels.
    """
    config.only("num_channels", 3, 3, "images have three channels here")
    settings = VisionSettings(
        width=config.size("hidden_size", width),
        hidden=hidden,
        layers=config.size("num_hidden_layers", layers),
        heads=config.size("num_attention_heads", heads),
        patch=config.size("patch_size", patch),
        image=config.size("image_size", 224),
        epsilon=config.number("layer_norm_eps", epsilon),
        act=activation(config, "hidden_act", act),
    )
    if settings.width % settings.heads:
        raise UnsupportedConfig(
            config.name("num_attention_heads"), settings.heads, f"it should divide {settings.width}"
        )
    return settings


def native_grid(settings: VisionSettings, encoder: str) -> None:
    """This encoder has positions for one image size only.

    Raises:
        UnsupportedConfig: the processor makes tiles of another size.
    """
    if (settings.height, settings.breadth) != (settings.image, settings.image):
        raise UnsupportedConfig(
            "vision_config.image_size",
            settings.image,
            f"the processor makes {settings.height}x{settings.breadth} images and {encoder} does not "
            "interpolate its positions",
        )


class PatchEmbedding(nn.Module):
    """pixels [tiles, 3, height, width] -> [tiles, tokens, width], positions added.

    Args:
        positions: float32 [tokens, width]; with `class_token` its first row is that token's whole
            embedding.
    """

    def __init__(
        self,
        weights: Weights,
        settings: VisionSettings,
        positions: np.ndarray,
        *,
        bias: bool,
        class_token: bool,
    ) -> None:
        super().__init__()
        self._patch, self._class_token = settings.patch, class_token
        self._breadth = settings.width
        self.weight = parameter(
            weights, "weight", settings.width, 3, settings.patch, settings.patch
        )
        self.bias = parameter(weights, "bias", settings.width) if bias else None
        self.positions = nn.Parameter(positions.shape, data=constant(positions.astype(np.float32)))

    def forward(self, op: Any, pixels: ir.Value) -> ir.Value:
        size = [self._patch, self._patch]
        inputs = [pixels, self.weight] + ([] if self.bias is None else [self.bias])
        x = op.Conv(*inputs, kernel_shape=size, strides=size)  # [tiles, width, rows, columns]
        x = op.Transpose(
            op.Reshape(x, [0, self._breadth, -1]), perm=[0, 2, 1]
        )  # [tiles, patches, width]
        if self._class_token:
            x = op.Pad(x, [0, 1, 0, 0, 0, 0])  # [tiles, 1 + patches, width]
        return op.Add(x, self.positions)


def hidden_states(op: Any, layers: Iterable[nn.Module], first: ir.Value) -> list[ir.Value]:
    """`first` and the output of each layer after it: transformers' `hidden_states`, in order."""
    states = [first]
    for layer in layers:
        states.append(layer(op, states[-1]))
    return states
