"""The inputs and outputs every cached decoder has, whatever its family."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import onnx_ir as ir

from vlm_edge.export.checkpoint import Weights
from vlm_edge.export.graphs import Interface, build
from vlm_edge.export.language.llama import Decoder, DecoderConfig, Layer
from vlm_edge.export.model import Layers, Part
from vlm_edge.export.quantizers import Quantizer
from vlm_edge.runtime.manifest import DecoderSettings, TensorSpec

MASKS = {"full": "attention_mask", "sliding": "sliding_attention_mask"}


def decoder_interface(config: DecoderConfig) -> Interface:
    """Names, dtypes and shapes of the llm engine (docs/bundle.md)."""
    cache = decoder_settings(config).cache()
    inputs = [
        TensorSpec("inputs_embeds", "float32", ("batch", "sequence", config.width)),
        TensorSpec("positions", "int64", ("batch", "sequence")),
        TensorSpec("write_indices", "int64", ("batch",)),
        TensorSpec("logit_positions", "int64", ("asked",)),
    ]
    for kind in _masks(config):
        inputs.append(TensorSpec(MASKS[kind], "float32", ("batch", 1, "sequence", "capacity")))
    inputs += [replace(spec, name=f"past.{spec.name}") for spec in cache]
    outputs = [TensorSpec("logits", "float32", ("batch", "asked", config.vocab_size))]
    outputs += [replace(spec, name=f"present.{spec.name}") for spec in cache]
    return Interface(tuple(inputs), tuple(outputs))


def decoder_part(weights: Weights, head: Weights, config: DecoderConfig) -> Part:
    """The llm engine; `weights` and `head` as `Decoder` takes them."""
    interface = decoder_interface(config)

    def build_llm(quantizer: Quantizer) -> ir.Model:
        module = Decoder(weights, head, config, quantizer)
        return build("llm", interface, lambda op, x: run_decoder(module, op, x, config))

    return Part(
        interface,
        build_llm,
        weight_only=True,
        keep8=frozenset({head.path}),
        layers=decoder_layers(weights, head, config),
    )


def run_decoder(
    decoder: Decoder, op: Any, inputs: dict[str, ir.Value], config: DecoderConfig
) -> list[ir.Value]:
    """The decoder's forward from named inputs to outputs in the interface's order."""
    logits, caches = decoder(
        op,
        inputs["inputs_embeds"],
        inputs["positions"],
        inputs["write_indices"],
        {kind: inputs[MASKS[kind]] for kind in _masks(config)},
        inputs["logit_positions"],
        [inputs[f"past.{spec.name}"] for spec in decoder_settings(config).cache()],
    )
    return [logits, *caches]


def decoder_layers(weights: Weights, head: Weights, config: DecoderConfig) -> Layers:
    """The decoder's layers one by one; `weights` and `head` as `Decoder` takes them. Their cache is
    float32: what they give is what everything quantized is compared with."""
    config = replace(config, cache_dtype="float32")
    specs = {spec.name: spec for spec in decoder_interface(config).inputs}
    states = TensorSpec("output", "float32", ("batch", "sequence", config.width))
    logits = TensorSpec("logits", "float32", ("batch", "asked", config.vocab_size))

    def interface(names: Sequence[str], output: TensorSpec) -> Interface:
        return Interface(tuple(specs[name] for name in names), (output,))

    def build_layer(index: int, quantizer: Quantizer) -> ir.Model:
        module = Layer(weights.sub("layers").sub(index), config, quantizer)
        module._set_name("layer")
        mask = MASKS["sliding" if config.sliding[index] else "full"]

        def forward(op: Any, x: dict[str, ir.Value]) -> list[ir.Value]:
            rope = config.rope(op, x["positions"])
            past = [x["past.key.0"], x["past.value.0"]]
            return [module(op, x["inputs_embeds"], rope, x["write_indices"], x[mask], past)[0]]

        names = ("inputs_embeds", "positions", "write_indices", mask, "past.key.0", "past.value.0")
        return build("layer", interface(names, states), forward)

    def build_head(quantizer: Quantizer) -> ir.Model:
        module = Decoder(weights, head, replace(config, layers=0), quantizer)

        def forward(op: Any, x: dict[str, ir.Value]) -> list[ir.Value]:
            return [module.logits(op, x["inputs_embeds"], x["logit_positions"])]

        return build("head", interface(("inputs_embeds", "logit_positions"), logits), forward)

    return Layers(config.layers, build_layer, build_head)


def decoder_settings(config: DecoderConfig) -> DecoderSettings:
    return DecoderSettings(
        layers=config.layers,
        kv_heads=config.kv_heads,
        head_dim=config.head_dim,
        width=config.width,
        vocab_size=config.vocab_size,
        max_positions=config.max_positions,
        sliding_window=config.window,
        chunked_prefill=config.rope.dynamic is None,
        cache_dtype=config.cache_dtype,
    )


def _masks(config: DecoderConfig) -> list[str]:
    kinds = {"sliding" if sliding else "full" for sliding in config.sliding}
    return [kind for kind in MASKS if kind in kinds]
