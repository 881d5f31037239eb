"""Cached decoders: what a family says of itself, and the engine, layers and settings made of that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, Protocol

import onnx_ir as ir
from onnxscript import nn

from vlm_edge.export.checkpoint import Weights
from vlm_edge.export.graphs import Interface, build
from vlm_edge.export.model import Layers, Part
from vlm_edge.export.quantizers import Observer, Quantizer
from vlm_edge.runtime.manifest import DecoderSettings, MediaSettings, TensorSpec

Mask = Literal["full", "sliding"]
MASKS: dict[Mask, str] = {"full": "attention_mask", "sliding": "sliding_attention_mask"}


class DecoderFamily(Protocol):
    """text_config of a language model: its decoder's sizes, and the modules of its graph."""

    @property
    def tied(self) -> bool:
        """Is the output head the token table?"""

    @property
    def state_width(self) -> int:
        """Width of what goes from layer to layer; that of inputs_embeds may be another."""

    def settings(self) -> DecoderSettings:
        """What the manifest says of it."""

    def masks(self) -> Sequence[Mask]:
        """What each layer's queries see."""

    def context(self, op: Any, weights: Weights, inputs: Mapping[str, ir.Value]) -> Any:
        """What layers need of the graph's inputs (`positions` int64 [batch, s], ...), made once for all.

        Args:
            weights: of the whole decoder.
            inputs: by name; a graph of one layer has no other layer's cache.
        """

    def layer(self, weights: Weights, index: int, quantizer: Quantizer) -> nn.Module:
        """forward(op, x, context, write_indices, mask, cache) -> the next x and the cache.

        x float32 [batch, s, state_width], of the first layer inputs_embeds [batch, s, width];
        write_indices int64 [batch]; mask float32 [batch, 1, s, capacity], added to the scores; cache: the
        arrays of this layer (`export/layers/cache.py`).

        Args:
            weights: of the whole decoder.
        """

    def head(self, weights: Weights, head: Weights, quantizer: Quantizer) -> nn.Module:
        """forward(op, x [batch, n, state_width]) -> logits [batch, n, vocab]; what follows the last layer.

        Args:
            weights: of the whole decoder.
            head: of the output projection.
        """


class Decoder(nn.Module):
    """Embeddings to logits, with the cache updated in place.

    forward(op, inputs by name) -> outputs in the order of `decoder_interface`.
    """

    def __init__(
        self, weights: Weights, head: Weights, config: DecoderFamily, quantizer: Quantizer
    ) -> None:
        super().__init__("llm")
        self._weights, self._config = weights, config
        count = config.settings().layers
        self.layers = nn.ModuleList([config.layer(weights, i, quantizer) for i in range(count)])
        # Of a family whose reference counts other layers among these (Llama 3.2 Vision).
        self._numbers: Sequence[int] = getattr(config, "numbers", None) or range(count)
        self.head = config.head(weights, head, quantizer)
        self.head._set_name("")  # its tensors keep the checkpoint's names

    def forward(self, op: Any, inputs: dict[str, ir.Value]) -> list[ir.Value]:
        caches = [inputs[f"past.{spec.name}"] for spec in self._config.settings().cache()]
        arrays = len(caches) // len(self.layers)  # of one layer
        context = self._config.context(op, self._weights, inputs)
        x, written = inputs["inputs_embeds"], list[ir.Value]()
        for index, (layer, kind) in enumerate(zip(self.layers, self._config.masks(), strict=True)):
            past = caches[index * arrays : (index + 1) * arrays]
            x, present = layer(op, x, context, inputs["write_indices"], inputs[MASKS[kind]], past)
            x.name = f"llm.layers.{self._numbers[index]}.output"
            written += present
        return [_logits(self.head, op, x, inputs["logit_positions"]), *written]


def _logits(head: nn.Module, op: Any, x: ir.Value, logit_positions: ir.Value) -> ir.Value:
    """The last layer's output [batch, s, width] -> [batch, n, vocab]: only what is asked for"""
    return head(op, op.Gather(x, logit_positions, axis=1))


def decoder_interface(config: DecoderFamily) -> Interface:
    """Names, dtypes and shapes of the llm engine (docs/bundle.md)."""
    return _interface(config, config.settings())


def _interface(config: DecoderFamily, settings: DecoderSettings) -> Interface:
    inputs = [
        TensorSpec("inputs_embeds", "float32", ("batch", "sequence", settings.width)),
        TensorSpec("positions", "int64", ("batch", "sequence")),
        TensorSpec("write_indices", "int64", ("batch",)),
        TensorSpec("logit_positions", "int64", ("asked",)),
    ]
    for kind, name in MASKS.items():
        if kind in config.masks():
            inputs.append(TensorSpec(name, "float32", ("batch", 1, "sequence", "capacity")))
    cache = settings.cache()
    inputs += [replace(spec, name=f"past.{spec.name}") for spec in cache]
    inputs += settings.cross()
    if settings.media is not None:
        inputs += media_inputs(settings.media)
    outputs = [TensorSpec("logits", "float32", ("batch", "asked", settings.vocab_size))]
    outputs += [replace(spec, name=f"present.{spec.name}") for spec in cache]
    return Interface(tuple(inputs), tuple(outputs))


def media_inputs(media: MediaSettings) -> list[TensorSpec]:
    """What a decoder that attends to pictures reads of them: keys and values of all pictures one after
    another, what each position sees of them, and how much of what it finds there it takes."""
    shape = ("batch", media.kv_heads, "media", media.head_dim)
    return [
        *(replace(spec, shape=shape) for spec in media.arrays()),
        TensorSpec("media_mask", "float32", ("batch", 1, "sequence", "media")),
        TensorSpec("media_gate", "float32", ("batch", "sequence", 2)),
    ]


def decoder_part(weights: Weights, head: Weights, config: DecoderFamily) -> Part:
    """The llm engine; `weights` of the whole decoder, `head` of the output projection."""
    interface = decoder_interface(config)

    def build_llm(quantizer: Quantizer) -> ir.Model:
        module = Decoder(weights, head, config, quantizer)
        return build("llm", interface, module)

    behind = Observer(lambda op, x: {})  # the layers, which calibration runs one by one
    config.head(weights, head, behind)
    return Part(
        interface,
        build_llm,
        weight_only=True,
        keep8=frozenset(behind.weights),
        layers=decoder_layers(weights, head, config),
    )


def decoder_layers(weights: Weights, head: Weights, config: DecoderFamily) -> Layers:
    """The decoder's layers one by one; arguments as of `decoder_part`. Their cache is float32: what
    they give is what everything quantized is compared with."""
    settings = replace(config.settings(), cache_dtype="float32")
    whole = _interface(config, settings)
    specs = {spec.name: spec for spec in whole.inputs}
    state = ("batch", "sequence", config.state_width)
    constant = list(settings.cross())  # what a prompt gives every layer
    if settings.media is not None:
        constant += media_inputs(settings.media)

    def interface(first: TensorSpec, names: Sequence[str], output: TensorSpec) -> Interface:
        return Interface((first, *(specs[name] for name in names)), (output,))

    def build_layer(index: int, quantizer: Quantizer) -> ir.Model:
        module = config.layer(weights, index, quantizer)
        module._set_name("layer")
        mask = MASKS[config.masks()[index]]

        def forward(op: Any, x: dict[str, ir.Value]) -> list[ir.Value]:
            context = config.context(op, weights, x)
            past = [x["past.key.0"], x["past.value.0"]]
            return [module(op, x["inputs_embeds"], context, x["write_indices"], x[mask], past)[0]]

        names = ["positions", "write_indices", mask, "past.key.0", "past.value.0"]
        names += [spec.name for spec in constant]
        first = specs["inputs_embeds"]
        if index:
            first = replace(first, shape=state)
        output = TensorSpec("output", "float32", state)
        model = build("layer", interface(first, names, output), forward)
        for value in [each for each in model.graph.inputs if not each.uses()]:
            model.graph.inputs.remove(value)  # what other layers read
        return model

    def build_head(quantizer: Quantizer) -> ir.Model:
        module = config.head(weights, head, quantizer)
        module._set_name("head")

        def forward(op: Any, x: dict[str, ir.Value]) -> list[ir.Value]:
            return [_logits(module, op, x["inputs_embeds"], x["logit_positions"])]

        first = replace(specs["inputs_embeds"], shape=state)
        return build("head", interface(first, ("logit_positions",), whole.outputs[0]), forward)

    return Layers(settings.layers, build_layer, build_head)


def decoder_settings(config: DecoderFamily) -> DecoderSettings:
    """What the manifest says of the language model."""
    return config.settings()
