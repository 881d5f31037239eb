"""OpenFlamingo's language model (Awadalla et al. 2023, arXiv 2308.01390): a decoder of any family with gated
cross-attention to pictures before some of its layers (Alayrac et al. 2022, arXiv 2204.14198).

Reference: the package open-flamingo 2.0.1, `GatedCrossAttentionBlock`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript import nn

from vlm_edge.export.checkpoint import Weights
from vlm_edge.export.language.gated import Gated, Seen
from vlm_edge.export.language.interface import DecoderFamily
from vlm_edge.export.layers.linear import LayerNorm, Linear
from vlm_edge.export.quantizers import Quantizer
from vlm_edge.export.tensors import constant
from vlm_edge.runtime.manifest import MediaRule, MediaSettings

# No option of the package changes these, of the blocks and of the resampler.
HEADS, HEAD_DIM, EXPANSION = 8, 64, 4
EPSILON = 1e-5  # of every norm: torch.nn.LayerNorm's own


@dataclass(frozen=True)
class Blocks:
    """The gated blocks of one model.

    Attributes:
        base: the decoder without them.
        layers: the decoder's layers that have one before them, ascending; blocks are named after them.
        features: width of what they attend to.
        weights: of all of them.
    """

    base: DecoderFamily
    layers: tuple[int, ...]
    features: int
    rule: MediaRule
    weights: Weights

    def decoder(self) -> Gated:
        """The decoder's family."""
        media = MediaSettings(len(self.layers), HEADS, HEAD_DIM, self.rule, end_token_id=None)
        number = {layer: number for number, layer in enumerate(self.layers)}
        before = tuple(number.get(index) for index in range(self.base.settings().layers))
        return Gated(self.base, before, media, self._block)

    def _block(self, weights: Weights, number: int, quantizer: Quantizer) -> nn.Module:
        return Block(self.weights.sub(self.layers[number]), self.base.state_width, quantizer)


class Block(nn.Module):
    """Cross-attention to pictures and a feed-forward, both gated (`gated.MakeBlock`)."""

    def __init__(self, weights: Weights, width: int, quantizer: Quantizer) -> None:
        super().__init__()
        attention, feed_forward, inner = weights.sub("attn"), weights.sub("ff"), HEADS * HEAD_DIM
        self.norm = LayerNorm(attention.sub("norm"), width, EPSILON)
        self.to_q = Linear(attention.sub("to_q"), width, inner, False, quantizer)
        self.to_out = Linear(attention.sub("to_out"), inner, width, False, quantizer)
        hidden = EXPANSION * width
        self.ff_norm = LayerNorm(feed_forward.sub(0), width, EPSILON)
        self.ff_in = Linear(feed_forward.sub(1), width, hidden, False, quantizer)
        self.ff_out = Linear(feed_forward.sub(3), hidden, width, False, quantizer)
        self.attn_gate, self.ff_gate = _gate(weights, "attn_gate"), _gate(weights, "ff_gate")

    def forward(self, op: Any, x: ir.Value, seen: Seen) -> ir.Value:
        q = _heads(op, self.to_q(op, self.norm(op, x)))
        mixed = op.Attention(q, seen.key, seen.value, seen.mask)  # [batch, heads, s, head_dim]
        mixed = op.Reshape(op.Transpose(mixed, perm=[0, 2, 1, 3]), [0, 0, HEADS * HEAD_DIM])
        gate = op.Mul(seen.attention_gate, self.attn_gate)  # [batch, s, 1]
        x = op.Add(x, op.Mul(self.to_out(op, mixed), gate))
        fed = self.ff_out(op, op.Gelu(self.ff_in(op, self.ff_norm(op, x))))
        return op.Add(x, op.Mul(fed, op.Mul(seen.feed_forward_gate, self.ff_gate)))


class MediaKeysValues(nn.Module):
    """image_features [tiles, tokens, features] -> of each block the keys and the values, float32
    [tiles, heads, tokens, head_dim]."""

    def __init__(self, blocks: Blocks, quantizer: Quantizer) -> None:
        super().__init__("media_kv")
        projections = [
            Linear(
                blocks.weights.sub(layer).sub("attn").sub(name),
                blocks.features,
                HEADS * HEAD_DIM,
                False,
                quantizer,
            )
            for layer in blocks.layers
            for name in ("to_k", "to_v")
        ]
        self.projections = nn.ModuleList(projections)

    def forward(self, op: Any, image_features: ir.Value) -> list[ir.Value]:
        return [_heads(op, projection(op, image_features)) for projection in self.projections]


def _heads(op: Any, x: ir.Value) -> ir.Value:
    """[batch, s, heads * head_dim] -> [batch, heads, s, head_dim]"""
    return op.Transpose(op.Reshape(x, [0, 0, HEADS, HEAD_DIM]), perm=[0, 2, 1, 3])


def _gate(weights: Weights, name: str) -> nn.Parameter:
    """tanh of a gate, float32 [1]"""
    values = np.tanh(weights.tensor(name, 1).numpy())
    return nn.Parameter(values.shape, data=constant(values))
