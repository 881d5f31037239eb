"""OPT decoders (Zhang et al. 2022, arXiv 2205.01068), Galactica among them.

Learned positions, as many key-value heads as heads, a feed-forward without a gate. The norms stand
before each block, or behind the sum with it (OPT-350m), and the token table may be of another width than
the layers, with a projection on both sides.

Reference: transformers' OPTForCausalLM.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript import nn

from vlm_edge.errors import UnsupportedConfig
from vlm_edge.export.checkpoint import TensorRef, Weights
from vlm_edge.export.config import Config
from vlm_edge.export.language.interface import Mask
from vlm_edge.export.layers.activations import Activation, activation
from vlm_edge.export.layers.cache import write
from vlm_edge.export.layers.linear import Linear
from vlm_edge.export.quantizers import Quantizer
from vlm_edge.export.tensors import constant, float_tensor
from vlm_edge.runtime.manifest import CacheDtype, DecoderSettings

MODEL_TYPES = ("opt",)
EPSILON = 1e-5  # torch.nn.LayerNorm's own; no key sets it
OFFSET = 2  # rows of the position table before that of position 0


@dataclass(frozen=True)
class OptConfig:
    """text_config as the graph needs it (`interface.DecoderFamily`)."""

    width: int  # of the token table
    state_width: int
    hidden: int
    layers: int
    heads: int
    max_positions: int
    vocab_size: int
    bias: bool
    affine: bool
    norm_before: bool
    final_norm: bool
    act: Activation
    tied: bool
    cache_dtype: CacheDtype

    @property
    def head_dim(self) -> int:
        return self.state_width // self.heads

    @property
    def projected(self) -> bool:
        """Has the token table another width than the layers?"""
        return self.width != self.state_width

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
        return inputs["positions"]

    def layer(self, weights: Weights, index: int, quantizer: Quantizer) -> nn.Module:
        kind = Layer if index else FirstLayer
        return kind(weights, index, self, quantizer)

    def head(self, weights: Weights, head: Weights, quantizer: Quantizer) -> nn.Module:
        return Head(weights, head, self, quantizer)


def read(config: Config, cache_dtype: CacheDtype = "float32") -> OptConfig:
    """text_config of an OPT model, and how its cache is to be stored.

    Raises:
        UnsupportedConfig: a value or key the graph cannot honour.
    """
    config.choice("model_type", "opt", MODEL_TYPES)
    width, heads = config.size("hidden_size", 768), config.size("num_attention_heads", 12)
    if width % heads:
        raise UnsupportedConfig(
            config.name("num_attention_heads"), heads, f"it should divide hidden_size = {width}"
        )
    before = config.flag("do_layer_norm_before", True)
    removed = config.flag("_remove_final_layer_norm", False)
    decoder = OptConfig(
        width=config.size("word_embed_proj_dim", width),
        state_width=width,
        hidden=config.size("ffn_dim", 3072),
        layers=config.size("num_hidden_layers", 12),
        heads=heads,
        max_positions=config.size("max_position_embeddings", 2048),
        vocab_size=config.size("vocab_size", 50272),
        bias=config.flag("enable_bias", True),
        affine=config.flag("layer_norm_elementwise_affine", True),
        norm_before=before,
        final_norm=before and not removed,
        act=activation(config, "activation_function", "relu"),
        tied=config.flag("tie_word_embeddings", True),
        cache_dtype=cache_dtype,
    )
    config.finish()
    return decoder


class Layer(nn.Module):
    """One layer of the decoder (`interface.DecoderFamily.layer`)."""

    def __init__(
        self, weights: Weights, index: int, config: OptConfig, quantizer: Quantizer
    ) -> None:
        super().__init__()
        weights, width = weights.sub("layers").sub(index), config.state_width
        self._before, self._act = config.norm_before, config.act
        self.self_attn = _Attention(weights.sub("self_attn"), config, quantizer)
        self.self_attn_layer_norm = _Norm(weights.sub("self_attn_layer_norm"), config)
        self.fc1 = Linear(weights.sub("fc1"), width, config.hidden, config.bias, quantizer)
        self.fc2 = Linear(weights.sub("fc2"), config.hidden, width, config.bias, quantizer)
        self.final_layer_norm = _Norm(weights.sub("final_layer_norm"), config)

    def forward(
        self,
        op: Any,
        x: ir.Value,
        positions: ir.Value,
        write_indices: ir.Value,
        mask: ir.Value,
        cache: Sequence[ir.Value],
    ) -> tuple[ir.Value, list[ir.Value]]:
        first, second = self.self_attn_layer_norm, self.final_layer_norm
        if self._before:
            mixed, written = self.self_attn(op, first(op, x), write_indices, mask, cache)
            x = op.Add(x, mixed)
            return op.Add(x, self._feed_forward(op, second(op, x))), written
        mixed, written = self.self_attn(op, x, write_indices, mask, cache)
        x = first(op, op.Add(x, mixed))
        return second(op, op.Add(x, self._feed_forward(op, x))), written

    def _feed_forward(self, op: Any, x: ir.Value) -> ir.Value:
        return self.fc2(op, self._act(op, self.fc1(op, x)))


class FirstLayer(Layer):
    """The layer that takes inputs_embeds: projected, with the positions added."""

    def __init__(
        self, weights: Weights, index: int, config: OptConfig, quantizer: Quantizer
    ) -> None:
        super().__init__(weights, index, config, quantizer)
        rows, width = config.max_positions + OFFSET, config.state_width
        table = weights.sub("embed_positions").tensor("weight", rows, width)
        table = TensorRef(table.name, table.view[OFFSET:])
        self.embed_positions = nn.Parameter(table.shape, data=float_tensor(table))
        self.project_in: Linear | None = None
        if config.projected:
            project_in = weights.sub("project_in")
            self.project_in = Linear(project_in, config.width, width, False, quantizer)

    def forward(
        self, op: Any, x: ir.Value, positions: ir.Value, *rest: Any
    ) -> tuple[ir.Value, list[ir.Value]]:
        if self.project_in is not None:
            x = self.project_in(op, x)
        x = op.Add(x, op.Gather(self.embed_positions, positions))  # [batch, s, state_width]
        return super().forward(op, x, positions, *rest)


class Head(nn.Module):
    """What follows the last layer: the final norm, the projection and the output projection, the first
    two where the model has them."""

    def __init__(
        self, weights: Weights, head: Weights, config: OptConfig, quantizer: Quantizer
    ) -> None:
        super().__init__()
        width = config.state_width
        self.final_layer_norm: _Norm | None = None
        self.project_out: Linear | None = None
        if config.final_norm:
            self.final_layer_norm = _Norm(weights.sub("final_layer_norm"), config)
        if config.projected:
            project_out = weights.sub("project_out")
            self.project_out = Linear(project_out, width, config.width, False, quantizer)
        self.lm_head = Linear(head, config.width, config.vocab_size, False, quantizer)

    def forward(self, op: Any, x: ir.Value) -> ir.Value:
        for module in (self.final_layer_norm, self.project_out):
            x = x if module is None else module(op, x)
        return self.lm_head(op, x)


class _Attention(nn.Module):
    def __init__(self, weights: Weights, config: OptConfig, quantizer: Quantizer) -> None:
        super().__init__()
        self._heads, self._head_dim, width = config.heads, config.head_dim, config.state_width

        def linear(name: str) -> Linear:
            return Linear(weights.sub(name), width, width, config.bias, quantizer)

        self.q_proj, self.k_proj, self.v_proj = linear("q_proj"), linear("k_proj"), linear("v_proj")
        self.out_proj = linear("out_proj")

    def forward(
        self,
        op: Any,
        x: ir.Value,
        write_indices: ir.Value,
        mask: ir.Value,
        cache: Sequence[ir.Value],
    ) -> tuple[ir.Value, list[ir.Value]]:
        q, k, v = (
            self._split(op, layer(op, x)) for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        keys, values, cache = write(op, cache, k, v, write_indices)
        mixed = op.Attention(q, keys, values, mask)  # [batch, heads, s, head_dim]
        mixed = op.Transpose(mixed, perm=[0, 2, 1, 3])
        mixed = op.Reshape(mixed, [0, 0, self._heads * self._head_dim])
        return self.out_proj(op, mixed), cache

    def _split(self, op: Any, x: ir.Value) -> ir.Value:
        """[batch, s, heads * head_dim] -> [batch, heads, s, head_dim]"""
        x = op.Reshape(x, [0, 0, self._heads, self._head_dim])
        return op.Transpose(x, perm=[0, 2, 1, 3])


class _Norm(nn.Module):
    """Layer normalisation; without tensors of its own (Galactica) its scale is 1 and its bias 0."""

    def __init__(self, weights: Weights, config: OptConfig) -> None:
        super().__init__()

        def tensor(name: str, otherwise: float) -> nn.Parameter:
            width = config.state_width
            data: ir.TensorProtocol = constant(np.full(width, otherwise, np.float32))
            if config.affine:
                data = float_tensor(weights.tensor(name, width))
            return nn.Parameter((width,), data=data)

        self.weight, self.bias = tensor("weight", 1.0), tensor("bias", 0.0)

    def forward(self, op: Any, x: ir.Value) -> ir.Value:
        return op.LayerNormalization(x, self.weight, self.bias, axis=-1, epsilon=EPSILON)
