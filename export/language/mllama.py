"""Llama 3.2 Vision's language model (Dubey et al. 2024, arXiv 2407.21783, section 7.2): Llama, and layers
between its own that attend to pictures.

Reference: transformers' MllamaForConditionalGeneration.
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

EXTRA_ROWS = 8  # of the token table behind the vocabulary: the image token's is the first


@dataclass(frozen=True)
class MllamaText:
    """text_config of Llama 3.2 Vision.

    Attributes:
        text: the Llama, without the layers that attend to pictures.
        cross: numbers of those, in the stack of all.
    """

    text: llama.DecoderConfig
    cross: tuple[int, ...]

    def decoder(self) -> Gated:
        """The decoder's family."""
        text = self.text
        stack = range(text.layers + len(self.cross))
        own = tuple(index for index in stack if index not in self.cross)
        before = tuple(
            self.cross.index(index - 1) if index - 1 in self.cross else None for index in own
        )
        media = MediaSettings(len(self.cross), text.kv_heads, text.head_dim, "mllama", None)
        return Gated(text, before, media, self._block, own)

    def _block(self, weights: Weights, number: int, quantizer: Quantizer) -> nn.Module:
        return Block(weights, self, number, quantizer)


def read(config: Config, cache_dtype: CacheDtype = "float32") -> MllamaText:
    """text_config of Llama 3.2 Vision, and how its cache is to be stored.

    Raises:
        UnsupportedConfig: a value or key the graph cannot honour.
    """
    config.choice("model_type", "mllama_text_model", ("mllama_text_model",))
    config.get("tie_word_embeddings")  # the head is a tensor of its own whatever it says
    width, heads = config.size("hidden_size", 4096), config.size("num_attention_heads", 32)
    kv_heads, stack = config.size("num_key_value_heads", 8), config.size("num_hidden_layers", 40)
    if width % heads:
        why = f"it should divide the hidden size {width}"
        raise UnsupportedConfig(config.name("num_attention_heads"), heads, why)
    if heads % kv_heads:
        why = f"it should divide the {heads} heads"
        raise UnsupportedConfig(config.name("num_key_value_heads"), kv_heads, why)
    cross = _cross(config, stack)
    positions = config.size("max_position_embeddings", 131072)
    rope = read_rope(config, width // heads, positions, theta=500000.0)
    layers = stack - len(cross)
    text = llama.DecoderConfig(
        width=width,
        hidden=config.size("intermediate_size", 14336),
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=width // heads,
        max_positions=rope.max_positions,
        vocab_size=config.size("vocab_size", 128256),
        epsilon=config.number("rms_norm_eps", 1e-5),
        qkv_bias=False,
        output_bias=False,
        mlp_bias=False,
        act=activation(config, "hidden_act", "silu"),
        rope=rope,
        window=None,
        sliding=(False,) * layers,
        tied=False,
        cache_dtype=cache_dtype,
    )
    config.finish()
    return MllamaText(text, cross)


def _cross(config: Config, stack: int) -> tuple[int, ...]:
    """Numbers of the layers that attend to pictures, each with a layer of Llama behind it."""
    key = "cross_attention_layers"
    given = config.get(key, [3, 8, 13, 18, 23, 28, 33, 38])
    good = isinstance(given, list) and given and all(type(index) is int for index in given)
    if not good or not all(0 <= i < stack - 1 and i + 1 not in given for i in given):
        why = f"it should name some of the {stack} layers, but not the last or one next to another"
        raise UnsupportedConfig(config.name(key), given, why)
    return tuple(sorted(set(given)))


class Block(nn.Module):
    """A layer that attends to pictures (`gated.MakeBlock`).

    Args:
        weights: of the whole decoder.
        number: among the layers of its kind.
    """

    def __init__(
        self, weights: Weights, config: MllamaText, number: int, quantizer: Quantizer
    ) -> None:
        super().__init__()
        text, self._index = config.text, config.cross[number]
        weights = weights.sub("layers").sub(self._index)
        attention, width, self._width = weights.sub("cross_attn"), text.width, text.width
        self._split = _splitter(text.heads, text.head_dim)
        self.input_layernorm = RMSNorm(weights.sub("input_layernorm"), width, text.epsilon)
        self.q_proj = Linear(attention.sub("q_proj"), width, width, False, quantizer)
        self.q_norm = RMSNorm(attention.sub("q_norm"), text.head_dim, text.epsilon)
        self.o_proj = Linear(attention.sub("o_proj"), width, width, False, quantizer)
        self.post_attention_layernorm = RMSNorm(
            weights.sub("post_attention_layernorm"), width, text.epsilon
        )
        self.mlp = llama.MLP(weights.sub("mlp"), text, quantizer)
        self.attention_gate = _gate(weights, "cross_attn_attn_gate")
        self.feed_forward_gate = _gate(weights, "cross_attn_mlp_gate")

    def forward(self, op: Any, x: ir.Value, seen: Seen) -> ir.Value:
        q = self.q_norm(op, self._split(op, self.q_proj(op, self.input_layernorm(op, x))))
        mixed = op.Attention(q, seen.key, seen.value, seen.mask)  # [batch, heads, s, head_dim]
        mixed = op.Reshape(op.Transpose(mixed, perm=[0, 2, 1, 3]), [0, 0, self._width])
        gate = op.Mul(seen.attention_gate, self.attention_gate)  # [batch, s, 1]
        x = op.Add(x, op.Mul(self.o_proj(op, mixed), gate))
        gate = op.Mul(seen.feed_forward_gate, self.feed_forward_gate)
        x = op.Add(x, op.Mul(self.mlp(op, self.post_attention_layernorm(op, x)), gate))
        x.name = f"llm.layers.{self._index}.output"
        return x


class MediaKeysValues(nn.Module):
    """image_features [tiles, tokens, width] -> keys and values of each layer that attends to pictures,
    float32 [tiles, kv_heads, tokens, head_dim].

    Args:
        weights: of the whole decoder.
    """

    def __init__(self, weights: Weights, config: MllamaText, quantizer: Quantizer) -> None:
        super().__init__("media_kv")
        layers = weights.sub("layers")
        self.layers = nn.ModuleList(
            [
                _KeyValue(layers.sub(i).sub("cross_attn"), config.text, quantizer)
                for i in config.cross
            ]
        )

    def forward(self, op: Any, image_features: ir.Value) -> list[ir.Value]:
        return [value for layer in self.layers for value in layer(op, image_features)]


class _KeyValue(nn.Module):
    def __init__(self, weights: Weights, text: llama.DecoderConfig, quantizer: Quantizer) -> None:
        super().__init__()
        inner, self._split = text.kv_heads * text.head_dim, _splitter(text.kv_heads, text.head_dim)
        self.k_proj = Linear(weights.sub("k_proj"), text.width, inner, False, quantizer)
        self.k_norm = RMSNorm(weights.sub("k_norm"), text.head_dim, text.epsilon)
        self.v_proj = Linear(weights.sub("v_proj"), text.width, inner, False, quantizer)

    def forward(self, op: Any, x: ir.Value) -> tuple[ir.Value, ir.Value]:
        key = self.k_norm(op, self._split(op, self.k_proj(op, x)))
        return key, self._split(op, self.v_proj(op, x))


def _splitter(heads: int, head_dim: int) -> Callable[[Any, ir.Value], ir.Value]:
    """[batch, s, heads * head_dim] -> [batch, heads, s, head_dim]"""
    shape = [0, 0, heads, head_dim]
    return lambda op, x: op.Transpose(op.Reshape(x, shape), perm=[0, 2, 1, 3])


def _gate(weights: Weights, name: str) -> nn.Parameter:
    """tanh of the checkpoint's value, float32 [1]"""
    values = np.tanh(weights.tensor(name, 1).numpy())
    return nn.Parameter(values.shape, data=constant(values))
