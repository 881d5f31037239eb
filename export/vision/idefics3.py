"""The vision encoder of Idefics3 and SmolVLM: SigLIP's blocks and a final norm, for tiles of any size.

Its positions follow NaViT (Dehghani et al. 2023, arXiv 2307.06304): a patch takes the position whose share
of the trained grid it lies in, so tiles larger or smaller than the trained size share positions or skip
some.

Every tile is full: the picture is scaled to whole tiles and none is padded. So the reference's attention
mask over padding, which its processor makes for batches of unequal tiles, is all ones and not needed here.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnxscript import nn

from vlm_edge.errors import UnsupportedConfig
from vlm_edge.export.checkpoint import Weights
from vlm_edge.export.config import Config
from vlm_edge.export.layers.linear import LayerNorm
from vlm_edge.export.quantizers import Quantizer
from vlm_edge.export.vision.clip import Block
from vlm_edge.export.vision.patches import PatchEmbedding, VisionSettings, hidden_states, read_sizes

# Files of transformers before 4.50 name the whole model's type here; the class reads none of them.
MODEL_TYPES = ("idefics3_vision", "smolvlm_vision", "idefics3", "smolvlm")


def read(config: Config, tile: int) -> VisionSettings:
    """vision_config, for square tiles of `tile` pixels.

    Raises:
        UnsupportedConfig: a value or key that the encoder cannot honour, or a tile below one patch.
    """
    config.choice("model_type", MODEL_TYPES[0], MODEL_TYPES)
    for copied in ("max_image_size", "size"):
        config.get(copied)  # the image processor's, repeated; its own file counts
    config.get("use_base_siglip")  # which encoder the training began with
    config.get("tie_word_embeddings")  # transformers 4 wrote it into every config
    hidden = config.size("intermediate_size", 3072)
    settings = read_sizes(
        config, width=1152, heads=16, hidden=hidden, patch=32, epsilon=1e-6, act="gelu_pytorch_tanh"
    )
    config.finish()
    if tile < settings.patch:
        why = f"a tile of {tile} pixels, as the processor makes, has no patch of that size"
        raise UnsupportedConfig(config.name("patch_size"), settings.patch, why)
    if settings.image < settings.patch:
        why = f"it should be at least one patch, {settings.patch} pixels"
        raise UnsupportedConfig(config.name("image_size"), settings.image, why)
    return replace(settings, height=tile, breadth=tile)


def position_ids(trained: int, side: int) -> NDArray[np.int64]:
    """Position [side] along one edge of each patch, of the `trained` ones along that edge.

    `side` = `trained` does not mean 0, 1, 2 ...: the reference compares fractions i / side with boundaries
    k / trained, both rounded to float32 and neither exactly, and for some counts (19, 25, 29 ...) a patch
    falls on the wrong side of its boundary. Checkpoints were trained with that.
    """
    fractions = np.arange(side, dtype=np.float32) * (np.float32(1) / np.float32(side))
    fractions = np.minimum(fractions, np.float32(1 - 1e-6))
    return np.searchsorted(_boundaries(trained), fractions, side="right")


def _boundaries(trained: int) -> NDArray[np.float32]:
    """`torch.arange(1 / trained, 1, 1 / trained)` to the last bit, as torch computes it on a CPU: in blocks
    of 16, each half of which begins with a rounded value; what is left over, one by one."""
    step = 1 / trained
    index = np.arange(math.ceil((1 - step) / step))
    values = (step + step * index).astype(np.float32)
    blocks = len(index) // 16 * 16
    begin = (step + step * (index // 8 * 8)).astype(np.float32).astype(np.float64)
    values[:blocks] = (begin + step * (index % 8)).astype(np.float32)[:blocks]
    return values


class Encoder(nn.Module):
    """pixel_values [tiles, 3, tile, tile] -> features [tiles, patches, width], after the final norm."""

    def __init__(self, weights: Weights, settings: VisionSettings, quantizer: Quantizer) -> None:
        super().__init__("vision")
        embeddings, layers = weights.sub("embeddings"), weights.sub("encoder").sub("layers")
        trained = settings.image // settings.patch
        table = embeddings.tensor("position_embedding.weight", trained**2, settings.width).numpy()
        down, across = (position_ids(trained, side) for side in settings.grid)
        self.embeddings = PatchEmbedding(
            embeddings.sub("patch_embedding"),
            settings,
            table[(down[:, None] * trained + across).ravel()],
            bias=True,
            class_token=False,
        )
        self.layers = nn.ModuleList(
            [Block(layers.sub(i), settings, quantizer) for i in range(settings.layers)]
        )
        norm = weights.sub("post_layernorm")
        self.post_layernorm = LayerNorm(norm, settings.width, settings.epsilon)

    def forward(self, op: Any, pixels: ir.Value) -> ir.Value:
        states = hidden_states(op, self.layers, self.embeddings(op, pixels))
        for index, state in enumerate(states[1:]):
            state.name = f"vision.layers.{index}.output"
        return self.post_layernorm(op, states[-1])
