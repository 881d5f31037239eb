"""How a picture becomes tiles and visual tokens, as the manifest says it: one dataclass for each kind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vlm_edge.runtime.schema import SchemaError

Size = tuple[int, int]  # height, width; or rows, columns
Merge = Literal["crop", "average", "keep"]
# Pillow's filters.
Resample = Literal["nearest", "lanczos", "bilinear", "bicubic", "box", "hamming"]


def _check(good: bool, what: str) -> None:
    """Raises SchemaError for settings that no export writes."""
    if not good:
        raise SchemaError(f"tiling: {what}")


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
    resample: Resample
    newline: str  # file of the vector that ends each row of tokens

    def __post_init__(self) -> None:
        _check(bool(self.resolutions), "resolutions is empty")
        sizes = (self.grid, self.overview, *self.resolutions)
        _check(min(min(size) for size in sizes) > 0, "a size below 1")

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
    resample: Resample

    def __post_init__(self) -> None:
        _check(min(*self.grid, *self.tiles) > 0, "a size below 1")
        pairs = zip(self.overlap, self.grid, strict=True)
        _check(all(0 <= shared < side for shared, side in pairs), "overlap is not within a tile")

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
    resample: Resample
    fake_token: str  # stands before each tile and after the last
    global_token: str  # announces the overview

    def __post_init__(self) -> None:
        _check(self.longest_edge is None or self.longest_edge > 0, "longest_edge is below 1")

    @property
    def tile_tokens(self) -> int:
        """Visual tokens that the connector makes of one tile."""
        return self.tokens


@dataclass(frozen=True)
class Mllama:
    """Llama 3.2 Vision: an arrangement of tiles that the encoder sees at once.

    Source: `size`, `max_image_tiles`; transformers' MllamaImageProcessor.
    """

    kind: Literal["mllama"]
    tokens: int  # of a tile
    max_tiles: int
    resample: Resample

    def __post_init__(self) -> None:
        _check(self.max_tiles > 0, "max_tiles is below 1")

    @property
    def tile_tokens(self) -> int:
        """Visual tokens that the connector makes of one tile."""
        return self.tokens


Tiling = SingleTile | AnyRes | Overlap | Split | Mllama
