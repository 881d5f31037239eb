"""The inputs and outputs every cached decoder has, whatever its family."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from vlm_edge.export.graphs import Interface
from vlm_edge.export.language.llama import Decoder, DecoderConfig
from vlm_edge.runtime.manifest import DecoderSettings, TensorSpec

MASKS = {"full": "attention_mask", "sliding": "sliding_attention_mask"}


def decoder_interface(config: DecoderConfig) -> Interface:
    """Names, dtypes and shapes of the llm engine (docs/bundle.md)."""
    cache = ("batch", config.kv_heads, "capacity", config.head_dim)
    inputs = [
        TensorSpec("inputs_embeds", "float32", ("batch", "sequence", config.width)),
        TensorSpec("positions", "int64", ("batch", "sequence")),
        TensorSpec("write_indices", "int64", ("batch",)),
        TensorSpec("logit_positions", "int64", ("asked",)),
    ]
    for kind in _masks(config):
        inputs.append(TensorSpec(MASKS[kind], "float32", ("batch", 1, "sequence", "capacity")))
    for index in range(config.layers):
        inputs += [TensorSpec(f"past.{kv}.{index}", "float32", cache) for kv in ("key", "value")]
    outputs = [TensorSpec("logits", "float32", ("batch", "asked", config.vocab_size))]
    for index in range(config.layers):
        outputs += [
            TensorSpec(f"present.{kv}.{index}", "float32", cache) for kv in ("key", "value")
        ]
    return Interface(tuple(inputs), tuple(outputs))


def run_decoder(
    decoder: Decoder, op: Any, inputs: dict[str, ir.Value], config: DecoderConfig
) -> list[ir.Value]:
    """The decoder's forward from named inputs to outputs in the interface's order."""
    layers = range(config.layers)
    logits, keys, values = decoder(
        op,
        inputs["inputs_embeds"],
        inputs["positions"],
        inputs["write_indices"],
        {kind: inputs[MASKS[kind]] for kind in _masks(config)},
        inputs["logit_positions"],
        [inputs[f"past.key.{i}"] for i in layers],
        [inputs[f"past.value.{i}"] for i in layers],
    )
    return [logits, *(value for pair in zip(keys, values, strict=True) for value in pair)]


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
    )


def _masks(config: DecoderConfig) -> list[str]:
    kinds = {"sliding" if sliding else "full" for sliding in config.sliding}
    return [kind for kind in MASKS if kind in kinds]
