"""MPT decoders (MosaicML 2023): no biases, and a penalty on distance in the place of positions (ALiBi: Press
et al. 2022, arXiv 2108.12409).

Reference: transformers' MptForCausalLM.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript import nn

from vlm_edge.errors import UnsupportedConfig
from vlm_edge.export.checkpoint import Weights
from vlm_edge.export.config import Config
from vlm_edge.export.language.interface import MASKS, Mask
from vlm_edge.export.layers.cache import write
from vlm_edge.export.layers.linear import Linear, parameter
from vlm_edge.export.quantizers import Quantizer
from vlm_edge.export.tensors import constant
from vlm_edge.runtime.manifest import CacheDtype, DecoderSettings

MODEL_TYPES = ("mpt",)
EXPANSION = 4  # of the feed-forward
STEEPEST = (
    8  # negative exponent of the last head's slope; of neither does the reference read another
)
# What training alone depends on, and what the reference never reads.
UNREAD = """
    emb_init_std emb_init_uniform_lim emb_pdrop embedding_fraction fan_mode init_config init_device init_gain
    init_nonlinearity init_std learned_pos_emb norm_type param_init_fn resid_pdrop tokenizer_name verbose
""".split()
UNREAD_ATTENTION = ("attn_impl", "attn_pdrop")


@dataclass(frozen=True)
class MptConfig:
    """text_config as the graph needs it (`interface.DecoderFamily`)."""

    width: int
    layers: int
    heads: int
    max_positions: int
    vocab_size: int
    epsilon: float
    clip: float | None  # queries, keys and values are kept within it
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
            max_positions=self.max_positions,
            sliding_window=None,
            chunked_prefill=True,
            cache_dtype=self.cache_dtype,
        )

    def masks(self) -> list[Mask]:
        return ["full"] * self.layers

    def context(self, op: Any, weights: Weights, inputs: Mapping[str, ir.Value]) -> ir.Value:
        """The mask with the penalties, float32 [batch, heads, s, capacity]."""
        mask = inputs[MASKS["full"]]
        capacity = op.Squeeze(op.Shape(mask, start=3, end=4), [0])
        keys = op.Range(op.Constant(value_int=0), capacity, op.Constant(value_int=1))
        distance = op.Sub(
            keys, op.Unsqueeze(inputs["positions"], [1, 3])
        )  # [batch, 1, s, capacity]
        slopes = op.initializer(constant(self.slopes()[:, None, None]), "alibi_slopes")
        return op.Add(mask, op.Mul(op.Cast(distance, to=ir.DataType.FLOAT), slopes))

    def slopes(self) -> np.ndarray:
        """float32 [heads]: what a head subtracts for each step back.

        A geometric series; of heads that are no power of two, every second of the next power's first.
        """
        count = 2 ** math.ceil(math.log2(self.heads))
        exponents = np.arange(1, count + 1, dtype=np.float32) * np.float32(STEEPEST / count)
        found = 1 / np.power(np.float32(2), exponents)
        if count != self.heads:
            found = np.concatenate([found[1::2], found[::2]])[: self.heads]
        return found

    def layer(self, weights: Weights, index: int, quantizer: Quantizer) -> nn.Module:
        return Layer(weights.sub("blocks").sub(index), self, quantizer)

    def head(self, weights: Weights, head: Weights, quantizer: Quantizer) -> nn.Module:
        return Head(weights, head, self, quantizer)


def read(config: Config, cache_dtype: CacheDtype = "float32") -> MptConfig:
    """text_config of an MPT, and how its cache is to be stored.

    Raises:
        UnsupportedConfig: a value or key the graph cannot honour.
    """
    config.choice("model_type", "mpt", MODEL_TYPES)
    for key in UNREAD:
        config.get(key)
    config.only("no_bias", True, True, "MPT's layers have no biases here")
    config.only("expansion_ratio", EXPANSION, EXPANSION, "transformers reads no other")
    config.only("logit_scale", None, None, "logits are not scaled here")
    attention = config.sub("attn_config")
    for key in UNREAD_ATTENTION:
        attention.get(key)
    kind = "multihead_attention"
    attention.only("attn_type", kind, kind, "known is multihead_attention")
    attention.only("alibi", True, True, "known is ALiBi alone")
    attention.only("softmax_scale", None, None, "scores are divided by the root of the head's size")
    attention.only("alibi_bias_max", STEEPEST, STEEPEST, "transformers reads no other")
    clip = attention.get("clip_qkv")
    width, heads = config.size("d_model", 2048), config.size("n_heads", 16)
    if width % heads:
        raise UnsupportedConfig(
            config.name("n_heads"), heads, f"it should divide d_model = {width}"
        )
    decoder = MptConfig(
        width=width,
        layers=config.size("n_layers", 24),
        heads=heads,
        max_positions=config.size("max_seq_len", 2048),
        vocab_size=config.size("vocab_size", 50368),
        epsilon=config.number("layer_norm_epsilon", 1e-5),
        clip=None if not clip else attention.number("clip_qkv", 0.0),
        tied=config.flag("tie_word_embeddings", True),
        cache_dtype=cache_dtype,
    )
    attention.finish()
    config.finish()
    return decoder


class Layer(nn.Module):
    """One layer of the decoder (`interface.DecoderFamily.layer`); its context is the mask with the
    penalties."""

    def __init__(self, weights: Weights, config: MptConfig, quantizer: Quantizer) -> None:
        super().__init__()
        width, feed_forward = config.width, weights.sub("ffn")
        self.norm_1 = _Norm(weights.sub("norm_1"), config)
        self.attn = _Attention(weights.sub("attn"), config, quantizer)
        self.norm_2 = _Norm(weights.sub("norm_2"), config)
        hidden = EXPANSION * width
        self.up_proj = Linear(feed_forward.sub("up_proj"), width, hidden, False, quantizer)
        self.down_proj = Linear(feed_forward.sub("down_proj"), hidden, width, False, quantizer)

    def forward(
        self,
        op: Any,
        x: ir.Value,
        penalties: ir.Value,
        write_indices: ir.Value,
        mask: ir.Value,
        cache: Sequence[ir.Value],
    ) -> tuple[ir.Value, list[ir.Value]]:
        mixed, written = self.attn(op, self.norm_1(op, x), penalties, write_indices, cache)
        x = op.Add(x, mixed)
        return op.Add(x, self.down_proj(op, op.Gelu(self.up_proj(op, self.norm_2(op, x))))), written


class Head(nn.Module):
    """What follows the last layer: the final norm and the output projection."""

    def __init__(
        self, weights: Weights, head: Weights, config: MptConfig, quantizer: Quantizer
    ) -> None:
        super().__init__()
        self.norm_f = _Norm(weights.sub("norm_f"), config)
        self.lm_head = Linear(head, config.width, config.vocab_size, False, quantizer)

    def forward(self, op: Any, x: ir.Value) -> ir.Value:
        return self.lm_head(op, self.norm_f(op, x))


class _Attention(nn.Module):
    def __init__(self, weights: Weights, config: MptConfig, quantizer: Quantizer) -> None:
        super().__init__()
        width, self._clip = config.width, config.clip
        self._shape = [0, 0, config.heads, config.head_dim]
        self.Wqkv = Linear(weights.sub("Wqkv"), width, 3 * width, False, quantizer)
        self.out_proj = Linear(weights.sub("out_proj"), width, width, False, quantizer)

    def forward(
        self,
        op: Any,
        x: ir.Value,
        penalties: ir.Value,
        write_indices: ir.Value,
        cache: Sequence[ir.Value],
    ) -> tuple[ir.Value, list[ir.Value]]:
        fused = self.Wqkv(op, x)  # [batch, s, 3 * width]
        if self._clip is not None:
            fused = op.Clip(fused, -self._clip, self._clip)
        q, k, v = (
            op.Transpose(op.Reshape(part, self._shape), perm=[0, 2, 1, 3])
            for part in op.Split(fused, axis=-1, num_outputs=3, _outputs=3)
        )
        keys, values, cache = write(op, cache, k, v, write_indices)
        mixed = op.Attention(q, keys, values, penalties)  # [batch, heads, s, head_dim]
        mixed = op.Reshape(op.Transpose(mixed, perm=[0, 2, 1, 3]), [0, 0, -1])
        return self.out_proj(op, mixed), cache


class _Norm(nn.Module):
    """Layer normalisation without a bias."""

    def __init__(self, weights: Weights, config: MptConfig) -> None:
        super().__init__()
        self.weight, self._epsilon = parameter(weights, "weight", config.width), config.epsilon

    def forward(self, op: Any, x: ir.Value) -> ir.Value:
        return op.LayerNormalization(x, self.weight, axis=-1, epsilon=self._epsilon)
