"""What an architecture file gives the pipeline: the parts of one checkpoint, ready to be written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import onnx_ir as ir

from vlm_edge.export.checkpoint import TensorRef
from vlm_edge.export.graphs import Interface
from vlm_edge.export.quantizers import Quantizer
from vlm_edge.runtime.manifest import DecoderSettings, ImageSettings, PromptSettings
from vlm_edge.runtime.tiling import Tiler, Tiling, tiler
from vlm_edge.runtime.tiling.settings import Size


@dataclass(frozen=True)
class Layers:
    """A language part's layers as graphs of their own, for what needs one at a time
    (`export/layerwise.py`).

    Attributes:
        count: how many there are.
        build: layer `index` with a given quantizer. Its inputs are those of the whole graph with the
            layer's own in the place of `inputs_embeds` and the caches of layer 0, in float32; `output` is
            the next layer's input. Linear layers have the same paths as in the whole graph.
        build_head: what follows the last layer: `inputs_embeds`, and of a decoder `logit_positions`, to
            the part's outputs. Its linear layers are calibrated as well, unless the part's `keep8` has
            them.
    """

    count: int
    build: Callable[[int, Quantizer], ir.Model]
    build_head: Callable[[Quantizer], ir.Model]


@dataclass(frozen=True)
class Part:
    """One engine.

    Attributes:
        interface: its inputs and outputs.
        build: the portable graph, its linear layers stored as the quantizer wants.
        weight_only: INT8 means weight-only here (language models); else static W8A8.
        keep8: linear layers that stay at 8 bits under INT4.
        layers: the layers one by one; every part that is weight-only has them.
    """

    interface: Interface
    build: Callable[[Quantizer], ir.Model]
    weight_only: bool = False
    keep8: frozenset[str] = frozenset()
    layers: Layers | None = None


@dataclass(frozen=True)
class Model:
    """A checkpoint as its architecture file reads it; everything is checked, nothing is written."""

    architecture: str
    parts: dict[str, Part]
    embeddings: TensorRef  # [vocab, width]
    image: ImageSettings
    tiling: Tiling
    prompt: PromptSettings
    decoder: DecoderSettings
    newline: TensorRef | None = None  # [width]: LLaVA-NeXT's image_newline
    grid: Size | None = None  # tokens of a tile, down and across; None where they form none

    def tiler(self) -> Tiler:
        """What the bundle's own `Bundle.tiler` will be."""
        newline = None if self.newline is None else self.newline.numpy()
        return tiler(self.tiling, (self.image.height, self.image.width), newline)
