"""The tiling of Llama 3.2 Vision (Dubey et al. 2024, arXiv 2407.21783, section 7.1).

The picture is scaled, its shape kept, into whichever arrangement of tiles enlarges it least, or, where it
is larger than all of them, shrinks it least; it lies in that canvas' top left corner on black. The encoder
sees all tiles of a picture at once, and knows their arrangement by its number.

Every rounding below is transformers' (MllamaImageProcessor).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from vlm_edge.runtime.tiling.plan import UNLIMITED, Sheet, TileLimits, TilePlan
from vlm_edge.runtime.tiling.settings import Mllama, Size


@dataclass(frozen=True)
class MllamaTiler:
    """`plan.Tiler` of Llama 3.2 Vision.

    Attributes:
        tile: side of a tile, pixels.
    """

    settings: Mllama
    tile: int

    def plan(self, width: int, height: int, limits: TileLimits = UNLIMITED) -> TilePlan:
        most = range(self.settings.max_tiles, 0, -1)
        return limits.first(self._plan(width, height, tiles) for tiles in most)

    def places(self, plan: TilePlan, image_token: str) -> str:
        return image_token

    def assemble(self, plan: TilePlan, features: np.ndarray) -> np.ndarray:
        """Tokens of all tiles that the encoder makes room for, the picture's own first (`plan.tokens`)."""
        return features.reshape(-1, features.shape[-1])

    def grids(self) -> tuple[str, ...]:
        return tuple(f"{rows}x{columns}" for rows, columns in arrangements(self.settings.max_tiles))

    def _plan(self, width: int, height: int, most: int) -> TilePlan:
        grid = min(
            (each for each in arrangements(self.settings.max_tiles) if math.prod(each) <= most),
            key=lambda each: self._cost(width, height, each),
        )
        canvas = grid[0] * self.tile, grid[1] * self.tile
        scaled = self._fitted(width, height, canvas)
        side = (self.tile, self.tile)
        sheet = Sheet((scaled,), canvas, (0, 0), grid, side, self.settings.resample)
        terms = (("tiles", sheet.count * self.settings.tokens),)
        number = arrangements(self.settings.max_tiles).index(grid) + 1
        return TilePlan(width, height, (sheet,), grid, terms, arrangement=number)

    def _cost(self, width: int, height: int, grid: Size) -> tuple[bool, float, int]:
        """Enlarging comes before shrinking, then as little of either as can be, then few tiles."""
        scale = min(grid[0] * self.tile / height, grid[1] * self.tile / width)
        return scale < 1, scale if scale >= 1 else -scale, math.prod(grid)

    def _fitted(self, width: int, height: int, canvas: Size) -> Size:
        """Height and width of the picture scaled into the canvas: no edge is enlarged beyond a tile."""
        high = min(max(height, self.tile), canvas[0])
        wide = min(max(width, self.tile), canvas[1])
        down, across = high / height, wide / width
        if across < down:
            return min(math.floor(height * across) or 1, high), wide
        return high, min(math.floor(width * down) or 1, wide)


def arrangements(most: int) -> list[Size]:
    """Rows and columns of up to `most` tiles; the encoder counts them in this order, from 1."""
    sides = range(1, most + 1)
    return [(rows, columns) for rows in sides for columns in sides if rows * columns <= most]
