"""The CLIP vision encoder (Radford et al. 2021, arXiv 2103.00020) as transformers lays it out."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from onnxscript import nn

from vlm_edge.export.checkpoint import Weights
from vlm_edge.export.config import Config
from vlm_edge.export.layers.linear import LayerNorm, Linear
from vlm_edge.export.quantizers import Quantizer
from vlm_edge.export.vision.patches import PatchEmbedding, VisionSettings, hidden_states, read_sizes

MODEL_TYPES = ("clip_vision_model",)
RENAMES = ((r"^vision_tower\.vision_model\.", "vision_tower."),)


def read(config: Config) -> VisionSettings:
    """vision_config of CLIP. Raises UnsupportedConfig for what the encoder cannot honour."""
    config.get("vocab_size")  # LLaVA-1.5's file has it; a vision encoder has no vocabulary
    hidden = config.size("intermediate_size", 3072)
    return read_sizes(config, hidden=hidden, patch=32, epsilon=1e-5, act="quick_gelu")


class Encoder(nn.Module):
    """pixels [tiles, 3, height, width] -> hidden states [tiles, 1 + patches, width] after 0..depth layers."""

    def __init__(
        self, weights: Weights, settings: VisionSettings, depth: int, quantizer: Quantizer
    ) -> None:
        super().__init__()
        embeddings = weights.sub("embeddings")
        positions = embeddings.tensor(
            "position_embedding.weight", settings.patches + 1, settings.width
        ).numpy()
        # The class token is the same for every image: it goes into the first position's row.
        positions[0] += embeddings.tensor("class_embedding", settings.width).numpy()
        self.embeddings = PatchEmbedding(
            embeddings.sub("patch_embedding"), settings, positions, bias=False, class_token=True
        )
        self.pre_layrnorm = LayerNorm(weights.sub("pre_layrnorm"), settings.width, settings.epsilon)
        layers = weights.sub("encoder").sub("layers")
        self.layers = nn.ModuleList(
            [Block(layers.sub(i), settings, quantizer) for i in range(depth)]
        )

    def forward(self, op: Any, pixels: ir.Value) -> list[ir.Value]:
        return hidden_states(op, self.layers, self.pre_layrnorm(op, self.embeddings(op, pixels)))


class Block(nn.Module):
    """Pre-norm attention and feed-forward, as CLIP and SigLIP share it."""

    def __init__(self, weights: Weights, settings: VisionSettings, quantizer: Quantizer) -> None:
        super().__init__()
        width = settings.width
        self.layer_norm1 = LayerNorm(weights.sub("layer_norm1"), width, settings.epsilon)
        self.self_attn = SelfAttention(weights.sub("self_attn"), settings, "out_proj", quantizer)
        self.layer_norm2 = LayerNorm(weights.sub("layer_norm2"), width, settings.epsilon)
        self.mlp = MLP(weights.sub("mlp"), settings, quantizer)

    def forward(self, op: Any, x: ir.Value) -> ir.Value:
        x = op.Add(x, self.self_attn(op, self.layer_norm1(op, x)))
        return op.Add(x, self.mlp(op, self.layer_norm2(op, x)))


class SelfAttention(nn.Module):
    """Bidirectional multi-head attention over all patches, x [tiles, tokens, width] -> same."""

    def __init__(
        self, weights: Weights, settings: VisionSettings, output: str, quantizer: Quantizer
    ) -> None:
        super().__init__()
        width, qkv_bias, self._heads = settings.width, settings.qkv_bias, settings.heads
        self.q_proj = Linear(weights.sub("q_proj"), width, width, qkv_bias, quantizer)
        self.k_proj = Linear(weights.sub("k_proj"), width, width, qkv_bias, quantizer)
        self.v_proj = Linear(weights.sub("v_proj"), width, width, qkv_bias, quantizer)
        self.out_proj = Linear(weights.sub(output), width, width, True, quantizer)

    def forward(self, op: Any, x: ir.Value) -> ir.Value:
        q, k, v = self.q_proj(op, x), self.k_proj(op, x), self.v_proj(op, x)
        mixed = op.Attention(q, k, v, q_num_heads=self._heads, kv_num_heads=self._heads)
        return self.out_proj(op, mixed)


class MLP(nn.Module):
    """Two linear layers with biases around an activation."""

    def __init__(self, weights: Weights, settings: VisionSettings, quantizer: Quantizer) -> None:
        super().__init__()
        width, hidden, self._act = settings.width, settings.hidden, settings.act
        self.fc1 = Linear(weights.sub("fc1"), width, hidden, True, quantizer)
        self.fc2 = Linear(weights.sub("fc2"), hidden, width, True, quantizer)

    def forward(self, op: Any, x: ir.Value) -> ir.Value:
        return self.fc2(op, self._act(op, self.fc1(op, x)))
