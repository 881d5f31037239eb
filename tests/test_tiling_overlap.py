"""Overlapping tiles: their tokens lie on one grid, and each place of it has what a slow count by hand says."""

from __future__ import annotations

from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_edge.runtime.tiling.overlap import OverlapTiler
from vlm_edge.runtime.tiling.plan import Sheet, TileLimits, TilePlan
from vlm_edge.runtime.tiling.settings import Merge, Overlap, Size

WIDTH = 3
MERGES: tuple[Merge, ...] = get_args(Merge)
# grid of a tile, rows and columns of tiles, tokens shared: none, even, odd, more than half of a tile
GRIDS: list[tuple[Size, Size, Size]] = [
    ((4, 4), (2, 2), (0, 0)), ((4, 4), (2, 2), (2, 2)), ((5, 3), (3, 2), (1, 2)),
    ((5, 5), (3, 3), (3, 4)), ((6, 4), (4, 3), (5, 3)), ((3, 7), (1, 3), (2, 3)), ((7, 2), (3, 1), (0, 1)),
]  # fmt: skip
SIZES = [(40, 40), (20, 80), (80, 20), (61, 37), (5, 3), (1, 1), (400, 3), (3, 400)]


def tiler_of(grid: Size, tiles: Size, overlap: Size, merge: Merge = "crop", patch: int = 4) -> OverlapTiler:  # fmt: skip
    of_tile = Overlap("overlap", grid, tiles, overlap, merge, "bicubic")
    return OverlapTiler(of_tile, (grid[0] * patch, grid[1] * patch))


def sheet_size(grid: Size, tiles: Size, overlap: Size) -> Size:
    rows, columns = (g * t - o * (t - 1) for g, t, o in zip(grid, tiles, overlap, strict=True))
    return rows, columns


def covering(place: int, grid: int, tiles: int, overlap: int) -> dict[int, int]:
    """Along one edge: the tiles that have a place, and where it is in each."""
    begins = {tile: tile * (grid - overlap) for tile in range(tiles)}
    return {tile: place - begin for tile, begin in begins.items() if 0 <= place - begin < grid}


def owner(place: int, grid: int, tiles: int, overlap: int) -> tuple[int, int]:
    """The tile in which the place lies deepest, of two equal ones the later, and its place there."""
    inside = covering(place, grid, tiles, overlap)
    deepest = max(inside, key=lambda tile: (min(inside[tile], grid - 1 - inside[tile]), tile))
    return deepest, inside[deepest]


def kept_of(plan: TilePlan) -> tuple[slice, slice]:
    assert plan.kept is not None
    top, left, rows, columns = plan.kept
    return slice(top, top + rows), slice(left, left + columns)


def random(plan: TilePlan, grid: Size) -> np.ndarray:
    shape = (plan.tiles, grid[0] * grid[1], WIDTH)
    return np.random.default_rng(plan.width).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("grid", "tiles", "overlap"), GRIDS)
def test_crop_takes_the_deepest(grid: Size, tiles: Size, overlap: Size, size: Size) -> None:
    tiler = tiler_of(grid, tiles, overlap)
    plan = tiler.plan(*size)
    features = random(plan, grid)
    rows, columns = sheet_size(grid, tiles, overlap)
    sheet = np.empty((rows, columns, WIDTH), np.float32)
    for row in range(rows):
        for column in range(columns):
            tile_row, inside_row = owner(row, grid[0], tiles[0], overlap[0])
            tile_column, inside_column = owner(column, grid[1], tiles[1], overlap[1])
            tile = 1 + tile_row * tiles[1] + tile_column  # after the overview
            sheet[row, column] = features[tile, inside_row * grid[1] + inside_column]
    expected = np.concatenate([features[0], sheet[kept_of(plan)].reshape(-1, WIDTH)])
    found = tiler.assemble(plan, features)
    assert found.dtype == np.float32
    assert len(found) == plan.tokens
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("grid", "tiles", "overlap"), GRIDS)
def test_average_is_the_mean_of_all(grid: Size, tiles: Size, overlap: Size, size: Size) -> None:
    tiler = tiler_of(grid, tiles, overlap, "average")
    plan = tiler.plan(*size)
    features = random(plan, grid)
    rows, columns = sheet_size(grid, tiles, overlap)
    sheet = np.empty((rows, columns, WIDTH), np.float64)
    for row in range(rows):
        for column in range(columns):
            sheet[row, column] = np.mean([
                features[1 + tile_row * tiles[1] + tile_column, i * grid[1] + j].astype(np.float64)
                for tile_row, i in covering(row, grid[0], tiles[0], overlap[0]).items()
                for tile_column, j in covering(column, grid[1], tiles[1], overlap[1]).items()
            ], axis=0)  # fmt: skip
    expected = np.concatenate([features[0], sheet[kept_of(plan)].reshape(-1, WIDTH)])
    found = tiler.assemble(plan, features)
    assert found.dtype == np.float32
    assert len(found) == plan.tokens
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("grid", "tiles", "overlap"), GRIDS)
def test_keep_is_every_tiles_tokens(grid: Size, tiles: Size, overlap: Size) -> None:
    tiler = tiler_of(grid, tiles, overlap, "keep")
    plan = tiler.plan(61, 37)
    features = random(plan, grid)
    assert plan.tokens == (1 + tiles[0] * tiles[1]) * grid[0] * grid[1]
    assert plan.kept is None
    np.testing.assert_array_equal(tiler.assemble(plan, features), features.reshape(-1, WIDTH))


@pytest.mark.parametrize("merge", ["crop", "average"])
@pytest.mark.parametrize(("grid", "tiles", "overlap"), GRIDS)
def test_tokens_lie_on_one_grid(grid: Size, tiles: Size, overlap: Size, merge: Merge) -> None:
    """A feature that says where on the canvas its token is stands there, whichever tile it came from."""
    tiler = tiler_of(grid, tiles, overlap, merge)
    plan = tiler.plan(*tiler.canvas(tiles)[::-1])  # no padding
    sheet = plan.sheets[1]
    assert isinstance(sheet, Sheet)
    patch = tiler.tile[0] // grid[0]
    features = np.zeros((plan.tiles, *grid, 2), np.float32)
    for tile in range(tiles[0] * tiles[1]):
        row, column = divmod(tile, tiles[1])
        down, right = row * sheet.stride[0], column * sheet.stride[1]  # pixels
        features[tile + 1, ..., 0] = (down + patch * np.arange(grid[0]))[:, None]
        features[tile + 1, ..., 1] = right + patch * np.arange(grid[1])
    rows, columns = sheet_size(grid, tiles, overlap)
    assert plan.kept == (0, 0, rows, columns)
    found = tiler.assemble(plan, features.reshape(plan.tiles, -1, 2))[grid[0] * grid[1] :]
    expected = patch * np.stack(np.mgrid[0:rows, 0:columns], axis=-1)
    np.testing.assert_array_equal(found.reshape(rows, columns, 2), expected)


@pytest.mark.parametrize("merge", MERGES)
@pytest.mark.parametrize(("grid", "tiles", "overlap"), GRIDS)
def test_constant_features_stay_constant(
    grid: Size, tiles: Size, overlap: Size, merge: Merge
) -> None:
    tiler = tiler_of(grid, tiles, overlap, merge)
    plan = tiler.plan(50, 70)
    features = np.full((plan.tiles, grid[0] * grid[1], WIDTH), 0.3, np.float32)
    found = tiler.assemble(plan, features)
    np.testing.assert_allclose(found, np.full((plan.tokens, WIDTH), 0.3, np.float32), rtol=1e-6)


@pytest.mark.parametrize(("grid", "tiles"), [((4, 4), (2, 2)), ((5, 3), (3, 2)), ((2, 7), (1, 3))])
def test_without_overlap_all_are_the_plain_sheet(grid: Size, tiles: Size) -> None:
    made: dict[str, Any] = {}
    for merge in MERGES:
        tiler = tiler_of(grid, tiles, (0, 0), merge)
        plan = tiler.plan(*tiler.canvas(tiles)[::-1])
        features = random(plan, grid)
        made[merge] = tiler.assemble(plan, features)
    plain = np.concatenate([
        np.concatenate(
            [features[1 + r * tiles[1] + c].reshape(*grid, WIDTH) for c in range(tiles[1])], axis=1
        )
        for r in range(tiles[0])
    ])  # fmt: skip
    expected = np.concatenate([features[0], plain.reshape(-1, WIDTH)])
    np.testing.assert_array_equal(made["crop"], expected)
    np.testing.assert_array_equal(made["average"], expected)
    assert len(made["keep"]) == len(expected)


SMALL = st.integers(1, 9)


@settings(max_examples=500, deadline=None)
@given(data=st.data(), grid=st.tuples(SMALL, SMALL), tiles=st.tuples(st.integers(1, 5), st.integers(1, 5)))  # fmt: skip
def test_every_place_is_owned_once(data: Any, grid: Size, tiles: Size) -> None:
    """By the tile in which it lies deepest; the owners are neighbours' halves, without a hole."""
    overlap = tuple(data.draw(st.integers(0, side - 1)) for side in grid)
    tiler = tiler_of(grid, tiles, overlap)
    owners = tiler._owners(tiles)
    assert owners.shape == sheet_size(grid, tiles, overlap)
    assert len(np.unique(owners)) == owners.size  # no token stands in two places
    for (row, column), token in np.ndenumerate(owners):
        tile, inside = divmod(int(token), grid[0] * grid[1])
        rows = covering(row, grid[0], tiles[0], overlap[0])
        columns = covering(column, grid[1], tiles[1], overlap[1])
        tile_row, tile_column = divmod(tile, tiles[1])
        assert divmod(inside, grid[1]) == (rows[tile_row], columns[tile_column])  # it is that place

        def depth(place: int, side: int) -> int:
            return min(place, side - 1 - place)

        assert depth(rows[tile_row], grid[0]) == max(depth(p, grid[0]) for p in rows.values())
        assert depth(columns[tile_column], grid[1]) == max(
            depth(p, grid[1]) for p in columns.values()
        )


@settings(max_examples=500, deadline=None)
@given(
    data=st.data(), grid=st.tuples(SMALL, SMALL), tiles=st.tuples(st.integers(1, 4), st.integers(2, 4)),
    rest=st.integers(0, 5), patch=st.integers(6, 9), width=st.integers(1, 900), height=st.integers(1, 900),
)  # fmt: skip
def test_what_is_kept_shows_the_picture(
    data: Any, grid: Size, tiles: Size, rest: int, patch: int, width: int, height: int
) -> None:
    """Painted by hand: tokens with a pixel of the picture are kept, those of padding alone are not.
    Patches may leave a rest of the tile."""
    overlap = tuple(data.draw(st.integers(0, side - 1)) for side in grid)
    of_tile = Overlap("overlap", grid, tiles, overlap, "crop", "bicubic")
    side = (grid[0] * patch + min(rest, grid[0] - 1), grid[1] * patch + min(rest, grid[1] - 1))
    tiler = OverlapTiler(of_tile, side)
    plan = tiler.plan(width, height)
    sheet = plan.sheets[1]
    assert isinstance(sheet, Sheet)
    assert sheet.canvas == tuple(
        s + (t - 1) * p for s, t, p in zip(side, tiles, sheet.stride, strict=True)
    )
    high, wide = sheet.scaled[0]
    top, left = sheet.offset
    canvas = np.zeros(sheet.canvas, bool)
    canvas[top : top + high, left : left + wide] = True
    assert canvas.sum() == high * wide, "the picture is on the canvas"
    rows, columns = sheet_size(grid, tiles, overlap)
    shown = np.array([
        [canvas[r * patch : (r + 1) * patch, c * patch : (c + 1) * patch].any() for c in range(columns)]
        for r in range(rows)
    ])  # fmt: skip
    kept = np.zeros((rows, columns), bool)
    kept[kept_of(plan)] = True
    np.testing.assert_array_equal(kept, shown)
    assert plan.tokens == grid[0] * grid[1] + int(shown.sum())
    assert plan.tiles == 1 + tiles[0] * tiles[1]
    assert plan.name == f"{tiles[0]}x{tiles[1]}"
    assert tiler.grids() == (plan.name,)


@pytest.mark.parametrize(
    ("tiles", "smaller"),
    [((3, 3), ["3x3", "2x2", "1"]), ((2, 4), ["2x4", "1x3", "1x2", "1"]), ((3, 1), ["3x1", "2x1", "1"])],
)  # fmt: skip
@pytest.mark.parametrize("merge", MERGES)
def test_limits_shrink_the_grid(tiles: Size, smaller: list[str], merge: Merge) -> None:
    tiler = tiler_of((4, 4), tiles, (1, 1), merge)
    full = tiler.plan(64, 48)
    names = [tiler.plan(64, 48, TileLimits(max_tiles=n)).name for n in range(full.tiles, 0, -1)]
    assert list(dict.fromkeys(names)) == smaller
    for bound in range(16, full.tokens + 1):
        plan = tiler.plan(64, 48, TileLimits(max_visual_tokens=bound))
        assert plan.tokens <= bound
        assert plan.name in smaller
        assert tiler.assemble(plan, random(plan, (4, 4))).shape == (plan.tokens, WIDTH)
    assert tiler.plan(64, 48, TileLimits(max_tiles=1)).sheets == (None,)
