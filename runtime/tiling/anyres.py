"""LLaVA-NeXT's tiling (Liu et al. 2024, "LLaVA-NeXT: Improved reasoning, OCR, and world knowledge").

The picture is scaled, its shape kept, into whichever of some resolutions shows most of it, and centred
there on black; an overview of the whole picture comes before the tiles. The tiles' tokens are put
together as one sheet, its padding is cut off again, and each row ends with the `image_newline` vector.

Every rounding below is transformers': `select_best_resolution`, `get_patch_output_size` and
`unpad_image`, which rounds in tokens what the others round in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from vlm_edge.runtime.tiling.plan import UNLIMITED, Sheet, TileLimits, TilePlan
from vlm_edge.runtime.tiling.settings import AnyRes, Size


@dataclass(frozen=True)
class AnyResTiler:
    """`plan.Tiler` of LLaVA-NeXT.

    Attributes:
        tile: height and width of a tile, pixels.
        newline: float32 [width], or None where only sizes are asked for.
    """

    settings: AnyRes
    tile: Size
    newline: np.ndarray | None = None

    def plan(self, width: int, height: int, limits: TileLimits = UNLIMITED) -> TilePlan:
        plans = {size: self._plan(width, height, size) for size in self.settings.resolutions}
        own = plans[best_resolution(width, height, plans)]
        # A bound on tokens must not add tiles: most of a larger sheet could be padding.
        allowed = [s for s, plan in plans.items() if plan.tiles <= own.tiles and limits.allow(plan)]
        if allowed:
            return plans[best_resolution(width, height, allowed)]
        return limits.first([self._overview(width, height)])

    def places(self, plan: TilePlan, image_token: str) -> str:
        return image_token * plan.tokens

    def assemble(self, plan: TilePlan, features: np.ndarray) -> np.ndarray:
        if self.newline is None:
            raise ValueError("this tiler was made without the newline vector")
        overview, tiles = features[0], features[1:]
        if plan.kept is None:
            return np.concatenate([overview, self.newline[None]])
        rows, columns = plan.grid
        down, across = self.settings.grid
        top, left, high, wide = plan.kept
        width = features.shape[-1]
        # [rows, columns, down, across, width] -> [rows, down, columns, across, width]
        sheet = tiles.reshape(rows, columns, down, across, width).transpose(0, 2, 1, 3, 4)
        sheet = sheet.reshape(rows * down, columns * across, width)
        tokens = np.empty((plan.tokens, width), np.float32)
        tokens[: len(overview)] = overview
        detail = tokens[len(overview) :].reshape(high, wide + 1, width)
        detail[:, :wide] = sheet[top : top + high, left : left + wide]
        detail[:, wide] = self.newline
        return tokens

    def grids(self) -> tuple[str, ...]:
        names = (self._grid(size) for size in self.settings.resolutions)
        return tuple(dict.fromkeys(f"{rows}x{columns}" for rows, columns in names))

    def _grid(self, resolution: Size) -> Size:
        return resolution[0] // self.tile[0], resolution[1] // self.tile[1]

    def _overview(self, width: int, height: int) -> TilePlan:
        """The overview alone, as the model takes a picture of one tile."""
        terms = (("overview", self.settings.tile_tokens), ("newline", 1))
        return TilePlan(width, height, (self._overview_sheet(),), (0, 0), terms)

    def _overview_sheet(self) -> Sheet:
        overview = self.settings.overview
        return Sheet((overview,), overview, (0, 0), (1, 1), overview, self.settings.resample, True)

    def _plan(self, width: int, height: int, resolution: Size) -> TilePlan:
        rows, columns = grid = self._grid(resolution)
        scaled = fitted(width, height, resolution)
        offset = (resolution[0] - scaled[0]) // 2, (resolution[1] - scaled[1]) // 2
        down, across = self.settings.grid
        kept = unpadded(width, height, (rows * down, columns * across))
        _, _, high, wide = kept
        terms = (
            ("overview", self.settings.tile_tokens),
            ("tiles", high * wide),
            ("newlines", high),
        )
        detail = Sheet((scaled,), resolution, offset, grid, self.tile, self.settings.resample, True)
        return TilePlan(width, height, (self._overview_sheet(), detail), grid, terms, kept)


def best_resolution(width: int, height: int, resolutions: Iterable[Size]) -> Size:
    """Of some resolutions (height, width), the one that keeps most of the picture's pixels and, among
    equals, wastes fewest of its own; the first of those."""

    def cost(resolution: Size) -> tuple[int, int]:
        high, wide = resolution
        scale = min(wide / width, high / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return -kept, high * wide - kept

    return min(resolutions, key=cost)


def fitted(width: int, height: int, resolution: Size) -> Size:
    """Height and width of the picture scaled into the resolution, its shape kept."""
    high, wide = resolution
    across, down = wide / width, high / height
    if across < down:
        return min(math.ceil(height * across), high), wide
    return high, min(math.ceil(width * down), wide)


def unpadded(width: int, height: int, tokens: Size) -> tuple[int, int, int, int]:
    """Top, left, rows and columns of the tokens that show the picture, of those of the whole sheet."""
    high, wide = tokens
    if width / height > wide / high:
        rows = int(round(height * (wide / width), 7))
        padding = (high - rows) // 2
        return padding, 0, high - 2 * padding, wide
    columns = int(round(width * (high / height), 7))
    padding = (wide - columns) // 2
    return 0, padding, high, wide - 2 * padding
