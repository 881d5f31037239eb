"""The SigLIP vision encoder (Zhai et al. 2023, arXiv 2303.15343): CLIP's blocks without a class token."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from onnxscript import nn

from vlm_edge.export.checkpoint import Weights
from vlm_edge.export.config import Config
from vlm_edge.export.quantizers import Quantizer
from vlm_edge.export.vision.clip import RENAMES, Block
from vlm_edge.export.vision.patches import PatchEmbedding, VisionSettings, hidden_states, read_sizes

MODEL_TYPES = ("siglip_vision_model",)
__all__ = ["MODEL_TYPES", "RENAMES", "Encoder", "read"]


def read(config: Config) -> VisionSettings:
    """vision_config of SigLIP. Raises UnsupportedConfig for what the encoder cannot honour."""
    config.get("vision_use_head")  # the pooling head comes after the hidden states we use
    hidden = config.size("intermediate_size", 3072)
    return read_sizes(config, hidden=hidden, patch=16, epsilon=1e-6, act="gelu_pytorch_tanh")


class Encoder(nn.Module):
    """pixels [tiles, 3, height, width] -> hidden states [tiles, patches, width] after 0..depth layers."""

    def __init__(
        self, weights: Weights, settings: VisionSettings, depth: int, quantizer: Quantizer
    ) -> None:
        super().__init__()
        embeddings = weights.sub("embeddings")
        positions = embeddings.tensor("position_embedding.weight", settings.patches, settings.width)
        self.embeddings = PatchEmbedding(
            embeddings.sub("patch_embedding"),
            settings,
            positions.numpy(),
            bias=True,
            class_token=False,
        )
        layers = weights.sub("encoder").sub("layers")
        self.layers = nn.ModuleList(
            [Block(layers.sub(i), settings, quantizer) for i in range(depth)]
        )

    def forward(self, op: Any, pixels: ir.Value) -> list[ir.Value]:
        return hidden_states(op, self.layers, self.embeddings(op, pixels))
