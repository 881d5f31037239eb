"""T5 and Flan-T5: an encoder that reads the prompt and a decoder that writes the answer.

Pre-norm without biases; a learned bias by distance instead of positions (`layers/relative_positions.py`),
one for all layers of a stack; scores are not scaled (Raffel et al. 2020, arXiv 1910.10683). Flan-T5 is T5
1.1: gated feed-forward and an output head of its own (Chung et al. 2022, arXiv 2210.11416).
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
from vlm_edge.export.language.interface import MASKS, Mask
from vlm_edge.export.layers.activations import ACTIVATIONS, Activation
from vlm_edge.export.layers.cache import write
from vlm_edge.export.layers.linear import Linear, RMSNorm
from vlm_edge.export.layers.relative_positions import RelativePositions, read_relative_positions
from vlm_edge.export.quantizers import Quantizer
from vlm_edge.runtime.manifest import CacheDtype, DecoderSettings

MODEL_TYPES = ("t5",)
BIAS = "block.0.layer.0.SelfAttention.relative_attention_bias"  # of a whole stack
# What transformers 4 wrote and no longer reads; and what training alone depends on.
UNUSED = ("n_positions", "output_past", "dropout_rate")


@dataclass(frozen=True)
class T5Config:
    """text_config as the graphs need it (`interface.DecoderFamily`, of its decoder).

    Attributes:
        scaled: the decoder's output is multiplied by width^-0.5 before the head.
        tied: the head is the token table `shared`; else it is `lm_head`.
    """

    width: int
    hidden: int
    encoder_layers: int
    decoder_layers: int
    heads: int
    head_dim: int
    vocab_size: int
    epsilon: float
    positions: RelativePositions
    act: Activation
    gated: bool
    scaled: bool
    start_token_id: int
    tied: bool
    cache_dtype: CacheDtype

    @property
    def state_width(self) -> int:
        return self.width

    def settings(self) -> DecoderSettings:
        return DecoderSettings(
            layers=self.decoder_layers,
            kv_heads=self.heads,
            head_dim=self.head_dim,
            width=self.width,
            vocab_size=self.vocab_size,
            max_positions=None,
            sliding_window=None,
            chunked_prefill=True,
            cache_dtype=self.cache_dtype,
            start_token_id=self.start_token_id,
        )

    def masks(self) -> list[Mask]:
        return ["full"] * self.decoder_layers

    def context(self, op: Any, weights: Weights, inputs: Mapping[str, ir.Value]) -> Context:
        mask = inputs[MASKS["full"]]
        keys = op.Range(0, op.Squeeze(op.Shape(mask, start=3)), 1)  # [capacity]
        bias = self.positions.bias(
            op, weights.sub(f"decoder.{BIAS}"), self.heads, inputs["positions"], keys, False
        )
        return Context(op.Add(mask, bias), inputs)

    def layer(self, weights: Weights, index: int, quantizer: Quantizer) -> nn.Module:
        return DecoderLayer(weights.sub("decoder.block").sub(index), index, self, quantizer)

    def head(self, weights: Weights, head: Weights, quantizer: Quantizer) -> nn.Module:
        return Head(weights, head, self, quantizer)


@dataclass(frozen=True)
class Context:
    """What the decoder's layers share: the mask with the bias of distances, float32 [batch, heads, s,
    capacity], and the graph's inputs, the encoder's keys and values among them."""

    mask: ir.Value
    inputs: Mapping[str, ir.Value]


def read(config: Config, weights: Weights, cache_dtype: CacheDtype = "float32") -> T5Config:
    """text_config of a T5, and how its decoder's cache is to be stored.

    Args:
        weights: of the whole model: whether it has a head of its own, they alone say.

    Raises:
        UnsupportedConfig: a value or key the graphs cannot honour.
    """
    config.choice("model_type", "t5", MODEL_TYPES)
    config.only("is_encoder_decoder", True, True, "T5 is an encoder and a decoder")
    for key in UNUSED:
        config.get(key)
    layers = config.size("num_layers", 6)
    act, gated = _feed_forward(config)
    # The reference ties nothing by this flag: it takes it as the sign of the first T5, which scales.
    scaled = config.flag("tie_word_embeddings", True)
    t5 = T5Config(
        width=config.size("d_model", 512),
        hidden=config.size("d_ff", 2048),
        encoder_layers=layers,
        decoder_layers=config.size("num_decoder_layers", layers),
        heads=config.size("num_heads", 8),
        head_dim=config.size("d_kv", 64),
        vocab_size=config.size("vocab_size", 32128),
        epsilon=config.number("layer_norm_epsilon", 1e-6),
        positions=read_relative_positions(config),
        act=act,
        gated=gated,
        scaled=config.flag("scale_decoder_outputs", scaled),
        start_token_id=_start_token(config),
        tied=not weights.has("lm_head.weight"),
        cache_dtype=cache_dtype,
    )
    config.finish()
    return t5


def _feed_forward(config: Config) -> tuple[Activation, bool]:
    """Its activation, and whether it is gated. What transformers derives from `feed_forward_proj` it also
    writes, and reads back (BLIP-2's Flan-T5 has "gated-gelu" with the activation "gelu")."""
    kind = config.get("feed_forward_proj", "relu")
    gate, _, name = kind.rpartition("-") if isinstance(kind, str) else ("?", "", kind)
    if gate not in ("", "gated"):
        raise UnsupportedConfig(
            config.name("feed_forward_proj"), kind, 'it should be like "relu" or "gated-gelu"'
        )
    if kind == "gated-gelu":
        name = "gelu_new"
    if "dense_act_fn" not in config.values and name not in ACTIVATIONS:
        known = ", ".join(sorted(ACTIVATIONS))
        raise UnsupportedConfig(
            config.name("feed_forward_proj"), kind, f"known activations are {known}"
        )
    act = ACTIVATIONS[config.choice("dense_act_fn", name, ACTIVATIONS)]
    return act, config.flag("is_gated_act", gate == "gated")


def _start_token(config: Config) -> int:
    """Where the answer begins; the reference takes bos where nothing is said."""
    found = config.get("decoder_start_token_id", config.get("bos_token_id"))
    if isinstance(found, bool) or not isinstance(found, int) or found < 0:
        raise UnsupportedConfig(
            config.name("decoder_start_token_id"), found, "it should be the id of a token"
        )
    return found


class DecoderLayer(nn.Module):
    """One layer of the decoder (`interface.DecoderFamily.layer`)."""

    def __init__(
        self, weights: Weights, index: int, config: T5Config, quantizer: Quantizer
    ) -> None:
        super().__init__()
        self._cross = [f"cross.{kind}.{index}" for kind in ("key", "value")]
        self.attention_norm = norm(weights.sub("layer.0.layer_norm"), config)
        self.attention = SelfAttention(weights.sub("layer.0.SelfAttention"), config, quantizer)
        self.cross_norm = norm(weights.sub("layer.1.layer_norm"), config)
        self.cross = CrossAttention(weights.sub("layer.1.EncDecAttention"), config, quantizer)
        self.feed_forward = FeedForward(weights.sub("layer.2"), config, quantizer)

    def forward(
        self,
        op: Any,
        x: ir.Value,
        context: Context,
        write_indices: ir.Value,
        mask: ir.Value,
        cache: Sequence[ir.Value],
    ) -> tuple[ir.Value, list[ir.Value]]:
        normed = self.attention_norm(op, x)
        mixed, written = self.attention(op, normed, context.mask, cache, write_indices)
        x = op.Add(x, mixed)
        source = [context.inputs[name] for name in self._cross]
        x = op.Add(x, self.cross(op, self.cross_norm(op, x), *source))
        return self.feed_forward(op, x), written


class Head(nn.Module):
    """The last layer's output [batch, n, width] to logits [batch, n, vocab]."""

    def __init__(
        self, weights: Weights, head: Weights, config: T5Config, quantizer: Quantizer
    ) -> None:
        super().__init__()
        self._scale = config.width**-0.5 if config.scaled else None
        self.norm = norm(weights.sub("decoder.final_layer_norm"), config)
        self.lm_head = Linear(head, config.width, config.vocab_size, False, quantizer)

    def forward(self, op: Any, x: ir.Value) -> ir.Value:
        x = self.norm(op, x)
        return self.lm_head(op, x if self._scale is None else op.Mul(x, self._scale))


class SelfAttention(nn.Module):
    """Attention of x to itself, or to what a cache holds.

    forward(op, x, bias, cache, write_indices): x float32 [batch, s, width]; bias [batch, heads, s, keys],
    added to the scores; cache and write_indices as `layers.cache.write` takes them, empty in the encoder.
    Returns [batch, s, width] and the cache as it is now.
    """

    def __init__(self, weights: Weights, config: T5Config, quantizer: Quantizer) -> None:
        super().__init__()
        self._config, inner = config, config.heads * config.head_dim
        self.q, self.k, self.v = (
            Linear(weights.sub(name), config.width, inner, False, quantizer) for name in "qkv"
        )
        self.o = Linear(weights.sub("o"), inner, config.width, False, quantizer)

    def forward(
        self,
        op: Any,
        x: ir.Value,
        bias: ir.Value,
        cache: Sequence[ir.Value] = (),
        write_indices: ir.Value | None = None,
    ) -> tuple[ir.Value, list[ir.Value]]:
        q, k, v = (split(op, linear(op, x), self._config) for linear in (self.q, self.k, self.v))
        written = list[ir.Value]()
        if write_indices is not None:
            k, v, written = write(op, cache, k, v, write_indices)
        return self.o(op, _attend(op, self._config, q, k, v, bias)), written


class CrossAttention(nn.Module):
    """forward(op, x, key, value): attention of x [batch, s, width] to the encoder's keys and values,
    float32 [batch, heads, source, head_dim]. Returns [batch, s, width]."""

    def __init__(self, weights: Weights, config: T5Config, quantizer: Quantizer) -> None:
        super().__init__()
        self._config, inner = config, config.heads * config.head_dim
        self.q = Linear(weights.sub("q"), config.width, inner, False, quantizer)
        self.o = Linear(weights.sub("o"), inner, config.width, False, quantizer)

    def forward(self, op: Any, x: ir.Value, key: ir.Value, value: ir.Value) -> ir.Value:
        query = split(op, self.q(op, x), self._config)
        return self.o(op, _attend(op, self._config, query, key, value))


def _attend(op: Any, config: T5Config, *inputs: ir.Value) -> ir.Value:
    """Query, keys, values, and the bias if there is one, to [batch, s, heads * head_dim]."""
    mixed = op.Attention(*inputs, scale=1.0)  # [batch, heads, s, head_dim]
    mixed = op.Transpose(mixed, perm=[0, 2, 1, 3])
    return op.Reshape(mixed, [0, 0, config.heads * config.head_dim])


def split(op: Any, x: ir.Value, config: T5Config) -> ir.Value:
    """[batch, s, heads * head_dim] -> [batch, heads, s, head_dim]"""
    x = op.Reshape(x, [0, 0, config.heads, config.head_dim])
    return op.Transpose(x, perm=[0, 2, 1, 3])


class FeedForward(nn.Module):
    """x [batch, s, width] and what the feed-forward adds to it."""

    def __init__(self, weights: Weights, config: T5Config, quantizer: Quantizer) -> None:
        super().__init__()
        inner, width, hidden = weights.sub("DenseReluDense"), config.width, config.hidden
        self._act = config.act
        self.layer_norm = norm(weights.sub("layer_norm"), config)
        first = "wi_0" if config.gated else "wi"
        self.wi = Linear(inner.sub(first), width, hidden, False, quantizer)
        self.wi_1 = (
            Linear(inner.sub("wi_1"), width, hidden, False, quantizer) if config.gated else None
        )
        self.wo = Linear(inner.sub("wo"), hidden, width, False, quantizer)

    def forward(self, op: Any, x: ir.Value) -> ir.Value:
        normed = self.layer_norm(op, x)
        hidden = self._act(op, self.wi(op, normed))
        if self.wi_1 is not None:
            hidden = op.Mul(hidden, self.wi_1(op, normed))
        return op.Add(x, self.wo(op, hidden))


def norm(weights: Weights, config: T5Config) -> RMSNorm:
    return RMSNorm(weights, config.width, config.epsilon)
