"""Tiling: from a picture's size to its tiles, their places in the prompt and its visual tokens."""

from __future__ import annotations

import numpy as np

from vlm_edge.runtime.tiling.anyres import AnyResTiler
from vlm_edge.runtime.tiling.mllama import MllamaTiler
from vlm_edge.runtime.tiling.overlap import OverlapTiler
from vlm_edge.runtime.tiling.plan import Sheet, TileLimits, TilePlan, Tiler
from vlm_edge.runtime.tiling.settings import (
    AnyRes,
    Mllama,
    Overlap,
    SingleTile,
    Size,
    Split,
    Tiling,
)
from vlm_edge.runtime.tiling.single import SingleTiler
from vlm_edge.runtime.tiling.split import SplitTiler

__all__ = [
    "AnyRes", "Mllama", "Overlap", "Sheet", "SingleTile", "Split", "TileLimits", "TilePlan", "Tiler",
    "Tiling", "tiler",
]  # fmt: skip


def tiler(settings: Tiling, tile: Size, newline: np.ndarray | None = None) -> Tiler:
    """The tiler of a model.

    Args:
        settings: the manifest's `tiling`.
        tile: height and width of a tile, pixels.
        newline: LLaVA-NeXT's `image_newline`, float32 [width]; needed to assemble, not to count.
    """
    if isinstance(settings, AnyRes):
        return AnyResTiler(settings, tile, newline)
    if isinstance(settings, Overlap):
        return OverlapTiler(settings, tile)
    if isinstance(settings, Split):
        return SplitTiler(settings, tile[0])
    if isinstance(settings, Mllama):
        return MllamaTiler(settings, tile[0])
    return SingleTiler(settings)
