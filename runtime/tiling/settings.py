"""How a picture becomes tiles and visual tokens, as the manifest says it: one dataclass for each kind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Size = tuple[int, int]  # height, width; or rows, columns
Merge = Literal["crop", "average", "keep"]


@dataclass(frozen=True)
class SingleTile:
    """One tile whatever the picture's shape (LLaVA-1.5)."""

    kind: Literal["single"]
    tokens: int  # of a tile

    @property
    def tile_tokens(self) -> int:
        """Visual tokens that the connector makes of one tile."""
        return self.tokens


@dataclass(frozen=True)
class AnyRes:
    """LLaVA-NeXT: an overview, then the tiles of the best of some resolutions, without their padding.

    Source: `image_grid_pinpoints`; transformers' LlavaNextImageProcessor and `pack_image_features`.
    """

    kind: Literal["anyres"]
    grid: Size  # tokens of a tile, down and across
    resolutions: tuple[Size, ...]  # pixels; in the order they are tried
    overview: Size  # pixels that the whole picture is scaled to
    resample: str
    newline: str  # file of the vector that ends each row of tokens

    @property
    def tile_tokens(self) -> int:
        """Visual tokens that the connector makes of one tile."""
        return self.grid[0] * self.grid[1]


@dataclass(frozen=True)
class Overlap:
    """An overview, then a grid of tiles that overlap, for any model whose tokens form a grid.

    Attributes:
        grid: tokens of a tile, down and across.
        tiles: rows and columns of the grid of tiles.
        overlap: tokens that neighbours share, down and across.
        merge: what becomes of a token that several tiles have (`tiling.overlap`).
        resample: Pillow's filter.
    """

    kind: Literal["overlap"]
    grid: Size
    tiles: Size
    overlap: Size
    merge: Merge
    resample: str

    @property
    def tile_tokens(self) -> int:
        """Visual tokens that the connector makes of one tile."""
        return self.grid[0] * self.grid[1]


@dataclass(frozen=True)
class Split:
    """Idefics3, SmolVLM: rows of tiles, each announced by its place, then an overview.

    Source: `size`, `max_image_size`, `do_image_splitting`, `image_seq_len`; transformers'
    Idefics3ImageProcessor and Idefics3Processor.
    """

    kind: Literal["split"]
    tokens: int  # of a tile
    longest_edge: int | None  # pixels that the picture is first scaled to; null: its own size
    split: bool  # false: the overview alone
    resample: str
    fake_token: str  # stands before each tile and after the last
    global_token: str  # announces the overview

    @property
    def tile_tokens(self) -> int:
        """Visual tokens that the connector makes of one tile."""
        return self.tokens


Tiling = SingleTile | AnyRes | Overlap | Split
