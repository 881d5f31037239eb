"""max_tiles and max_visual_tokens: fewer tiles by the model's own rule, or one sentence why not."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.image_processing_utils import select_best_resolution

from vlm_edge.errors import ImageError, ImageTooLarge, LimitNotKept, SettingError
from vlm_edge.runtime.settings import Settings
from vlm_edge.runtime.tiling import (
    AnyRes,
    Overlap,
    SingleTile,
    Split,
    TileLimits,
    TilePlan,
    Tiler,
    tiler,
)

RESOLUTIONS = ((30, 60), (60, 30), (60, 60), (90, 30), (30, 90), (60, 90))
TILERS: dict[str, Tiler] = {
    "single": tiler(SingleTile("single", 9), (30, 30)),
    "anyres": tiler(AnyRes("anyres", (3, 3), RESOLUTIONS, (30, 30), "bicubic", "n.npy"), (30, 30)),
    "overlap": tiler(Overlap("overlap", (3, 3), (3, 2), (1, 1), "crop", "bicubic"), (30, 30)),
    "overlap, kept": tiler(Overlap("overlap", (3, 3), (3, 2), (1, 1), "keep", "bicubic"), (30, 30)),
    "split": tiler(Split("split", 9, 120, True, "lanczos", "<f>", "<g>"), (30, 30)),
    "split, its own size": tiler(Split("split", 9, None, True, "lanczos", "<f>", "<g>"), (30, 30)),
    "split, odd": tiler(Split("split", 9, 130, True, "lanczos", "<f>", "<g>"), (37, 37)),
    "not split": tiler(Split("split", 9, 120, False, "lanczos", "<f>", "<g>"), (30, 30)),
}
LEAST = {"anyres": (1, 10)}  # tiles and tokens; of the others (1, 9). 10: the newline
SIDES = st.integers(1, 400)


@pytest.mark.parametrize("kind", TILERS)
@settings(max_examples=400, deadline=None)
@given(
    width=SIDES, height=SIDES,
    max_tiles=st.none() | st.integers(1, 20), max_visual_tokens=st.none() | st.integers(1, 200),
)  # fmt: skip
def test_limits_are_kept_or_refused(
    kind: str, width: int, height: int, max_tiles: int | None, max_visual_tokens: int | None
) -> None:
    cut, limits = TILERS[kind], TileLimits(max_tiles, max_visual_tokens)
    free = cut.plan(width, height)
    least = LEAST.get(kind, (1, 9))
    try:
        plan = cut.plan(width, height, limits)
    except LimitNotKept as error:
        assert max_visual_tokens is not None
        assert max_visual_tokens < least[1]
        said = f"max_visual_tokens = {max_visual_tokens} cannot be kept: this model makes at least"
        assert str(error) == f"{said} {least[1]} of a {width}x{height} picture"
        return
    assert limits.allow(plan)
    assert max_tiles is None or plan.tiles <= max_tiles
    assert max_visual_tokens is None or plan.tokens <= max_visual_tokens
    assert (plan.width, plan.height) == (width, height)
    assert plan.tokens >= 1
    assert plan.tiles <= free.tiles
    if limits.allow(free):
        assert plan == free, "a limit that is kept already changes nothing"


@pytest.mark.parametrize("kind", TILERS)
@pytest.mark.parametrize("size", [(60, 60), (61, 37), (20, 80), (300, 90)])
def test_more_room_is_never_used_for_less(kind: str, size: tuple[int, int]) -> None:
    """Tiles grow with the bound, up to the model's own; each step is reached by one of them."""
    cut = TILERS[kind]
    tiles = [cut.plan(*size, TileLimits(max_tiles=n)).tiles for n in range(1, 40)]
    assert tiles[0] == 1
    assert tiles[-1] == cut.plan(*size).tiles
    assert tiles == sorted(tiles)


def tiles_of(resolution: tuple[int, int]) -> int:
    """Of 30 x 30 pixels, and the overview."""
    return 1 + resolution[0] * resolution[1] // 900


def check_resolution(plan: TilePlan, best: tuple[int, int] | None) -> None:
    """The tiles are cut from `best`; None is an overview alone."""
    if best is None:
        assert plan.name == "1"
        return
    detail = plan.sheets[1]
    assert detail is not None
    assert detail.canvas == best


@settings(max_examples=1000, deadline=None)
@given(width=SIDES, height=SIDES, max_tiles=st.integers(1, 8))
def test_anyres_chooses_by_its_rule_among_what_is_allowed(
    width: int, height: int, max_tiles: int
) -> None:
    """As a checkpoint whose image_grid_pinpoints are the smaller ones alone."""
    own = select_best_resolution((height, width), RESOLUTIONS)
    most = min(max_tiles, tiles_of(own))
    allowed = [resolution for resolution in RESOLUTIONS if tiles_of(resolution) <= most]
    best = select_best_resolution((height, width), allowed) if allowed else None
    plan = TILERS["anyres"].plan(width, height, TileLimits(max_tiles=max_tiles))
    check_resolution(plan, best)
    if best is None:
        return
    fewer: Any = tiler(
        AnyRes("anyres", (3, 3), tuple(allowed), (30, 30), "bicubic", "n.npy"), (30, 30)
    )
    assert plan == fewer.plan(width, height)


@settings(max_examples=1000, deadline=None)
@given(width=SIDES, height=SIDES, bound=st.integers(10, 120))
def test_anyres_within_tokens(width: int, height: int, bound: int) -> None:
    """The rule is asked over those resolutions in which this picture has few enough tokens, and no more
    tiles than in the model's own choice."""
    own = select_best_resolution((height, width), RESOLUTIONS)
    allowed = []
    for resolution in RESOLUTIONS:
        alone = tiler(
            AnyRes("anyres", (3, 3), (resolution,), (30, 30), "bicubic", "n.npy"), (30, 30)
        )
        tokens = alone.plan(width, height).tokens
        if tokens <= bound and tiles_of(resolution) <= tiles_of(own):
            allowed.append(resolution)
    best = select_best_resolution((height, width), allowed) if allowed else None
    plan = TILERS["anyres"].plan(width, height, TileLimits(max_visual_tokens=bound))
    check_resolution(plan, best)


@pytest.mark.parametrize(
    ("size", "grids"),
    [
        ((80, 80), ["4x4", "3x3", "2x2", "1"]),
        ((120, 31), ["2x4", "1x3", "1x2", "1"]),  # 31 pixels, made even, are 32: two tiles
        ((15, 60), ["4x1", "3x1", "2x1", "1"]),
    ],
)
def test_split_scales_the_long_edge_by_a_tile_less(size: tuple[int, int], grids: list[str]) -> None:
    """As a checkpoint with a smaller size.longest_edge."""
    cut = TILERS["split"]
    seen = [cut.plan(*size, TileLimits(max_tiles=n)) for n in range(17, 0, -1)]
    assert list(dict.fromkeys(plan.name for plan in seen)) == grids
    for plan in seen:
        edge = 30 * max(plan.grid) if plan.grid != (0, 0) else 30
        smaller = tiler(Split("split", 9, edge, True, "lanczos", "<f>", "<g>"), (30, 30))
        assert plan == smaller.plan(*size)


def test_a_model_of_one_tile_refuses_what_it_cannot_do() -> None:
    """Never a silent no-op: it makes as many tokens whatever is asked."""
    assert TILERS["single"].plan(9, 9, TileLimits(1, 9)).tokens == 9
    with pytest.raises(LimitNotKept) as caught:
        TILERS["single"].plan(20, 10, TileLimits(max_visual_tokens=8))
    assert str(caught.value) == (
        "max_visual_tokens = 8 cannot be kept: this model makes at least 9 of a 20x10 picture"
    )
    assert isinstance(caught.value, ImageError)


@pytest.mark.parametrize("size", [(400, 1), (1, 400), (6000, 30), (6000, 1)])
def test_strips_have_the_resolution_of_the_processor(size: tuple[int, int]) -> None:
    detail = TILERS["anyres"].plan(*size).sheets[1]
    assert detail is not None
    assert detail.canvas == select_best_resolution(size[::-1], RESOLUTIONS)


def test_a_strip_without_a_longest_edge_is_bounded() -> None:
    cut = tiler(Split("split", 9, None, True, "lanczos", "<f>", "<g>"), (512, 512))
    with pytest.raises(ImageTooLarge, match="of 1x999999 has 512x1000448 pixels once scaled"):
        cut.plan(1, 999999)


WRONG = [0, -1, 1.5, 2.0, "3", True, float("nan")]


@pytest.mark.parametrize("name", ["max_tiles", "max_visual_tokens"])
@pytest.mark.parametrize("value", WRONG)
def test_wrong_limits_are_named(name: str, value: Any) -> None:
    for made in (TileLimits, Settings):
        with pytest.raises(SettingError) as caught:
            made(**{name: value})
        assert str(caught.value) == f"{name} = {value!r}; it should be a whole number, at least 1"


def test_settings_carry_the_limits() -> None:
    assert Settings().limits == TileLimits()
    assert Settings(max_tiles=3, max_visual_tokens=77).limits == TileLimits(3, 77)
