"""The Q-Former of BLIP-2 (Li et al. 2023, arXiv 2301.12597) and InstructBLIP (Dai et al. 2023, arXiv
2305.06500) with the projection into the language model.

Learned queries read a tile's features by cross-attention, every so many layers; in InstructBLIP they share
the self-attention with the words of the instruction. BERT's post-norm blocks throughout. Every tile has the
whole instruction, so there is no padding and no mask.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript import nn

from vlm_edge.errors import UnsupportedConfig
from vlm_edge.export.checkpoint import Weights
from vlm_edge.export.config import Config
from vlm_edge.export.layers.activations import Activation, activation
from vlm_edge.export.layers.linear import LayerNorm, Linear, parameter
from vlm_edge.export.quantizers import Quantizer
from vlm_edge.export.tensors import constant

# model_type of the whole config.json -> of its qformer_config
MODEL_TYPES = {"blip-2": "blip_2_qformer", "instructblip": "instructblip_qformer"}


@dataclass(frozen=True)
class QFormerSettings:
    """Sizes and form of the Q-Former and of the projection after it.

    Attributes:
        queries: visual tokens of one tile.
        every: cross-attention stands in layers 0, every, 2 * every ...
        features: width of the encoder's features.
        projected: outputs of the projection, the language model's hidden size.
        outputs: width of inputs_embeds; below `projected` where an OPT has its own (see `Connector`).
        instructed: the instruction is read too (InstructBLIP).
        vocabulary, max_positions: of the instruction's tokenizer, and the most tokens it may have.
    """

    queries: int
    width: int
    hidden: int
    layers: int
    heads: int
    every: int
    epsilon: float
    act: Activation
    features: int
    projected: int
    outputs: int
    instructed: bool
    vocabulary: int
    max_positions: int


def read(
    config: Config, vision_width: int, llm_width: int, embeds_width: int | None = None
) -> QFormerSettings:
    """From `qformer_config` and `num_query_tokens`.

    Args:
        config: the whole config.json.
        vision_width: of the encoder's features.
        llm_width: hidden size of the language model.
        embeds_width: of its inputs_embeds, where it is another (OPT's `word_embed_proj_dim`).

    Raises:
        UnsupportedConfig: a value or key that the Q-Former cannot honour, or embeddings that are wider
            than the projection's outputs.
    """
    kind = config.choice("model_type", "blip-2", MODEL_TYPES)
    config.get("image_text_hidden_size")  # of BLIP-2's retrieval heads
    qformer = config.sub("qformer_config")
    qformer.only(
        "model_type", MODEL_TYPES[kind], MODEL_TYPES[kind], f"it should be {kind}'s Q-Former"
    )
    for unread in (
        "encoder_hidden_size",  # the reference overwrites it with the encoder's width
        "use_qformer_text_input",  # weights for BLIP-2's retrieval heads, which no text goes through here
        "tie_word_embeddings",  # transformers 4 wrote it into every config
    ):
        qformer.get(unread)
    why = "positions of the Q-Former are learned embeddings here"
    qformer.only("position_embedding_type", "absolute", "absolute", why)
    settings = QFormerSettings(
        queries=config.size("num_query_tokens", 32),
        width=qformer.size("hidden_size", 768),
        hidden=qformer.size("intermediate_size", 3072),
        layers=qformer.size("num_hidden_layers", 12),
        heads=qformer.size("num_attention_heads", 12),
        every=qformer.size("cross_attention_frequency", 2),
        epsilon=qformer.number("layer_norm_eps", 1e-12),
        act=activation(qformer, "hidden_act", "gelu"),
        features=vision_width,
        projected=llm_width,
        outputs=llm_width if embeds_width is None else embeds_width,
        instructed=kind == "instructblip",
        vocabulary=qformer.size("vocab_size", 30522),
        max_positions=qformer.size("max_position_embeddings", 512),
    )
    qformer.finish()
    if settings.width % settings.heads:
        why = f"it should divide {settings.width}"
        raise UnsupportedConfig(qformer.name("num_attention_heads"), settings.heads, why)
    if settings.outputs > settings.projected:
        why = f"the language projection gives {settings.projected} values a token, which cannot fill it"
        raise UnsupportedConfig("text_config.word_embed_proj_dim", settings.outputs, why)
    return settings


class Connector(nn.Module):
    """features [tiles, tokens, features], and where the model is instructed instruction_ids int64
    [tiles, instruction] -> image_features [tiles, queries, outputs].

    The reference fills the image's places with the projection's values in their flat order. Where
    inputs_embeds are narrower than the projection, a place so takes the values where the last one ended
    and the last values go nowhere; trained that way or not, that is what the model computes.

    Args:
        weights: at the checkpoint's root.
    """

    def __init__(self, weights: Weights, settings: QFormerSettings, quantizer: Quantizer) -> None:
        super().__init__("connector")
        self._settings = settings
        qformer, width = weights.sub("qformer"), settings.width
        tokens = weights.tensor("query_tokens", 1, settings.queries, width).numpy()
        norm = qformer.sub("layernorm")
        self.instruction = None
        if settings.instructed:
            embeddings = qformer.sub("embeddings")
            norm = embeddings.sub("layernorm")
            self.instruction = _Instruction(embeddings, settings)
        queries = _normalized(tokens, norm, settings.epsilon)
        self.queries = nn.Parameter(queries.shape, data=constant(queries))
        layers = qformer.sub("encoder").sub("layer")
        self.layers = nn.ModuleList(
            [_Layer(layers.sub(i), settings, i, quantizer) for i in range(settings.layers)]
        )
        projection = weights.sub("language_projection")
        self.projection = Linear(projection, width, settings.projected, True, quantizer)

    def forward(
        self, op: Any, features: ir.Value, instruction_ids: ir.Value | None = None
    ) -> ir.Value:
        tiles = op.Concat(op.Shape(features, start=0, end=1), [1, 1], axis=0)
        x = op.Expand(self.queries, tiles)  # [tiles, queries, width]
        if self.instruction is not None:
            x = op.Concat(x, self.instruction(op, instruction_ids), axis=1)
        for index, layer in enumerate(self.layers):
            x = layer(op, x, features)
            x.name = f"connector.layers.{index}.output"
        # Identity: smoothing moves into a norm that only one layer reads, and the named output is one.
        return self._narrowed(op, self.projection(op, op.Identity(x)))

    def _narrowed(self, op: Any, x: ir.Value) -> ir.Value:
        """[tiles, queries, projected] -> [tiles, queries, outputs], the values in their flat order."""
        queries, outputs = self._settings.queries, self._settings.outputs
        if outputs == self._settings.projected:
            return x
        flat = op.Reshape(x, [0, -1])  # [tiles, queries * projected]
        return op.Reshape(op.Slice(flat, [0], [queries * outputs], [1]), [0, queries, outputs])


def _normalized(tokens: np.ndarray, norm: Weights, epsilon: float) -> np.ndarray:
    """The learned queries after the embeddings' norm, float32: the same for every image."""
    x = tokens.astype(np.float64)
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + epsilon)
    scale, shift = (norm.tensor(name, x.shape[-1]).numpy() for name in ("weight", "bias"))
    return (x * scale + shift).astype(np.float32)


class _Instruction(nn.Module):
    """instruction_ids int64 [tiles, instruction] -> embeddings [tiles, instruction, width]."""

    def __init__(self, weights: Weights, settings: QFormerSettings) -> None:
        super().__init__()
        width = settings.width
        words, positions = weights.sub("word_embeddings"), weights.sub("position_embeddings")
        self.words = parameter(words, "weight", settings.vocabulary, width)
        self.positions = parameter(positions, "weight", settings.max_positions, width)
        self.layernorm = LayerNorm(weights.sub("layernorm"), width, settings.epsilon)

    def forward(self, op: Any, ids: ir.Value) -> ir.Value:
        positions = op.Slice(self.positions, [0], op.Shape(ids, start=1, end=2), [0])
        return self.layernorm(op, op.Add(op.Gather(self.words, ids), positions))


class _Layer(nn.Module):
    """x [tiles, queries + instruction, width] -> same; of the last layer [tiles, queries, width]."""

    def __init__(
        self, weights: Weights, settings: QFormerSettings, index: int, quantizer: Quantizer
    ) -> None:
        super().__init__()
        width, self._queries = settings.width, settings.queries
        self._reads = settings.instructed
        # Nobody reads the instruction after the last layer.
        self._keeps = settings.instructed and index + 1 < settings.layers
        attention = weights.sub("attention")
        self.attention = _Attention(attention, settings, width, quantizer)
        self.crossattention = None
        if index % settings.every == 0:
            cross = weights.sub("crossattention")
            self.crossattention = _Attention(cross, settings, settings.features, quantizer)
        self.feed_forward_query = _FeedForward(weights, "_query", settings, quantizer)
        self.feed_forward = _FeedForward(weights, "", settings, quantizer) if self._keeps else None

    def forward(self, op: Any, x: ir.Value, features: ir.Value) -> ir.Value:
        asking = self._first(op, x) if self._reads and not self._keeps else x
        x = self.attention(op, asking, x)
        queries = self._first(op, x) if self._keeps else x
        if self.crossattention is not None:
            queries = self.crossattention(op, queries, features)
        queries = self.feed_forward_query(op, queries)
        if self.feed_forward is None:
            return queries
        text = op.Slice(x, [self._queries], [1 << 31], [1])
        return op.Concat(queries, self.feed_forward(op, text), axis=1)

    def _first(self, op: Any, x: ir.Value) -> ir.Value:
        return op.Slice(x, [0], [self._queries], [1])


class _Attention(nn.Module):
    """x [tiles, s, width] attends to memory [tiles, t, memory width] and is added; a norm after that."""

    def __init__(
        self, weights: Weights, settings: QFormerSettings, memory: int, quantizer: Quantizer
    ) -> None:
        super().__init__()
        width, self._heads = settings.width, settings.heads
        inner, output = weights.sub("attention"), weights.sub("output")
        self.query = Linear(inner.sub("query"), width, width, True, quantizer)
        self.key = Linear(inner.sub("key"), memory, width, True, quantizer)
        self.value = Linear(inner.sub("value"), memory, width, True, quantizer)
        self.dense = Linear(output.sub("dense"), width, width, True, quantizer)
        self.norm = LayerNorm(output.sub("LayerNorm"), width, settings.epsilon)

    def forward(self, op: Any, x: ir.Value, memory: ir.Value) -> ir.Value:
        q, k, v = self.query(op, x), self.key(op, memory), self.value(op, memory)
        mixed = op.Attention(q, k, v, q_num_heads=self._heads, kv_num_heads=self._heads)
        return self.norm(op, op.Add(self.dense(op, mixed), x))


class _FeedForward(nn.Module):
    """x [..., width] -> same: two linear layers, the residual, a norm. Queries and text have one each."""

    def __init__(
        self, weights: Weights, suffix: str, settings: QFormerSettings, quantizer: Quantizer
    ) -> None:
        super().__init__()
        width, hidden, self._act = settings.width, settings.hidden, settings.act
        intermediate, output = weights.sub(f"intermediate{suffix}"), weights.sub(f"output{suffix}")
        self.intermediate = Linear(intermediate.sub("dense"), width, hidden, True, quantizer)
        self.dense = Linear(output.sub("dense"), hidden, width, True, quantizer)
        self.norm = LayerNorm(output.sub("LayerNorm"), width, settings.epsilon)

    def forward(self, op: Any, x: ir.Value) -> ir.Value:
        return self.norm(op, op.Add(self.dense(op, self._act(op, self.intermediate(op, x))), x))
