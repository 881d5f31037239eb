"""The engines that read pictures, from what makes their modules: vision, connector, media_kv."""

from __future__ import annotations

from collections.abc import Callable

from onnxscript import nn

from vlm_edge.export.graphs import Interface, build
from vlm_edge.export.model import Part
from vlm_edge.export.quantizers import Quantizer
from vlm_edge.runtime.manifest import ImageSettings, MediaSettings, TensorSpec

Make = Callable[[Quantizer], nn.Module]

# The vision engine's second input where it sees all tiles of a picture at once: their arrangement.
ARRANGEMENT = TensorSpec("aspect_ratio_id", "int64", (1,))
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
    return {
        "vision": vision_part(image, features, encoder),
        "connector": connector_part(features, image_features, connector, extra),
    }


def vision_part(image: ImageSettings, features: tuple[int, int], encoder: Make) -> Part:
    """As in `image_parts`; alone where a language model attends to the features as they are."""
    return _part("vision", (_pixels(image),), _tokens("features", features), encoder)


def arranged_vision_part(
    image: ImageSettings, most: int, features: tuple[int, int], encoder: Make
) -> Part:
    """pixel_values and aspect_ratio_id -> features [most, tokens, width]: all tiles of a picture at once, and
    room for as many as an arrangement may have."""
    target = TensorSpec("features", "float32", (most, *features))
    return _part("vision", (_pixels(image), ARRANGEMENT), target, encoder)


def connector_part(
    features: tuple[int, int],
    image_features: tuple[int, int],
    connector: Make,
    extra: tuple[TensorSpec, ...] = (),
) -> Part:
    """As in `image_parts`."""
    sources = (_tokens("features", features), *extra)
    return _part("connector", sources, _tokens("image_features", image_features), connector)


def media_part(width: int, media: MediaSettings, make: Make) -> Part:
    """image_features [tiles, tokens, width] -> keys and values of every layer that attends to pictures.

    Args:
        width: of image_features; without a connector they are the vision engine's features.
        make: the module whose forward gives them in the order of `MediaSettings.arrays`.
    """
    source = TensorSpec("image_features", "float32", ("tiles", "tokens", width))
    interface = Interface((source,), media.arrays())
    return Part(
        interface,
        lambda quantizer: build(
            "media_kv", interface, lambda op, x: make(quantizer)(op, x[source.name])
        ),
    )


def _pixels(image: ImageSettings) -> TensorSpec:
    return TensorSpec("pixel_values", "float32", ("tiles", 3, image.height, image.width))


def _tokens(name: str, size: tuple[int, int]) -> TensorSpec:
    """float32 [tiles, tokens, width]"""
    return TensorSpec(name, "float32", ("tiles", *size))


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
