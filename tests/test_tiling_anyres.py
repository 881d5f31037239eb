"""LLaVA-NeXT's tiles and visual tokens, from a size alone, equal what transformers makes of the picture."""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokens import tokenizer_of
from transformers import (
    CLIPVisionConfig,
    LlavaNextConfig,
    LlavaNextImageProcessorPil,
    LlavaNextModel,
    LlavaNextProcessor,
)
from transformers.image_processing_utils import get_patch_output_size, select_best_resolution
from transformers.models.llava_next.modeling_llava_next import (
    image_size_to_num_patches,
    unpad_image,
)

from vlm_edge.runtime.tiling.anyres import AnyResTiler, fitted, unpadded
from vlm_edge.runtime.tiling.plan import TileLimits
from vlm_edge.runtime.tiling.settings import AnyRes

# name -> side of a tile and of a patch, resolutions (height, width)
MODELS: dict[str, tuple[int, int, list[list[int]]]] = {
    "v1.6": (336, 14, [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]),
    # SigLIP's patches leave a rest of the tile
    "up to 6 x 6": (384, 14, [[384 * r, 384 * c] for r in range(1, 7) for c in range(1, 7)]),
    "odd": (30, 10, [[90, 30], [30, 60], [150, 90], [30, 210]]),
    "one token a tile": (7, 7, [[7, 7], [21, 14], [7, 35]]),
    "equal ones": (32, 10, [[64, 32], [32, 64], [64, 32], [64, 64], [64, 64]]),
    "one": (40, 8, [[80, 80]]),
}
WIDTH = 5
# Height and width: moderate ones, strips, and any.
SIDES = st.one_of(st.integers(1, 6000), st.integers(1, 60), st.sampled_from([1, 2, 5999, 6000]))


@cache
def tiler_of(model: str) -> AnyResTiler:
    tile, patch, resolutions = MODELS[model]
    of_tile = AnyRes(
        "anyres", (tile // patch, tile // patch), tuple((h, w) for h, w in resolutions), (tile, tile),
        "bicubic", "image_newline.npy",
    )  # fmt: skip
    newline = np.random.default_rng(1).normal(size=WIDTH).astype(np.float32)
    return AnyResTiler(of_tile, (tile, tile), newline)


@cache
def processor_of(model: str) -> Any:
    tile, patch, resolutions = MODELS[model]
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": tile}, crop_size={"height": tile, "width": tile},
        image_grid_pinpoints=resolutions,
    )  # fmt: skip
    return LlavaNextProcessor(
        images, tokenizer_of("pieces"), patch, "default", num_additional_image_tokens=1
    )


@cache
def model_of(model: str) -> Any:
    """Of the model, what counts and packs features: it reads the config alone."""
    tile, patch, resolutions = MODELS[model]
    vision = CLIPVisionConfig(image_size=tile, patch_size=patch)
    return SimpleNamespace(
        config=LlavaNextConfig(vision_config=vision, image_grid_pinpoints=resolutions)
    )


@pytest.mark.verifies("llava_next", "tile and token counts")
@pytest.mark.parametrize("model", MODELS)
@settings(max_examples=500, deadline=None)
@given(width=SIDES, height=SIDES)
@example(width=672, height=672)
@example(width=4000, height=3000)
@example(width=1, height=1)
@example(width=5, height=3)
def test_counts_of_any_size(model: str, width: int, height: int) -> None:
    tile, _, resolutions = MODELS[model]
    plan = tiler_of(model).plan(width, height)
    assert (plan.width, plan.height) == (width, height)
    theirs = processor_of(model)._get_num_multimodal_tokens([(height, width)])
    assert [plan.tokens] == theirs["num_image_tokens"]
    assert plan.tiles == image_size_to_num_patches([height, width], resolutions, tile)
    best = select_best_resolution((height, width), resolutions)
    overview, detail = plan.sheets
    assert overview is not None
    assert detail is not None
    assert detail.canvas == tuple(best)
    assert [detail.scaled[0]] == [
        get_patch_output_size(np.empty((3, height, width), np.uint8), best, "channels_first")
    ]
    assert plan.grid == detail.tiles == (best[0] // tile, best[1] // tile)
    assert plan.name == f"{plan.grid[0]}x{plan.grid[1]}"
    assert plan.name in tiler_of(model).grids()
    down = tile // MODELS[model][1]
    assert [name for name, _ in plan.terms] == ["overview", "tiles", "newlines"]
    assert dict(plan.terms)["overview"] == down * down
    assert plan.equation == f"{plan.tokens} = {' + '.join(str(count) for _, count in plan.terms)}"


@settings(max_examples=1000, deadline=None)
@given(width=SIDES, height=SIDES, rows=st.integers(1, 160), columns=st.integers(1, 160))
@example(width=6000, height=1, rows=24, columns=72)  # nothing is left
@example(width=3, height=5, rows=9, columns=5)
def test_unpadded_equals_transformers(width: int, height: int, rows: int, columns: int) -> None:
    """Kept are the same rows and columns, not only as many."""
    places = torch.arange(rows * columns).view(1, rows, columns)
    expected = unpad_image(places, (height, width))[0]
    top, left, high, wide = unpadded(width, height, (rows, columns))
    kept = places[0, top : top + high, left : left + wide]
    assert kept.shape == expected.shape == (high, wide)
    assert torch.equal(kept, expected)


@settings(max_examples=1000, deadline=None)
@given(width=SIDES, height=SIDES, high=st.integers(1, 3000), wide=st.integers(1, 3000))
def test_fitted_is_inside_and_touches(width: int, height: int, high: int, wide: int) -> None:
    found = fitted(width, height, (high, wide))
    picture = np.broadcast_to(np.uint8(0), (3, height, width))
    assert found == get_patch_output_size(picture, (high, wide), "channels_first")
    assert 1 <= found[0] <= high
    assert 1 <= found[1] <= wide
    assert found[0] == high or found[1] == wide


PACKED = [(60, 60), (61, 37), (37, 61), (20, 80), (80, 20), (5, 3), (1, 1), (4000, 3000), (333, 97)]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("size", PACKED)
def test_tokens_are_put_together_as_in_transformers(model: str, size: tuple[int, int]) -> None:
    width, height = size
    tiler = tiler_of(model)
    plan = tiler.plan(width, height)
    shape = (plan.tiles, tiler.settings.tile_tokens, WIDTH)
    features = np.random.default_rng(width).normal(size=shape).astype(np.float32)
    assert_packed_alike(model, plan, features, (height, width))


@pytest.mark.parametrize("model", MODELS)
def test_an_overview_alone_ends_with_a_newline(model: str) -> None:
    """As the model takes a picture of one tile."""
    tiler = tiler_of(model)
    plan = tiler.plan(50, 40, TileLimits(max_tiles=1))
    features = np.random.default_rng(3).normal(size=(1, tiler.settings.tile_tokens, WIDTH))
    assert_packed_alike(model, plan, features.astype(np.float32), (40, 50))
    assert plan.name == "1"
    assert plan.terms == (("overview", tiler.settings.tile_tokens), ("newline", 1))


def assert_packed_alike(model: str, plan: Any, features: np.ndarray, size: tuple[int, int]) -> None:
    tiler = tiler_of(model)
    assert tiler.newline is not None
    (expected,), (length,) = LlavaNextModel.pack_image_features(
        model_of(model), [torch.from_numpy(features)], [size], "default",
        torch.from_numpy(tiler.newline),
    )  # fmt: skip
    found = tiler.assemble(plan, features)
    assert found.dtype == np.float32
    assert found.shape == (plan.tokens, WIDTH)
    assert int(length) == plan.tokens
    np.testing.assert_array_equal(found, expected.numpy())
    assert tiler.places(plan, "<image>") == "<image>" * plan.tokens


def test_without_the_newline_nothing_is_assembled() -> None:
    tiler = AnyResTiler(tiler_of("odd").settings, (30, 30))
    plan = tiler.plan(60, 40)
    assert plan.tokens > 0
    with pytest.raises(ValueError, match="newline"):
        tiler.assemble(plan, np.zeros((plan.tiles, 9, WIDTH), np.float32))
