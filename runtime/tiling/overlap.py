"""An overview and a grid of overlapping tiles (2x2, 3x3, ...) for any model whose tokens form a grid.

The picture is scaled, its shape kept, onto a canvas of overlapping tiles and centred on black; the overview
is what the model sees without tiling. The overlap is a whole number of tokens, so that the tiles' tokens
lie on one common grid, where several tiles have a token for the places they share. `merge` says what
becomes of those:

- crop: a place has one token, of the tile in whose inside it lies deeper (the overlap is halved between
  neighbours). What an encoder makes of a place near a tile's edge has seen little around it: this is what
  the overlap is for.
- average: a place has the mean of its tokens.
- keep: every tile's tokens, one tile after another, as if tiles had nothing to do with each other.

With crop and average, rows and columns of tokens that show padding alone are left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from vlm_edge.runtime.tiling.anyres import fitted
from vlm_edge.runtime.tiling.plan import UNLIMITED, Sheet, TileLimits, TilePlan
from vlm_edge.runtime.tiling.settings import Overlap, Size


@dataclass(frozen=True)
class OverlapTiler:
    """`plan.Tiler` of a model exported with overlapping tiles.

    Attributes:
        tile: height and width of a tile, pixels.
    """

    settings: Overlap
    tile: Size

    def plan(self, width: int, height: int, limits: TileLimits = UNLIMITED) -> TilePlan:
        return limits.first(self._plans(width, height))

    def places(self, plan: TilePlan, image_token: str) -> str:
        return image_token * plan.tokens

    def assemble(self, plan: TilePlan, features: np.ndarray) -> np.ndarray:
        overview, tiles = features[0], features[1:]
        width = features.shape[-1]
        if plan.kept is None:
            return features.reshape(-1, width)
        top, left, rows, columns = plan.kept
        if self.settings.merge == "crop":
            owner = self._owners(plan.grid)[top : top + rows, left : left + columns]
            return np.concatenate([overview, tiles.reshape(-1, width)[owner.ravel()]])
        sheet = self._mean(plan.grid, tiles)[top : top + rows, left : left + columns]
        return np.concatenate([overview, sheet.reshape(-1, width)])

    def grids(self) -> tuple[str, ...]:
        rows, columns = self.settings.tiles
        return (f"{rows}x{columns}",)

    def _plans(self, width: int, height: int) -> Iterator[TilePlan]:
        """The model's own grid, then ever smaller ones, then the overview alone."""
        rows, columns = self.settings.tiles
        while (rows, columns) != (1, 1):
            yield self._plan(width, height, (rows, columns))
            rows, columns = max(1, rows - 1), max(1, columns - 1)
        terms = (("overview", self.settings.tile_tokens),)
        yield TilePlan(width, height, (None,), (0, 0), terms)

    def _plan(self, width: int, height: int, tiles: Size) -> TilePlan:
        patch, canvas, tokens = self._patch, self.canvas(tiles), self._sheet(tiles)
        scaled = fitted(width, height, canvas)
        offset = (canvas[0] - scaled[0]) // 2, (canvas[1] - scaled[1]) // 2
        sheet = Sheet((scaled,), canvas, offset, tiles, self._step, self.settings.resample)
        kept = None
        detail = tiles[0] * tiles[1] * self.settings.tile_tokens
        if self.settings.merge != "keep":
            top, rows = _shown(offset[0], scaled[0], patch[0], tokens[0])
            left, columns = _shown(offset[1], scaled[1], patch[1], tokens[1])
            kept, detail = (top, left, rows, columns), rows * columns
        terms = (("overview", self.settings.tile_tokens), ("tiles", detail))
        return TilePlan(width, height, (None, sheet), tiles, terms, kept)

    def canvas(self, tiles: Size) -> Size:
        """Height and width that `tiles` rows and columns are cut from, pixels. A tile may be larger than
        its tokens' patches (SigLIP has 27 of 14 pixels in 384), and so may the canvas."""
        step = self._step
        return self.tile[0] + (tiles[0] - 1) * step[0], self.tile[1] + (tiles[1] - 1) * step[1]

    @property
    def _patch(self) -> Size:
        """Pixels that a token stands for."""
        return self.tile[0] // self.settings.grid[0], self.tile[1] // self.settings.grid[1]

    @property
    def _step(self) -> Size:
        """Pixels from one tile to the next."""
        return self._stride[0] * self._patch[0], self._stride[1] * self._patch[1]

    @property
    def _stride(self) -> Size:
        grid, overlap = self.settings.grid, self.settings.overlap
        return grid[0] - overlap[0], grid[1] - overlap[1]

    def _sheet(self, tiles: Size) -> Size:
        """Tokens of all tiles on one grid, down and across."""
        grid, stride = self.settings.grid, self._stride
        return grid[0] + (tiles[0] - 1) * stride[0], grid[1] + (tiles[1] - 1) * stride[1]

    def _owners(self, tiles: Size) -> np.ndarray:
        """int64 [rows, columns] of the sheet: which of all tiles' tokens stands at each place."""
        (down, across), overlap, stride = self.settings.grid, self.settings.overlap, self._stride
        rows, columns = self._sheet(tiles)
        row, column = np.arange(rows), np.arange(columns)
        # A tile's share begins half an overlap inside it; the first one's at its edge.
        tile_row = np.clip((row - overlap[0] // 2) // stride[0], 0, tiles[0] - 1)
        tile_column = np.clip((column - overlap[1] // 2) // stride[1], 0, tiles[1] - 1)
        inside_row, inside_column = row - tile_row * stride[0], column - tile_column * stride[1]
        tile = tile_row[:, None] * tiles[1] + tile_column
        return tile * (down * across) + inside_row[:, None] * across + inside_column

    def _mean(self, tiles: Size, features: np.ndarray) -> np.ndarray:
        """float32 [rows, columns, width] of the sheet."""
        (down, across), stride = self.settings.grid, self._stride
        total = np.zeros((*self._sheet(tiles), features.shape[-1]), np.float32)
        count = np.zeros((*total.shape[:2], 1), np.float32)
        for index, tile in enumerate(features):
            top, left = (index // tiles[1]) * stride[0], (index % tiles[1]) * stride[1]
            total[top : top + down, left : left + across] += tile.reshape(down, across, -1)
            count[top : top + down, left : left + across] += 1
        return total / count


def _shown(offset: int, length: int, patch: int, tokens: int) -> Size:
    """First and number of the sheet's tokens that show anything of the picture."""
    first = min(offset // patch, tokens - 1)
    return first, min(-(-(offset + length) // patch), tokens) - first
