"""What will be made of one picture, from its size alone: tiles, and visual tokens by term."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from vlm_edge.errors import LimitNotKept, SettingError
from vlm_edge.runtime.tiling.settings import Size


@dataclass(frozen=True)
class Sheet:
    """The whole picture, scaled, centred on a black canvas and cut into tiles row by row.

    Attributes:
        scaled: heights and widths that it is scaled to, one after another.
        canvas: height and width that the tiles are cut from.
        offset: of the picture on the canvas, down and right.
        tiles: rows and columns.
        stride: from one tile to the next, down and right.
        resample: Pillow's filter.
        framed: the processor resizes and crops the tiles once more.
    """

    scaled: tuple[Size, ...]
    canvas: Size
    offset: Size
    tiles: Size
    stride: Size
    resample: str
    framed: bool = False

    @property
    def tile(self) -> Size:
        """Height and width of a tile, pixels."""
        (rows, columns), (down, right) = self.tiles, self.stride
        return self.canvas[0] - (rows - 1) * down, self.canvas[1] - (columns - 1) * right

    @property
    def count(self) -> int:
        """Tiles of the sheet."""
        return self.tiles[0] * self.tiles[1]


@dataclass(frozen=True)
class TilePlan:
    """The tiles and visual tokens of one picture.

    Attributes:
        width, height: of the picture, pixels.
        sheets: what tiles are cut from, in the order of the tiles; None is the picture as the
            checkpoint's processor makes one tile of it.
        grid: rows and columns of the detail tiles; (0, 0) where there is only an overview.
        terms: visual tokens by what they show, in the order of the prompt.
        kept: of the detail tiles' tokens put together, the rows and columns that are not padding:
            top, left, rows, columns.
        arrangement: the number by which the encoder knows the grid, where it sees all tiles of a picture
            at once (Llama 3.2 Vision); None: each by itself.
    """

    width: int
    height: int
    sheets: tuple[Sheet | None, ...]
    grid: Size
    terms: tuple[tuple[str, int], ...]
    kept: tuple[int, int, int, int] | None = None
    arrangement: int | None = None

    @property
    def tokens(self) -> int:
        """Visual tokens in the prompt."""
        return sum(count for _, count in self.terms)

    @property
    def tiles(self) -> int:
        """Tiles that the vision encoder sees, the overview among them."""
        return sum(1 if sheet is None else sheet.count for sheet in self.sheets)

    def vision_inputs(self, pixels: np.ndarray) -> list[dict[str, np.ndarray]]:
        """What the vision engine is run on, run by run.

        Args:
            pixels: float32 [tiles, 3, height, width], of all tiles.
        """
        if self.arrangement is not None:
            return [{"pixel_values": pixels, "aspect_ratio_id": np.array([self.arrangement])}]
        # One at a time: on a CPU five tiles of CLIP-L/14-336 at once take three times the memory in INT8
        # (301 MB against 109) and are no faster (1.35 s both ways; in float 4.9 s against 4.5).
        return [{"pixel_values": tile[None]} for tile in pixels]

    @property
    def name(self) -> str:
        """The grid of detail tiles as "2x3" (rows, columns); "1" is an overview alone."""
        return f"{self.grid[0]}x{self.grid[1]}" if self.grid != (0, 0) else "1"

    @property
    def equation(self) -> str:
        """The terms as "2144 = 576 + 1536 + 32"."""
        return f"{self.tokens} = {' + '.join(str(count) for _, count in self.terms)}"


@dataclass(frozen=True)
class TileLimits:
    """Bounds on each picture, None where there is none.

    Attributes:
        max_tiles: tiles the vision encoder sees, the overview among them.
        max_visual_tokens: places in the prompt.

    Raises:
        SettingError: a bound that is not a positive whole number.
    """

    max_tiles: int | None = None
    max_visual_tokens: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_tiles", "max_visual_tokens"):
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool)
            if value is not None and (not whole or value < 1):
                raise SettingError(f"{name} = {value!r}; it should be a whole number, at least 1")

    def allow(self, plan: TilePlan) -> bool:
        return (self.max_tiles is None or plan.tiles <= self.max_tiles) and (
            self.max_visual_tokens is None or plan.tokens <= self.max_visual_tokens
        )

    def first(self, plans: Iterable[TilePlan]) -> TilePlan:
        """The first plan within the bounds; the last one is the least the model can make.

        Raises:
            LimitNotKept: none is.
        """
        least = None
        for plan in plans:
            if self.allow(plan):
                return plan
            least = plan
        # The least is one tile, so what it exceeds is the bound on tokens.
        assert least is not None and self.max_visual_tokens is not None
        picture = f"{least.width}x{least.height}"
        raise LimitNotKept(picture, "max_visual_tokens", self.max_visual_tokens, least.tokens)


UNLIMITED = TileLimits()


class Tiler(Protocol):
    """One kind of tiling with a model's settings."""

    def plan(self, width: int, height: int, limits: TileLimits = UNLIMITED) -> TilePlan:
        """What a picture of this size (pixels) becomes.

        Raises:
            LimitNotKept: not even its least form is within `limits`.
        """

    def places(self, plan: TilePlan, image_token: str) -> str:
        """What stands in the prompt instead of the picture's placeholder."""

    def assemble(self, plan: TilePlan, features: np.ndarray) -> np.ndarray:
        """Visual tokens float32 [tokens, width], in the order of their places, of the connector's
        [tiles, tile tokens, width]."""

    def grids(self) -> tuple[str, ...]:
        """Every `TilePlan.name` that some picture has where no limit holds."""
