"""Llama-type decoders: Llama, Vicuna, SmolLM2 (llama), Mistral, Qwen2.

Pre-norm, rotary positions, grouped-query attention, gated feed-forward (Touvron et al. 2023, arXiv
2302.13971; Ainslie et al. 2023, arXiv 2305.13245). The families differ in biases and in the sliding
window only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
from onnxscript import nn

from vlm_edge.errors import UnsupportedConfig
from vlm_edge.export.checkpoint import Weights
from vlm_edge.export.config import Config
from vlm_edge.export.language.interface import Mask
from vlm_edge.export.layers.activations import Activation, activation
from vlm_edge.export.layers.cache import write
from vlm_edge.export.layers.linear import Linear, RMSNorm
from vlm_edge.export.layers.rope import Rope, read_rope
from vlm_edge.export.quantizers import Quantizer
from vlm_edge.runtime.manifest import CacheDtype, DecoderSettings

# transformers' defaults for keys that config.json leaves out:
# (hidden, feed-forward, layers, heads, key-value heads, positions, vocabulary, window)
DEFAULTS: dict[str, tuple[int, int, int, int, int | None, int, int, int | None]] = {
    "llama": (4096, 11008, 32, 32, None, 2048, 32000, None),
    "mistral": (4096, 14336, 32, 32, 8, 131072, 32000, 4096),
    "qwen2": (4096, 22016, 32, 32, 32, 32768, 151936, 4096),
}
MODEL_TYPES = tuple(DEFAULTS)


@dataclass(frozen=True)
class DecoderConfig:
    """text_config as the graph needs it (`interface.DecoderFamily`). `sliding` tells layer by layer who
    sees only `window` keys."""

    width: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    max_positions: int
    vocab_size: int
    epsilon: float
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    act: Activation
    rope: Rope
    window: int | None
    sliding: tuple[bool, ...]
    tied: bool
    cache_dtype: CacheDtype

    @property
    def state_width(self) -> int:
        return self.width

    def settings(self) -> DecoderSettings:
        return DecoderSettings(
            layers=self.layers,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            width=self.width,
            vocab_size=self.vocab_size,
            max_positions=self.max_positions,
            sliding_window=self.window,
            chunked_prefill=self.rope.dynamic is None,
            cache_dtype=self.cache_dtype,
        )

    def masks(self) -> list[Mask]:
        return ["sliding" if sliding else "full" for sliding in self.sliding]

    def context(
        self, op: Any, weights: Weights, inputs: Mapping[str, ir.Value]
    ) -> tuple[ir.Value, ir.Value]:
        return self.rope(op, inputs["positions"])

    def layer(self, weights: Weights, index: int, quantizer: Quantizer) -> nn.Module:
        return Layer(weights.sub("layers").sub(index), self, quantizer)

    def head(self, weights: Weights, head: Weights, quantizer: Quantizer) -> nn.Module:
        return Head(weights, head, self, quantizer)


def read(config: Config, cache_dtype: CacheDtype = "float32") -> DecoderConfig:
    """text_config of a Llama-type model, and how its cache is to be stored.

    Raises:
        UnsupportedConfig: a value or key the graph cannot honour.
    """
    kind = config.choice("model_type", "llama", MODEL_TYPES)
    width, hidden, layers, heads, kv_heads, positions, vocab, window = DEFAULTS[kind]
    width, heads = config.size("hidden_size", width), config.size("num_attention_heads", heads)
    kv_heads = config.size("num_key_value_heads", kv_heads or heads)
    head_dim = config.size("head_dim", width // heads)
    if heads % kv_heads:
        raise UnsupportedConfig(
            config.name("num_key_value_heads"), kv_heads, f"it should divide the {heads} heads"
        )
    positions = config.size("max_position_embeddings", positions)
    layers = config.size("num_hidden_layers", layers)
    rope = read_rope(config, head_dim, positions)
    bias = config.flag("attention_bias", False) if kind == "llama" else False
    window, sliding = _window(config, kind, layers, window)
    decoder = DecoderConfig(
        width=width,
        hidden=config.size("intermediate_size", hidden),
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        max_positions=rope.max_positions,
        vocab_size=config.size("vocab_size", vocab),
        epsilon=config.number("rms_norm_eps", 1e-6),
        qkv_bias=bias or kind == "qwen2",
        output_bias=bias,
        mlp_bias=config.flag("mlp_bias", False) if kind == "llama" else False,
        act=activation(config, "hidden_act", "silu"),
        rope=rope,
        window=window,
        sliding=sliding,
        tied=config.flag("tie_word_embeddings", False),
        cache_dtype=cache_dtype,
    )
    config.finish()
    return decoder


def _window(
    config: Config, kind: str, layers: int, default: int | None
) -> tuple[int | None, tuple[bool, ...]]:
    if default is None:
        return None, (False,) * layers
    # An explicit null switches the window off; only an absent key means the default.
    window: int | None = config.size("sliding_window", default)
    if config.values.get("sliding_window", default) is None:
        window = None
    if kind == "mistral":
        config.get("layer_types")  # the reference ignores it for Mistral
        return window, (window is not None,) * layers
    if not config.flag("use_sliding_window", False):
        window = None
    first = config.number("max_window_layers", 28)
    kinds = config.get("layer_types") or [
        "sliding_attention" if window is not None and i >= first else "full_attention"
        for i in range(layers)
    ]
    if len(kinds) != layers or not set(kinds) <= {"sliding_attention", "full_attention"}:
        raise UnsupportedConfig(
            config.name("layer_types"), kinds, f"it should name {layers} layers"
        )
    sliding = tuple(name == "sliding_attention" and window is not None for name in kinds)
    return (window if any(sliding) else None), sliding


class Layer(nn.Module):
    """One layer of the decoder (`interface.DecoderFamily.layer`); its context are cosines and sines."""

    def __init__(self, weights: Weights, config: DecoderConfig, quantizer: Quantizer) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(weights.sub("input_layernorm"), config.width, config.epsilon)
        self.self_attn = _Attention(weights.sub("self_attn"), config, quantizer)
        self.post_attention_layernorm = RMSNorm(
            weights.sub("post_attention_layernorm"), config.width, config.epsilon
        )
        self.mlp = MLP(weights.sub("mlp"), config, quantizer)

    def forward(self, op: Any, x: ir.Value, *context: Any) -> tuple[ir.Value, list[ir.Value]]:
        mixed, cache = self.self_attn(op, self.input_layernorm(op, x), *context)
        x = op.Add(x, mixed)
        return op.Add(x, self.mlp(op, self.post_attention_layernorm(op, x))), cache


class Head(nn.Module):
    """What follows the last layer: the final norm and the output projection."""

    def __init__(
        self, weights: Weights, head: Weights, config: DecoderConfig, quantizer: Quantizer
    ) -> None:
        super().__init__()
        self.norm = RMSNorm(weights.sub("norm"), config.width, config.epsilon)
        self.lm_head = Linear(head, config.width, config.vocab_size, False, quantizer)

    def forward(self, op: Any, x: ir.Value) -> ir.Value:
        return self.lm_head(op, self.norm(op, x))


class _Attention(nn.Module):
    def __init__(self, weights: Weights, config: DecoderConfig, quantizer: Quantizer) -> None:
        super().__init__()
        self._heads, self._kv_heads, self._head_dim = config.heads, config.kv_heads, config.head_dim
        width, inner, kv = (
            config.width,
            config.heads * config.head_dim,
            config.kv_heads * config.head_dim,
        )
        self.q_proj = Linear(weights.sub("q_proj"), width, inner, config.qkv_bias, quantizer)
        self.k_proj = Linear(weights.sub("k_proj"), width, kv, config.qkv_bias, quantizer)
        self.v_proj = Linear(weights.sub("v_proj"), width, kv, config.qkv_bias, quantizer)
        self.o_proj = Linear(weights.sub("o_proj"), inner, width, config.output_bias, quantizer)

    def forward(
        self,
        op: Any,
        x: ir.Value,
        rope: tuple[ir.Value, ir.Value],
        write_indices: ir.Value,
        mask: ir.Value,
        cache: Sequence[ir.Value],
    ) -> tuple[ir.Value, list[ir.Value]]:
        q = op.RotaryEmbedding(self._split(op, self.q_proj(op, x), self._heads), *rope)
        k = op.RotaryEmbedding(self._split(op, self.k_proj(op, x), self._kv_heads), *rope)
        v = self._split(op, self.v_proj(op, x), self._kv_heads)
        keys, values, cache = write(op, cache, k, v, write_indices)
        mixed = op.Attention(q, keys, values, mask)  # [batch, heads, s, head_dim]
        mixed = op.Reshape(
            op.Transpose(mixed, perm=[0, 2, 1, 3]), [0, 0, self._heads * self._head_dim]
        )
        return self.o_proj(op, mixed), cache

    def _split(self, op: Any, x: ir.Value, heads: int) -> ir.Value:
        """[batch, s, heads * head_dim] -> [batch, heads, s, head_dim]"""
        return op.Transpose(op.Reshape(x, [0, 0, heads, self._head_dim]), perm=[0, 2, 1, 3])


class MLP(nn.Module):
    """Gated feed-forward, x [..., width] -> same."""

    def __init__(self, weights: Weights, config: DecoderConfig, quantizer: Quantizer) -> None:
        super().__init__()
        width, hidden, bias = config.width, config.hidden, config.mlp_bias
        self._act = config.act
        self.gate_proj = Linear(weights.sub("gate_proj"), width, hidden, bias, quantizer)
        self.up_proj = Linear(weights.sub("up_proj"), width, hidden, bias, quantizer)
        self.down_proj = Linear(weights.sub("down_proj"), hidden, width, bias, quantizer)

    def forward(self, op: Any, x: ir.Value) -> ir.Value:
        return self.down_proj(op, op.Mul(self._act(op, self.gate_proj(op, x)), self.up_proj(op, x)))
