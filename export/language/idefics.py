"""IDEFICS's language model (Laurençon et al. 2023, arXiv 2306.16527): Llama with gated cross-attention to
pictures before every so many layers.

Reference: transformers' IdeficsForVisionText2Text.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript import nn

from vlm_edge.errors import UnsupportedConfig
from vlm_edge.export.checkpoint import Weights
from vlm_edge.export.config import Config
from vlm_edge.export.language import llama
from vlm_edge.export.language.gated import Gated, Seen
from vlm_edge.export.layers.activations import activation
from vlm_edge.export.layers.linear import Linear, RMSNorm
from vlm_edge.export.layers.rope import read_rope
from vlm_edge.export.quantizers import Quantizer
from vlm_edge.export.tensors import constant
from vlm_edge.runtime.manifest import CacheDtype, MediaSettings

BLOCKS = "gated_cross_attn_layers"
# What training alone depends on, and keys of the first files that no model reads.
UNREAD = """
    alpha_initializer alphas_initializer_range cross_layer_activation_function ffn_dim freeze_lm_head
    freeze_text_layers freeze_text_module_exceptions freeze_vision_layers
    freeze_vision_module_exceptions max_new_tokens word_embed_proj_dim
""".split()


@dataclass(frozen=True)
class IdeficsConfig:
    """What IDEFICS's decoder is beside a Llama.

    Attributes:
        text: the Llama, its vocabulary with the additional tokens.
        additional: tokens whose rows of the token table and the head are tensors of their own.
        every: a block stands before layers 0, every, 2 * every ...
        features: width of what it attends to.
        qk_norms: queries and keys of the blocks go through norms over a head.
        alphas: shape of the tensors that gate a block's two halves.
    """

    text: llama.DecoderConfig
    additional: int
    every: int
    features: int
    qk_norms: bool
    alphas: tuple[int, ...]

    @property
    def blocks(self) -> int:
        return self.text.layers // self.every

    def decoder(self, end_token_id: int | None) -> Gated:
        """The decoder's family.

        Args:
            end_token_id: behind it no picture is seen until the next.
        """
        text = self.text
        media = MediaSettings(self.blocks, text.heads, text.head_dim, "immediate", end_token_id)
        before = tuple(
            None if index % self.every else index // self.every for index in range(text.layers)
        )
        return Gated(text, before, media, self._block)

    def _block(self, weights: Weights, number: int, quantizer: Quantizer) -> nn.Module:
        return Block(weights.sub(BLOCKS).sub(number), self, quantizer)


def read(config: Config, features: int, cache_dtype: CacheDtype = "float32") -> IdeficsConfig:
    """The language model's keys, which stand in config.json itself.

    Args:
        features: width of what the decoder attends to.
        cache_dtype: of its keys and values.

    Raises:
        UnsupportedConfig: a value the graphs cannot honour.
    """
    for key in UNREAD:
        config.get(key)
    width, layers = config.size("hidden_size", 4096), config.size("num_hidden_layers", 32)
    heads = config.size("num_attention_heads", 32)
    every = config.size("cross_layer_interval", 1)
    if width % heads:
        why = f"it should divide the hidden size {width}"
        raise UnsupportedConfig(config.name("num_attention_heads"), heads, why)
    if layers % every:
        why = f"it should divide the {layers} layers: there is no block for the last of them"
        raise UnsupportedConfig(config.name("cross_layer_interval"), every, why)
    additional = config.get("additional_vocab_size", 0)
    if additional != 0:
        additional = config.size("additional_vocab_size", 0)
    rope = read_rope(config, width // heads, config.size("max_position_embeddings", 2048))
    text = llama.DecoderConfig(
        width=width,
        hidden=config.size("intermediate_size", 11008),
        layers=layers,
        heads=heads,
        kv_heads=heads,
        head_dim=width // heads,
        max_positions=rope.max_positions,
        vocab_size=config.size("vocab_size", 32000) + additional,
        epsilon=config.number("rms_norm_eps", 1e-6),
        qkv_bias=False,
        output_bias=False,
        mlp_bias=False,
        act=activation(config, "hidden_act", "silu"),
        rope=rope,
        window=None,
        sliding=(False,) * layers,
        tied=config.flag("tie_word_embeddings", False),
        cache_dtype=cache_dtype,
    )
    kind = config.choice("alpha_type", "float", ("float", "vector"))
    return IdeficsConfig(
        text=text,
        additional=additional,
        every=every,
        features=features,
        qk_norms=config.flag("qk_layer_norms", False),
        alphas=(1,) if kind == "float" else (1, 1, width),
    )


class Block(nn.Module):
    """Cross-attention to pictures and a feed-forward, both gated (`gated.MakeBlock`)."""

    def __init__(self, weights: Weights, config: IdeficsConfig, quantizer: Quantizer) -> None:
        super().__init__()
        text, attention = config.text, weights.sub("cross_attn")
        width, self._width, self._split = text.width, text.width, _splitter(text)
        self.input_layernorm = RMSNorm(weights.sub("input_layernorm"), width, text.epsilon)
        self.q_proj = Linear(attention.sub("q_proj"), width, width, False, quantizer)
        self.q_layer_norm = _head_norm(attention.sub("q_layer_norm"), config)
        self.o_proj = Linear(attention.sub("o_proj"), width, width, False, quantizer)
        self.post_attention_layernorm = RMSNorm(
            weights.sub("post_attention_layernorm"), width, text.epsilon
        )
        self.mlp = llama.MLP(weights.sub("mlp"), text, quantizer)
        self.attention_gate = _gate(weights, "alpha_cross_attn", config)
        self.feed_forward_gate = _gate(weights, "alpha_dense", config)

    def forward(self, op: Any, x: ir.Value, seen: Seen) -> ir.Value:
        q = self._split(op, self.q_proj(op, self.input_layernorm(op, x)))
        if self.q_layer_norm is not None:
            q = self.q_layer_norm(op, q)
        mixed = op.Attention(q, seen.key, seen.value, seen.mask)  # [batch, heads, s, head_dim]
        mixed = op.Reshape(op.Transpose(mixed, perm=[0, 2, 1, 3]), [0, 0, self._width])
        gate = op.Mul(seen.attention_gate, self.attention_gate)  # [batch, s, 1 or width]
        x = op.Add(x, op.Mul(self.o_proj(op, mixed), gate))
        gate = op.Mul(seen.feed_forward_gate, self.feed_forward_gate)
        return op.Add(x, op.Mul(self.mlp(op, self.post_attention_layernorm(op, x)), gate))


class MediaKeysValues(nn.Module):
    """image_features [tiles, tokens, features] -> of each block the keys and the values, float32
    [tiles, heads, tokens, head_dim].

    Args:
        weights: of the whole decoder.
    """

    def __init__(self, weights: Weights, config: IdeficsConfig, quantizer: Quantizer) -> None:
        super().__init__("media_kv")
        blocks = weights.sub(BLOCKS)
        self.layers = nn.ModuleList(
            [
                _KeyValue(blocks.sub(i).sub("cross_attn"), config, quantizer)
                for i in range(config.blocks)
            ]
        )

    def forward(self, op: Any, image_features: ir.Value) -> list[ir.Value]:
        return [value for layer in self.layers for value in layer(op, image_features)]


class _KeyValue(nn.Module):
    def __init__(self, weights: Weights, config: IdeficsConfig, quantizer: Quantizer) -> None:
        super().__init__()
        width, self._split = config.text.width, _splitter(config.text)
        self.k_proj = Linear(weights.sub("k_proj"), config.features, width, False, quantizer)
        self.k_layer_norm = _head_norm(weights.sub("k_layer_norm"), config)
        self.v_proj = Linear(weights.sub("v_proj"), config.features, width, False, quantizer)

    def forward(self, op: Any, x: ir.Value) -> tuple[ir.Value, ir.Value]:
        key = self._split(op, self.k_proj(op, x))
        if self.k_layer_norm is not None:
            key = self.k_layer_norm(op, key)
        return key, self._split(op, self.v_proj(op, x))


def _splitter(text: llama.DecoderConfig) -> Callable[[Any, ir.Value], ir.Value]:
    """[batch, s, heads * head_dim] -> [batch, heads, s, head_dim]"""
    shape = [0, 0, text.heads, text.head_dim]
    return lambda op, x: op.Transpose(op.Reshape(x, shape), perm=[0, 2, 1, 3])


def _head_norm(weights: Weights, config: IdeficsConfig) -> RMSNorm | None:
    text = config.text
    return RMSNorm(weights, text.head_dim, text.epsilon) if config.qk_norms else None


def _gate(weights: Weights, name: str, config: IdeficsConfig) -> nn.Parameter:
    """tanh(alpha), float32 [1] or [width]"""
    values = np.tanh(weights.tensor(name, *config.alphas).numpy()).reshape(-1)
    return nn.Parameter(values.shape, data=constant(values))
