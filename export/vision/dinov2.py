"""The DINOv2 vision encoder (Oquab et al. 2023, arXiv 2304.07193) as transformers lays it out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript import nn

from vlm_edge.export.checkpoint import Weights
from vlm_edge.export.config import Config
from vlm_edge.export.layers.interpolate import resize_positions
from vlm_edge.export.layers.linear import LayerNorm, Linear, TensorLinear, parameter
from vlm_edge.export.quantizers import Quantizer
from vlm_edge.export.vision.clip import MLP, SelfAttention
from vlm_edge.export.vision.patches import PatchEmbedding, VisionSettings, hidden_states, read_sizes

MODEL_TYPES = ("dinov2",)
# What save_pretrained writes, to names that CLIP's modules share.
RENAMES = (
    (r"(?<=\.)encoder\.layer\.(\d+)\.", r"encoder.layers.\1."),
    (r"\.attention\.attention\.query\.", ".attention.q_proj."),
    (r"\.attention\.attention\.key\.", ".attention.k_proj."),
    (r"\.attention\.attention\.value\.", ".attention.v_proj."),
    (r"\.attention\.output\.dense\.", ".attention.o_proj."),
    (r"\.mlp\.weights_out\.", ".mlp.down_proj."),
)


def read(config: Config) -> VisionSettings:
    """vision_config of DINOv2. Raises UnsupportedConfig for what the encoder cannot honour."""
    for key in (  # backbone outputs and masked training: neither touches the hidden states
        "apply_layernorm out_features out_indices reshape_hidden_states stage_names use_mask_token"
    ).split():
        config.get(key)
    hidden = int(config.size("hidden_size", 768) * config.number("mlp_ratio", 4))
    settings = read_sizes(config, hidden=hidden, patch=14, epsilon=1e-6, act="gelu")
    return replace(
        settings,
        qkv_bias=config.flag("qkv_bias", True),
        swiglu=config.flag("use_swiglu_ffn", False),
    )


class Encoder(nn.Module):
    """pixels [tiles, 3, height, width] -> hidden states [tiles, 1 + patches, width] after 0..depth layers."""

    def __init__(
        self, weights: Weights, settings: VisionSettings, depth: int, quantizer: Quantizer
    ) -> None:
        super().__init__()
        embeddings = weights.sub("embeddings")
        self.embeddings = PatchEmbedding(
            embeddings.sub("patch_embeddings").sub("projection"),
            settings,
            _positions(embeddings, settings),
            bias=True,
            class_token=True,
        )
        layers = weights.sub("encoder").sub("layers")
        self.layers = nn.ModuleList(
            [_Block(layers.sub(i), settings, quantizer) for i in range(depth)]
        )

    def forward(self, op: Any, pixels: ir.Value) -> list[ir.Value]:
        return hidden_states(op, self.layers, self.embeddings(op, pixels))


def _positions(weights: Weights, settings: VisionSettings) -> np.ndarray:
    """float32 [1 + patches, width], resized to the tile's grid where that is not the trained one."""
    trained = settings.native_patches
    table = weights.tensor("position_embeddings", 1, trained + 1, settings.width).numpy()[0]
    patches = table[1:]
    # The reference's own rule: as many patches on a square tile are taken as they are.
    if settings.patches != trained or settings.height != settings.breadth:
        patches = resize_positions(patches, *settings.grid)
    first = table[:1] + weights.tensor("cls_token", 1, 1, settings.width).numpy()[0]
    return np.concatenate([first, patches])


class _Block(nn.Module):
    """Pre-norm attention and feed-forward with a learned scale on each branch (LayerScale)."""

    def __init__(self, weights: Weights, settings: VisionSettings, quantizer: Quantizer) -> None:
        super().__init__()
        width = settings.width
        self.norm1 = LayerNorm(weights.sub("norm1"), width, settings.epsilon)
        self.attention = SelfAttention(weights.sub("attention"), settings, "o_proj", quantizer)
        self.layer_scale1 = parameter(weights.sub("layer_scale1"), "lambda1", width)
        self.norm2 = LayerNorm(weights.sub("norm2"), width, settings.epsilon)
        self.mlp = (_SwiGLU if settings.swiglu else MLP)(weights.sub("mlp"), settings, quantizer)
        self.layer_scale2 = parameter(weights.sub("layer_scale2"), "lambda1", width)

    def forward(self, op: Any, x: ir.Value) -> ir.Value:
        x = op.Add(op.Mul(self.attention(op, self.norm1(op, x)), self.layer_scale1), x)
        return op.Add(op.Mul(self.mlp(op, self.norm2(op, x)), self.layer_scale2), x)


class _SwiGLU(nn.Module):
    """Gated feed-forward of DINOv2-giant; stored fused (`weights_in`) or as gate and up."""

    def __init__(self, weights: Weights, settings: VisionSettings, quantizer: Quantizer) -> None:
        super().__init__()
        width = settings.width
        # Dinov2SwiGLUFFN: two thirds of the feed-forward, to a multiple of 8.
        hidden = (settings.hidden * 2 // 3 + 7) // 8 * 8
        gate, up = weights.sub("gate_proj"), weights.sub("up_proj")
        if weights.has("weights_in.weight"):
            fused = weights.sub("weights_in")
            both = fused.tensor("weight", 2 * hidden, width).split(2)
            biases = fused.tensor("bias", 2 * hidden).split(2)
        else:
            both = [part.tensor("weight", hidden, width) for part in (gate, up)]
            biases = [part.tensor("bias", hidden) for part in (gate, up)]
        self.gate_proj = TensorLinear(gate.path, both[0], biases[0], quantizer)
        self.up_proj = TensorLinear(up.path, both[1], biases[1], quantizer)
        self.down_proj = Linear(weights.sub("down_proj"), hidden, width, True, quantizer)

    def forward(self, op: Any, x: ir.Value) -> ir.Value:
        gate = self.gate_proj(op, x)
        return self.down_proj(op, op.Mul(op.Mul(gate, op.Sigmoid(gate)), self.up_proj(op, x)))
