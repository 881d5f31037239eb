"""GPT-NeoX decoders (Black et al. 2022, arXiv 2204.06745): Pythia, RedPajama-INCITE, Dolly.

Attention and feed-forward read the same state, each through a norm of its own, and are added together
(or one after the other); the first part of each head is rotated; queries, keys and values of a head lie side
by side in one projection.

Reference: transformers' GPTNeoXForCausalLM.
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
from vlm_edge.export.layers.linear import LayerNorm, Linear
from vlm_edge.export.layers.rope import Rope, read_rope
from vlm_edge.export.quantizers import Quantizer
from vlm_edge.runtime.manifest import CacheDtype, DecoderSettings

MODEL_TYPES = ("gpt_neox",)


@dataclass(frozen=True)
class NeoxConfig:
    """text_config as the graph needs it (`interface.DecoderFamily`)."""

    width: int
    hidden: int
    layers: int
    heads: int
    vocab_size: int
    epsilon: float
    bias: bool  # of the attention's projections
    parallel: bool
    act: Activation
    rope: Rope  # of the rotated part of a head
    tied: bool
    cache_dtype: CacheDtype

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def state_width(self) -> int:
        return self.width

    def settings(self) -> DecoderSettings:
        return DecoderSettings(
            layers=self.layers,
            kv_heads=self.heads,
            head_dim=self.head_dim,
            width=self.width,
            vocab_size=self.vocab_size,
            max_positions=self.rope.max_positions,
            sliding_window=None,
            chunked_prefill=self.rope.dynamic is None,
            cache_dtype=self.cache_dtype,
        )

    def masks(self) -> list[Mask]:
        return ["full"] * self.layers

    def context(
        self, op: Any, weights: Weights, inputs: Mapping[str, ir.Value]
    ) -> tuple[ir.Value, ir.Value]:
        return self.rope(op, inputs["positions"])

    def layer(self, weights: Weights, index: int, quantizer: Quantizer) -> nn.Module:
        return Layer(weights.sub("layers").sub(index), self, quantizer)

    def head(self, weights: Weights, head: Weights, quantizer: Quantizer) -> nn.Module:
        return Head(weights, head, self, quantizer)


def read(config: Config, cache_dtype: CacheDtype = "float32") -> NeoxConfig:
    """text_config of a GPT-NeoX model, and how its cache is to be stored.

    Raises:
        UnsupportedConfig: a value or key the graph cannot honour.
    """
    config.choice("model_type", "gpt_neox", MODEL_TYPES)
    config.get("hidden_dropout")
    width, heads = config.size("hidden_size", 6144), config.size("num_attention_heads", 64)
    if width % heads:
        raise UnsupportedConfig(
            config.name("num_attention_heads"), heads, f"it should divide hidden_size = {width}"
        )
    decoder = NeoxConfig(
        width=width,
        hidden=config.size("intermediate_size", 24576),
        layers=config.size("num_hidden_layers", 44),
        heads=heads,
        vocab_size=config.size("vocab_size", 50432),
        epsilon=config.number("layer_norm_eps", 1e-5),
        bias=config.flag("attention_bias", True),
        parallel=config.flag("use_parallel_residual", True),
        act=activation(config, "hidden_act", "gelu"),
        rope=_rope(config, width // heads),
        tied=config.flag("tie_word_embeddings", False),
        cache_dtype=cache_dtype,
    )
    config.finish()
    return decoder


def _rope(config: Config, head_dim: int) -> Rope:
    """Of the part of a head that is rotated: rotary_pct and rotary_emb_base (transformers 4), or the same in
    rope_parameters (5)."""
    parameters = dict(config.sub("rope_parameters").values)
    share = parameters.pop("partial_rotary_factor", None)
    share = config.number("rotary_pct", 0.25) if share is None else share
    theta = config.number("rotary_emb_base", config.number("rope_theta", 10000.0))
    if not isinstance(share, (int, float)) or not 0 < share <= 1:
        raise UnsupportedConfig(config.name("rotary_pct"), share, "it should be above 0, at most 1")
    scaling = config.sub("rope_scaling").values
    whole = {"rope_parameters": parameters, "rope_scaling": scaling, "rope_theta": theta}
    positions = config.size("max_position_embeddings", 2048)
    return read_rope(Config(whole, config.path), int(head_dim * share), positions)


class Layer(nn.Module):
    """One layer of the decoder (`interface.DecoderFamily.layer`); its context are cosines and sines."""

    def __init__(self, weights: Weights, config: NeoxConfig, quantizer: Quantizer) -> None:
        super().__init__()
        width, epsilon, mlp = config.width, config.epsilon, weights.sub("mlp")
        self._parallel, self._act = config.parallel, config.act
        self.input_layernorm = LayerNorm(weights.sub("input_layernorm"), width, epsilon)
        self.attention = _Attention(weights.sub("attention"), config, quantizer)
        self.post_attention_layernorm = LayerNorm(
            weights.sub("post_attention_layernorm"), width, epsilon
        )
        self.dense_h_to_4h = Linear(mlp.sub("dense_h_to_4h"), width, config.hidden, True, quantizer)
        self.dense_4h_to_h = Linear(mlp.sub("dense_4h_to_h"), config.hidden, width, True, quantizer)

    def forward(self, op: Any, x: ir.Value, *context: Any) -> tuple[ir.Value, list[ir.Value]]:
        mixed, cache = self.attention(op, self.input_layernorm(op, x), *context)
        if self._parallel:
            return op.Add(op.Add(x, mixed), self._feed_forward(op, x)), cache
        x = op.Add(x, mixed)
        return op.Add(x, self._feed_forward(op, x)), cache

    def _feed_forward(self, op: Any, x: ir.Value) -> ir.Value:
        x = self.dense_h_to_4h(op, self.post_attention_layernorm(op, x))
        return self.dense_4h_to_h(op, self._act(op, x))


class Head(nn.Module):
    """What follows the last layer: the final norm and the output projection."""

    def __init__(
        self, weights: Weights, head: Weights, config: NeoxConfig, quantizer: Quantizer
    ) -> None:
        super().__init__()
        norm = weights.sub("final_layer_norm")
        self.final_layer_norm = LayerNorm(norm, config.width, config.epsilon)
        self.embed_out = Linear(head, config.width, config.vocab_size, False, quantizer)

    def forward(self, op: Any, x: ir.Value) -> ir.Value:
        return self.embed_out(op, self.final_layer_norm(op, x))


class _Attention(nn.Module):
    def __init__(self, weights: Weights, config: NeoxConfig, quantizer: Quantizer) -> None:
        super().__init__()
        width, bias = config.width, config.bias
        self._heads, self._head_dim = config.heads, config.head_dim
        self._rotated = config.rope.head_dim
        fused = weights.sub("query_key_value")
        self.query_key_value = Linear(fused, width, 3 * width, bias, quantizer)
        self.dense = Linear(weights.sub("dense"), width, width, bias, quantizer)

    def forward(
        self,
        op: Any,
        x: ir.Value,
        rope: tuple[ir.Value, ir.Value],
        write_indices: ir.Value,
        mask: ir.Value,
        cache: Sequence[ir.Value],
    ) -> tuple[ir.Value, list[ir.Value]]:
        fused = op.Reshape(self.query_key_value(op, x), [0, 0, self._heads, 3 * self._head_dim])
        fused = op.Transpose(fused, perm=[0, 2, 1, 3])  # [batch, heads, s, 3 * head_dim]
        q, k, v = op.Split(fused, axis=-1, num_outputs=3, _outputs=3)
        q, k = self._rotate(op, q, rope), self._rotate(op, k, rope)
        keys, values, cache = write(op, cache, k, v, write_indices)
        mixed = op.Attention(q, keys, values, mask)  # [batch, heads, s, head_dim]
        mixed = op.Transpose(mixed, perm=[0, 2, 1, 3])
        mixed = op.Reshape(mixed, [0, 0, self._heads * self._head_dim])
        return self.dense(op, mixed), cache

    def _rotate(self, op: Any, x: ir.Value, rope: tuple[ir.Value, ir.Value]) -> ir.Value:
        if self._rotated == self._head_dim:
            return op.RotaryEmbedding(x, *rope)
        return op.RotaryEmbedding(x, *rope, rotary_embedding_dim=self._rotated)
