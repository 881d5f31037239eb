"""What an architecture file gives the pipeline: the parts of one checkpoint, ready to be written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import onnx_ir as ir

from vlm_edge.export.checkpoint import TensorRef
from vlm_edge.export.graphs import Interface
from vlm_edge.export.quantizers import Quantizer
from vlm_edge.runtime.manifest import DecoderSettings, ImageSettings, PromptSettings, Tiling


@dataclass(frozen=True)
class Part:
    """One engine.

    Attributes:
        interface: its inputs and outputs.
        build: the portable graph, its linear layers stored as the quantizer wants.
        weight_only: INT8 means weight-only here (language models); else static W8A8.
        keep8: linear layers that stay at 8 bits under INT4.
    """

    interface: Interface
    build: Callable[[Quantizer], ir.Model]
    weight_only: bool = False
    keep8: frozenset[str] = frozenset()


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
