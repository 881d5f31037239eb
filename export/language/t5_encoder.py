"""T5's encoder as an engine: an embedded prompt to the keys and values that the decoder attends to."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from onnxscript import nn

from vlm_edge.export.checkpoint import Weights
from vlm_edge.export.graphs import Interface, build
from vlm_edge.export.language.t5 import BIAS, FeedForward, SelfAttention, T5Config, norm, split
from vlm_edge.export.layers.linear import Linear
from vlm_edge.export.model import Layers, Part
from vlm_edge.export.quantizers import Quantizer
from vlm_edge.runtime.manifest import TensorSpec


class Encoder(nn.Module):
    """An embedded prompt to the keys and values that every decoder layer attends to.

    forward(op, embeds): float32 [batch, source, width]. Returns of each decoder layer the keys and the
    values, float32 [batch, heads, source, head_dim].
    """

    def __init__(self, weights: Weights, config: T5Config, quantizer: Quantizer) -> None:
        super().__init__("llm_encoder")
        self._weights, self._config = weights, config
        layers = weights.sub("encoder.block")
        self.layers = nn.ModuleList(
            [EncoderLayer(layers.sub(i), config, quantizer) for i in range(config.encoder_layers)]
        )
        self.head = Head(weights, config, quantizer)

    def forward(self, op: Any, embeds: ir.Value) -> list[ir.Value]:
        x, distances = embeds, bias(op, self._weights, self._config, embeds)
        for index, layer in enumerate(self.layers):
            x = layer(op, x, distances)
            x.name = f"llm_encoder.layers.{index}.output"
        found: list[ir.Value] = self.head(op, x)
        return found


class EncoderLayer(nn.Module):
    """forward(op, x, bias): x float32 [batch, source, width] to the next; bias as the function gives it."""

    def __init__(self, weights: Weights, config: T5Config, quantizer: Quantizer) -> None:
        super().__init__()
        self.attention_norm = norm(weights.sub("layer.0.layer_norm"), config)
        self.attention = SelfAttention(weights.sub("layer.0.SelfAttention"), config, quantizer)
        self.feed_forward = FeedForward(weights.sub("layer.1"), config, quantizer)

    def forward(self, op: Any, x: ir.Value, bias: ir.Value) -> ir.Value:
        mixed, _ = self.attention(op, self.attention_norm(op, x), bias)
        return self.feed_forward(op, op.Add(x, mixed))


class Head(nn.Module):
    """The last layer's output float32 [batch, source, width] to every decoder layer's keys and values."""

    def __init__(self, weights: Weights, config: T5Config, quantizer: Quantizer) -> None:
        super().__init__()
        self.norm = norm(weights.sub("encoder.final_layer_norm"), config)
        layers = weights.sub("decoder.block")
        self.cross = nn.ModuleList(
            [
                _KeyValue(layers.sub(f"{i}.layer.1.EncDecAttention"), config, quantizer)
                for i in range(config.decoder_layers)
            ]
        )

    def forward(self, op: Any, x: ir.Value) -> list[ir.Value]:
        x = self.norm(op, x)
        return [value for layer in self.cross for value in layer(op, x)]


class _KeyValue(nn.Module):
    """x float32 [batch, source, width] to keys and values [batch, heads, source, head_dim]."""

    def __init__(self, weights: Weights, config: T5Config, quantizer: Quantizer) -> None:
        super().__init__()
        self._config, inner = config, config.heads * config.head_dim
        self.k = Linear(weights.sub("k"), config.width, inner, False, quantizer)
        self.v = Linear(weights.sub("v"), config.width, inner, False, quantizer)

    def forward(self, op: Any, x: ir.Value) -> list[ir.Value]:
        return [split(op, linear(op, x), self._config) for linear in (self.k, self.v)]


def bias(op: Any, weights: Weights, config: T5Config, embeds: ir.Value) -> ir.Value:
    """What distances add to the scores of all layers, float32 [1, heads, source, source]."""
    positions = op.Range(0, op.Squeeze(op.Shape(embeds, start=1, end=2)), 1)  # [source]
    learned, queries = weights.sub(f"encoder.{BIAS}"), op.Unsqueeze(positions, [0])
    return config.positions.bias(op, learned, config.heads, queries, positions, True)


def encoder_interface(config: T5Config) -> Interface:
    """Names, dtypes and shapes of the llm_encoder engine (docs/bundle.md)."""
    embeds = TensorSpec("inputs_embeds", "float32", ("batch", "source", config.width))
    return Interface((embeds,), config.settings().cross())


def encoder_part(weights: Weights, config: T5Config) -> Part:
    """The llm_encoder engine; `weights` of the whole T5."""
    interface = encoder_interface(config)
    states = TensorSpec("output", "float32", ("batch", "source", config.width))

    def build_encoder(quantizer: Quantizer) -> ir.Model:
        module = Encoder(weights, config, quantizer)
        return build("llm_encoder", interface, lambda op, x: module(op, x["inputs_embeds"]))

    def build_layer(index: int, quantizer: Quantizer) -> ir.Model:
        module = EncoderLayer(weights.sub("encoder.block").sub(index), config, quantizer)
        module._set_name("layer")

        def forward(op: Any, x: dict[str, ir.Value]) -> list[ir.Value]:
            return [module(op, x["inputs_embeds"], bias(op, weights, config, x["inputs_embeds"]))]

        return build("layer", Interface(interface.inputs, (states,)), forward)

    def build_head(quantizer: Quantizer) -> ir.Model:
        module = Head(weights, config, quantizer)
        module._set_name("head")
        return build("head", interface, lambda op, x: module(op, x["inputs_embeds"]))

    return Part(
        interface,
        build_encoder,
        weight_only=True,
        layers=Layers(config.encoder_layers, build_layer, build_head),
    )
