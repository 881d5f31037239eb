"""The Perceiver resampler of IDEFICS and OpenFlamingo: learned latents that read a picture's features
(Alayrac et al. 2022, arXiv 2204.14198; Jaegle et al. 2021, arXiv 2103.03206).

In every block the latents attend to the features and to themselves, then go through a feed-forward. All is
as wide as the vision encoder. The two differ in the activation, and IDEFICS may have norms over a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
from onnxscript import nn

from vlm_edge.export.checkpoint import Weights
from vlm_edge.export.config import Config
from vlm_edge.export.layers.activations import ACTIVATIONS, Activation
from vlm_edge.export.layers.linear import LayerNorm, Linear, parameter
from vlm_edge.export.quantizers import Quantizer

EPSILON = 1e-5  # of every norm: torch.nn.LayerNorm's own


@dataclass(frozen=True)
class ResamplerSettings:
    """Sizes of the resampler.

    Attributes:
        latents: visual tokens of one picture.
        hidden: of the feed-forward.
        qk_norms: queries and keys go through norms over a head.
    """

    latents: int
    width: int
    hidden: int
    layers: int
    heads: int
    head_dim: int
    qk_norms: bool
    act: Activation


def read(config: Config, width: int) -> ResamplerSettings:
    """perceiver_config of IDEFICS.

    Args:
        width: of the vision encoder's features.

    Raises:
        UnsupportedConfig: a value or key that the resampler cannot honour.
    """
    for unread in (
        "model_type",
        "use_resampler",  # the one beside perceiver_config counts
        "tie_word_embeddings",  # transformers 4 wrote it into every config
    ):
        config.get(unread)
    settings = ResamplerSettings(
        latents=config.size("resampler_n_latents", 64),
        width=width,
        hidden=4 * width,
        layers=config.size("resampler_depth", 6),
        heads=config.size("resampler_n_heads", 16),
        head_dim=config.size("resampler_head_dim", 96),
        qk_norms=config.flag("qk_layer_norms_perceiver", False),
        act=ACTIVATIONS["relu"],
    )
    config.finish()
    return settings


class Resampler(nn.Module):
    """features [tiles, tokens, width] -> image_features [tiles, latents, width]"""

    def __init__(self, weights: Weights, settings: ResamplerSettings, quantizer: Quantizer) -> None:
        super().__init__("connector")
        blocks, width = weights.sub("blocks"), settings.width
        self.latents = parameter(weights, "latents", settings.latents, width)
        self.layers = nn.ModuleList(
            [_Block(blocks.sub(i), settings, quantizer) for i in range(settings.layers)]
        )
        self.layer_norm = LayerNorm(weights.sub("layer_norm"), width, EPSILON)

    def forward(self, op: Any, features: ir.Value) -> ir.Value:
        tiles = op.Concat(op.Shape(features, start=0, end=1), [1, 1], axis=0)
        x = op.Expand(self.latents, tiles)  # [tiles, latents, width]
        for index, layer in enumerate(self.layers):
            x = layer(op, x, features)
            x.name = f"connector.layers.{index}.output"
        return self.layer_norm(op, x)


class _Block(nn.Module):
    """x [tiles, latents, width] -> same"""

    def __init__(self, weights: Weights, settings: ResamplerSettings, quantizer: Quantizer) -> None:
        super().__init__()
        self.attention = _Attention(weights.sub(0), settings, quantizer)
        self.feed_forward = _FeedForward(weights.sub(1), settings, quantizer)

    def forward(self, op: Any, x: ir.Value, features: ir.Value) -> ir.Value:
        x = op.Add(x, self.attention(op, x, features))
        return op.Add(x, self.feed_forward(op, x))


class _Attention(nn.Module):
    """Latents [tiles, latents, width] attend to features [tiles, tokens, width] and themselves."""

    def __init__(self, weights: Weights, settings: ResamplerSettings, quantizer: Quantizer) -> None:
        super().__init__()
        width, inner = settings.width, settings.heads * settings.head_dim
        self._heads, self._head_dim = settings.heads, settings.head_dim
        self.context_layer_norm = LayerNorm(weights.sub("context_layer_norm"), width, EPSILON)
        self.latents_layer_norm = LayerNorm(weights.sub("latents_layer_norm"), width, EPSILON)
        self.q_layer_norm = self.k_layer_norm = None
        if settings.qk_norms:
            head = settings.head_dim
            self.q_layer_norm = LayerNorm(weights.sub("q_layer_norm"), head, EPSILON)
            self.k_layer_norm = LayerNorm(weights.sub("k_layer_norm"), head, EPSILON)
        self.q_proj = Linear(weights.sub("q_proj"), width, inner, False, quantizer)
        self.k_proj = Linear(weights.sub("k_proj"), width, inner, False, quantizer)
        self.v_proj = Linear(weights.sub("v_proj"), width, inner, False, quantizer)
        self.output_proj = Linear(weights.sub("output_proj"), inner, width, False, quantizer)

    def forward(self, op: Any, x: ir.Value, features: ir.Value) -> ir.Value:
        x = self.latents_layer_norm(op, x)
        both = op.Concat(self.context_layer_norm(op, features), x, axis=1)
        q = self._normed(op, self.q_layer_norm, self.q_proj(op, x))
        k = self._normed(op, self.k_layer_norm, self.k_proj(op, both))
        v = self.v_proj(op, both)  # [tiles, tokens + latents, heads * head_dim]
        mixed = op.Attention(q, k, v, q_num_heads=self._heads, kv_num_heads=self._heads)
        return self.output_proj(op, mixed)

    def _normed(self, op: Any, norm: LayerNorm | None, x: ir.Value) -> ir.Value:
        """[tiles, n, heads * head_dim], every head normalised by itself"""
        if norm is None:
            return x
        heads = op.Reshape(x, [0, 0, self._heads, self._head_dim])
        return op.Reshape(norm(op, heads), [0, 0, self._heads * self._head_dim])


class _FeedForward(nn.Module):
    def __init__(self, weights: Weights, settings: ResamplerSettings, quantizer: Quantizer) -> None:
        super().__init__()
        width, hidden, self._act = settings.width, settings.hidden, settings.act
        self.ln = LayerNorm(weights.sub("ln"), width, EPSILON)
        self.fc = Linear(weights.sub("fc"), width, hidden, False, quantizer)
        self.c_proj = Linear(weights.sub("c_proj"), hidden, width, False, quantizer)

    def forward(self, op: Any, x: ir.Value) -> ir.Value:
        return self.c_proj(op, self._act(op, self.fc(op, self.ln(op, x))))
