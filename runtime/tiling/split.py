"""The tiling of Idefics3 (Laurençon et al. 2024, arXiv 2408.12637) and SmolVLM (Marafioti et al. 2025,
arXiv 2504.05299).

The picture's long edge is scaled to a fixed length, then both edges to whole tiles; the tiles come row by
row, each announced in the prompt by its place, then an overview: the scaled picture as one tile.

Every rounding below is transformers' (Idefics3ImageProcessor).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from vlm_edge.errors import ImageTooLarge
from vlm_edge.runtime.images import ImageLimits
from vlm_edge.runtime.tiling.plan import UNLIMITED, Sheet, TileLimits, TilePlan
from vlm_edge.runtime.tiling.settings import Size, Split

LONGEST = 4096  # pixels of an edge at most, whatever the settings say (MAX_IMAGE_SIZE)


@dataclass(frozen=True)
class SplitTiler:
    """`plan.Tiler` of Idefics3 and SmolVLM.

    Attributes:
        tile: side of a tile, pixels.
    """

    settings: Split
    tile: int

    def plan(self, width: int, height: int, limits: TileLimits = UNLIMITED) -> TilePlan:
        return limits.first(self._plans(width, height))

    def places(self, plan: TilePlan, image_token: str) -> str:
        fake, tokens = self.settings.fake_token, image_token * self.settings.tokens
        rows, columns = plan.grid
        text = ""
        for row in range(1, rows + 1):
            for column in range(1, columns + 1):
                text += f"{fake}<row_{row}_col_{column}>{tokens}"
            text += "\n"
        overview = f"{fake}{self.settings.global_token}{tokens}{fake}"
        return f"{text}\n{overview}" if text else overview

    def assemble(self, plan: TilePlan, features: np.ndarray) -> np.ndarray:
        return features.reshape(-1, features.shape[-1])

    def grids(self) -> tuple[str, ...]:
        if not self.settings.split:
            return ("1",)
        if self.settings.longest_edge is None:
            return ()  # as many as there are sizes of pictures
        edge = self.settings.longest_edge
        most = math.ceil(min(edge, LONGEST) / self.tile)
        names = [f"{rows}x{most}" for rows in range(1, most + 1)] if most > 1 else ["1"]
        names += [f"{most}x{columns}" for columns in range(1, most)]
        # Beside an odd edge the other one, made even, may be the longer by a pixel.
        even = math.ceil(min(edge + edge % 2, LONGEST) / self.tile)
        return tuple(names) if even == most else (*names, f"{even}x{even}")

    def _plans(self, width: int, height: int) -> Iterator[TilePlan]:
        """From the model's own tiling down: a tile less along the long edge at a time."""
        edge = self.settings.longest_edge
        yield self._plan(width, height, edge)
        if self.settings.split:
            most = max(width, height) if edge is None else edge
            for tiles in range(most // self.tile, 0, -1):
                edge = tiles * self.tile
                # Beside an odd edge the other one, made even, could need another row of tiles.
                yield self._plan(width, height, edge - edge % 2)

    def _plan(self, width: int, height: int, edge: int | None) -> TilePlan:
        scaled = [] if edge is None else [_longest(width, height, edge)]
        side = (self.tile, self.tile)
        if not self.settings.split:
            scaled.append(side)
            return self._one(width, height, scaled)
        scaled.append(self._whole_tiles(*(scaled[0] if scaled else (height, width))))
        high, wide = scaled[-1]
        if high * wide > ImageLimits().pixels:  # without a longest edge a strip could be any size
            found = f"{wide}x{high} pixels once scaled to whole tiles"
            raise ImageTooLarge(f"of {width}x{height}", found, f"{ImageLimits().pixels} pixels")
        if scaled[-1] == side:
            return self._one(width, height, scaled)
        grid = high // self.tile, wide // self.tile
        resample = self.settings.resample
        detail = Sheet(tuple(scaled), scaled[-1], (0, 0), grid, side, resample)
        overview = Sheet((*scaled, side), side, (0, 0), (1, 1), side, resample)
        terms = (
            ("tiles", grid[0] * grid[1] * self.settings.tokens),
            ("overview", self.settings.tokens),
        )
        return TilePlan(width, height, (detail, overview), grid, terms)

    def _one(self, width: int, height: int, scaled: list[Size]) -> TilePlan:
        side = (self.tile, self.tile)
        sheet = Sheet(tuple(scaled), side, (0, 0), (1, 1), side, self.settings.resample)
        terms = (("overview", self.settings.tokens),)
        return TilePlan(width, height, (sheet,), (0, 0), terms)

    def _whole_tiles(self, height: int, width: int) -> Size:
        aspect = width / height
        if width >= height:
            width = self._up(width)
            height = self._up(int(width / aspect))
        else:
            height = self._up(height)
            width = self._up(int(height * aspect))
        return height, width

    def _up(self, length: int) -> int:
        return math.ceil(length / self.tile) * self.tile


def _longest(width: int, height: int, edge: int) -> Size:
    """Height and width with the long edge scaled to `edge`, the other one made even, neither beyond
    LONGEST."""
    aspect = width / height
    if width >= height:
        width, height = edge, int(edge / aspect)
        height += height % 2
    else:
        width, height = int(edge * aspect), edge
        width += width % 2
    width, height = max(width, 1), max(height, 1)
    aspect = width / height
    if width >= height and width > LONGEST:
        width, height = LONGEST, int(LONGEST / aspect)
    elif height > width and height > LONGEST:
        width, height = int(LONGEST * aspect), LONGEST
    return max(height, 1), max(width, 1)
