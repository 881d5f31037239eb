"""The EVA ViT-g vision encoder (Fang et al. 2022, arXiv 2211.07636) of BLIP-2 and InstructBLIP, as
transformers lays it out: CLIP's blocks with query, key and value in one tensor, and a final norm."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import onnx_ir as ir
from onnxscript import nn

from vlm_edge.errors import UnsupportedConfig
from vlm_edge.export.checkpoint import Weights
from vlm_edge.export.config import Config
from vlm_edge.export.layers.linear import LayerNorm, Linear, TensorLinear
from vlm_edge.export.quantizers import Quantizer
from vlm_edge.export.vision.clip import MLP
from vlm_edge.export.vision.patches import PatchEmbedding, VisionSettings, hidden_states, read_sizes

MODEL_TYPES = ("blip_2_vision_model", "instructblip_vision_model")


def read(config: Config) -> VisionSettings:
    """vision_config of BLIP-2 and InstructBLIP, for tiles of the size it was trained for: the reference
    refuses others (`patches.native_grid`).

    Raises:
        UnsupportedConfig: a value or key that the encoder cannot honour. A pair of sizes is one: version
            5 reads it and cannot make the model.
    """
    config.choice("model_type", MODEL_TYPES[0], MODEL_TYPES)
    config.get("tie_word_embeddings")  # transformers 4 wrote it into every config
    settings = read_sizes(
        config,
        width=1408,
        hidden=config.size("intermediate_size", 6144),
        layers=39,
        heads=16,
        patch=14,
        epsilon=1e-6,
        act="gelu",
    )
    if settings.image < settings.patch:
        why = f"it should be at least one patch, {settings.patch} pixels"
        raise UnsupportedConfig(config.name("image_size"), settings.image, why)
    qkv_bias = config.flag("qkv_bias", True)
    config.finish()
    return replace(settings, qkv_bias=qkv_bias, height=settings.image, breadth=settings.image)


class Encoder(nn.Module):
    """pixel_values [tiles, 3, height, width] -> features [tiles, 1 + patches, width], the class token
    first, after the final norm."""

    def __init__(self, weights: Weights, settings: VisionSettings, quantizer: Quantizer) -> None:
        super().__init__("vision")
        embeddings, layers = weights.sub("embeddings"), weights.sub("encoder").sub("layers")
        width = settings.width
        table = embeddings.tensor("position_embedding", 1, 1 + settings.native_patches, width)
        positions = table.numpy()[0]
        # The class token is the same for every image: it goes into the first position's row.
        positions[0] += embeddings.tensor("class_embedding", 1, 1, width).numpy()[0, 0]
        self.embeddings = PatchEmbedding(
            embeddings.sub("patch_embedding"), settings, positions, bias=True, class_token=True
        )
        self.layers = nn.ModuleList(
            [_Block(layers.sub(i), settings, quantizer) for i in range(settings.layers)]
        )
        self.post_layernorm = LayerNorm(weights.sub("post_layernorm"), width, settings.epsilon)

    def forward(self, op: Any, pixels: ir.Value) -> ir.Value:
        states = hidden_states(op, self.layers, self.embeddings(op, pixels))
        for index, state in enumerate(states[1:]):
            state.name = f"vision.layers.{index}.output"
        return self.post_layernorm(op, states[-1])


class _Block(nn.Module):
    """Pre-norm attention and feed-forward."""

    def __init__(self, weights: Weights, settings: VisionSettings, quantizer: Quantizer) -> None:
        super().__init__()
        width = settings.width
        self.layer_norm1 = LayerNorm(weights.sub("layer_norm1"), width, settings.epsilon)
        self.self_attn = _SelfAttention(weights.sub("self_attn"), settings, quantizer)
        self.layer_norm2 = LayerNorm(weights.sub("layer_norm2"), width, settings.epsilon)
        self.mlp = MLP(weights.sub("mlp"), settings, quantizer)

    def forward(self, op: Any, x: ir.Value) -> ir.Value:
        x = op.Add(x, self.self_attn(op, self.layer_norm1(op, x)))
        return op.Add(x, self.mlp(op, self.layer_norm2(op, x)))


class _SelfAttention(nn.Module):
    """Bidirectional multi-head attention, x [tiles, tokens, width] -> same, from one tensor `qkv`.

    It is three linear layers here, so that each has scales of its own when it is quantized.
    """

    def __init__(self, weights: Weights, settings: VisionSettings, quantizer: Quantizer) -> None:
        super().__init__()
        width, self._heads = settings.width, settings.heads
        fused = weights.sub("qkv")
        matrices = fused.tensor("weight", 3 * width, width).split(3)
        biases = fused.tensor("bias", 3 * width).split(3) if settings.qkv_bias else [None] * 3
        self.q_proj, self.k_proj, self.v_proj = (
            TensorLinear(weights.name(name), matrix, bias, quantizer)
            for name, matrix, bias in zip(
                ("q_proj", "k_proj", "v_proj"), matrices, biases, strict=True
            )
        )
        self.projection = Linear(weights.sub("projection"), width, width, True, quantizer)

    def forward(self, op: Any, x: ir.Value) -> ir.Value:
        q, k, v = self.q_proj(op, x), self.k_proj(op, x), self.v_proj(op, x)
        mixed = op.Attention(q, k, v, q_num_heads=self._heads, kv_num_heads=self._heads)
        return self.projection(op, mixed)
