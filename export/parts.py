"""The vision and connector engines of an architecture, from what makes their modules."""

from __future__ import annotations

from collections.abc import Callable

from onnxscript import nn

from vlm_edge.export.graphs import Interface, build
from vlm_edge.export.model import Part
from vlm_edge.export.quantizers import Quantizer
from vlm_edge.runtime.manifest import ImageSettings, TensorSpec

Make = Callable[[Quantizer], nn.Module]

# What a connector that reads the instruction takes beside the features.
INSTRUCTION = TensorSpec("instruction_ids", "int64", ("tiles", "instruction"))


def image_parts(
    image: ImageSettings,
    features: tuple[int, int],
    image_features: tuple[int, int],
    encoder: Make,
    connector: Make,
    extra: tuple[TensorSpec, ...] = (),
) -> dict[str, Part]:
    """pixel_values [tiles, 3, height, width] -> features -> image_features, both [tiles, tokens, width].

    Args:
        features, image_features: tokens and width of each.
        encoder, connector: the module whose forward takes its inputs in order and gives its output.
        extra: inputs of the connector after the features (INSTRUCTION).
    """
    pixels = TensorSpec("pixel_values", "float32", ("tiles", 3, image.height, image.width))
    between = TensorSpec("features", "float32", ("tiles", *features))
    tokens = TensorSpec("image_features", "float32", ("tiles", *image_features))
    return {
        "vision": _part("vision", (pixels,), between, encoder),
        "connector": _part("connector", (between, *extra), tokens, connector),
    }


def _part(name: str, sources: tuple[TensorSpec, ...], target: TensorSpec, make: Make) -> Part:
    interface = Interface(sources, (target,))
    return Part(
        interface,
        lambda quantizer: build(
            name,
            interface,
            lambda op, x: [make(quantizer)(op, *(x[source.name] for source in sources))],
        ),
    )
