"""Overlapping tiles for a model that sees one tile: `vlm export --tiling 2x2 --overlap 0.25`.

Nothing of the model changes, only what the manifest says of its tiles (`runtime/tiling/overlap.py`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import get_args

from vlm_edge.errors import SettingError
from vlm_edge.export.model import Model
from vlm_edge.runtime.tiling.overlap import OverlapTiler
from vlm_edge.runtime.tiling.settings import Merge, Overlap, SingleTile, Size

OVERLAP = 0.25  # of a tile's side
MOST_OVERLAP = 0.9
MERGE: Merge = "crop"


@dataclass(frozen=True)
class OverlapOrder:
    """What was asked for; checked when made.

    Attributes:
        tiles: rows and columns.
        overlap: of neighbours, as a share of a tile's side.
        merge: what becomes of a token that several tiles have (`runtime.tiling.overlap`).

    Raises:
        SettingError: a grid of one tile or less, an overlap beyond 0..0.9, or another merge.
    """

    tiles: Size
    overlap: float = OVERLAP
    merge: Merge = MERGE

    def __post_init__(self) -> None:
        rows, columns = self.tiles
        if min(rows, columns) < 1 or rows * columns < 2:
            raise SettingError(
                f"tiling {rows}x{columns}; it should have two tiles at least, as 2x2"
            )
        if not 0 <= self.overlap <= MOST_OVERLAP:
            raise SettingError(
                f"overlap = {self.overlap:g}; it should be a share of a tile's side, 0 to {MOST_OVERLAP}"
            )
        if self.merge not in get_args(Merge):
            raise SettingError(f"merge = {self.merge!r}; it should be {', '.join(get_args(Merge))}")

    @classmethod
    def parse(cls, text: str, overlap: float = OVERLAP, merge: Merge = MERGE) -> OverlapOrder:
        """Of rows and columns as "2x3".

        Raises:
            SettingError: it is something else.
        """
        found = re.fullmatch(r"(\d{1,2})x(\d{1,2})", text)
        if not found:
            raise SettingError(f"tiling {text!r}; it should be ROWSxCOLUMNS, such as 2x2 or 3x3")
        return cls((int(found[1]), int(found[2])), overlap, merge)


def with_overlap(model: Model, order: OverlapOrder) -> Model:
    """The model with an overview and a grid of overlapping tiles in the place of its single tile.

    The overlap is rounded to whole tokens, at least one token less than the tile has.

    Raises:
        SettingError: the model tiles already, its tokens form no grid, or what a picture becomes would
            not fit the language model's positions.
    """
    name = f"{order.tiles[0]}x{order.tiles[1]}"
    if not isinstance(model.tiling, SingleTile):
        raise SettingError(
            f"tiling {name}: {model.architecture} has a tiling of its own ({model.tiling.kind}), which it "
            "was trained with; leave --tiling out"
        )
    if model.grid is None:
        raise SettingError(
            f"tiling {name}: the {model.tiling.tokens} tokens of a tile form no grid (they are no patches, "
            "or the class token is among them, or a patch is dropped), so tiles cannot overlap by whole "
            "tokens"
        )
    resize = model.image.resize
    settings = Overlap(
        "overlap",
        model.grid,
        order.tiles,
        (_tokens(model.grid[0], order.overlap), _tokens(model.grid[1], order.overlap)),
        order.merge,
        "bicubic" if resize is None else resize.resample,
    )
    tiler = OverlapTiler(settings, (model.image.height, model.image.width))
    high, wide = tiler.canvas(order.tiles)
    most = tiler.plan(wide, high)  # a picture of the canvas' shape has no padding
    positions = model.decoder.max_positions
    if positions is not None and most.tokens >= positions:
        raise SettingError(
            f"tiling {name}: a picture would take {most.equation} tokens, the language model has "
            f"{positions} positions; take fewer tiles or "
            + ("--merge crop" if order.merge == "keep" else "more overlap")
        )
    return replace(model, tiling=settings)


def sentence(settings: Overlap) -> str:
    """What an `OverlapOrder` became, for people."""
    (rows, columns), overlap, grid = settings.tiles, settings.overlap, settings.grid
    return (
        f"{rows}x{columns} tiles whose neighbours share {overlap[0]} of {grid[0]} rows and {overlap[1]} "
        f"of {grid[1]} columns of tokens, merge: {settings.merge}"
    )


def _tokens(side: int, overlap: float) -> int:
    return min(round(side * overlap), side - 1)
