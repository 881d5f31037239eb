"""Tiles and visual tokens of Idefics3 and SmolVLM equal what their processors make of a picture.

`get_number_of_image_patches` disagrees with `preprocess` at some sizes; what the model sees is what
`preprocess` cuts, so its own steps are run here, on pictures that have a size and no memory.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pictures import scene
from tokens import tokenizer_of
from transformers import Idefics3ImageProcessorPil, Idefics3Processor, SmolVLMImageProcessorPil
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import SizeDict

from vlm_edge.runtime.tiling.settings import Size, Split
from vlm_edge.runtime.tiling.split import SplitTiler

# name -> class, side of a tile, options
MODELS: dict[str, tuple[Any, int, dict[str, Any]]] = {
    "Idefics3": (Idefics3ImageProcessorPil, 364, {"size": {"longest_edge": 4 * 364}}),
    "SmolVLM": (SmolVLMImageProcessorPil, 512, {"size": {"longest_edge": 4 * 512}}),
    "no whole tiles": (SmolVLMImageProcessorPil, 512, {"size": {"longest_edge": 1200}}),
    "odd": (Idefics3ImageProcessorPil, 37, {"size": {"longest_edge": 201}}),
    "one tile": (Idefics3ImageProcessorPil, 64, {"size": {"longest_edge": 64}}),
    "beyond 4096": (SmolVLMImageProcessorPil, 512, {"size": {"longest_edge": 5000}}),
    "not split": (
        SmolVLMImageProcessorPil, 512, {"size": {"longest_edge": 2048}, "do_image_splitting": False}
    ),
    "its own size": (Idefics3ImageProcessorPil, 364, {"do_resize": False}),
    "its own size, not split": (
        Idefics3ImageProcessorPil, 364, {"do_resize": False, "do_image_splitting": False}
    ),
}  # fmt: skip
TOKENS = 3
SIDES = st.one_of(st.integers(1, 6000), st.integers(1, 60), st.sampled_from([1, 2, 5999, 6000]))
SHEER = settings(
    max_examples=600, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture
def scaled(monkeypatch: pytest.MonkeyPatch) -> list[Size]:
    """The sizes that processors scale pictures to, one after another; nothing is scaled."""
    sizes: list[Size] = []

    def resize(_: Any, image: np.ndarray, size: SizeDict, **__: Any) -> np.ndarray:
        assert size.height is not None
        assert size.width is not None
        sizes.append((size.height, size.width))
        return unwritten(*sizes[-1])

    monkeypatch.setattr(PilBackend, "resize", resize)
    return sizes


def unwritten(height: int, width: int) -> np.ndarray:
    return np.broadcast_to(np.uint8(0), (3, height, width))


def tiler_of(model: str) -> SplitTiler:
    _, tile, options = MODELS[model]
    edge = options["size"]["longest_edge"] if options.get("do_resize", True) else None
    split = options.get("do_image_splitting", True)
    return SplitTiler(Split("split", TOKENS, edge, split, "lanczos", "<fake>", "<global>"), tile)


def processor_of(model: str) -> Any:
    kind, tile, options = MODELS[model]
    return kind(max_image_size={"longest_edge": tile}, **options)


PROCESSORS = {model: processor_of(model) for model in MODELS}


def preprocessed(model: str, width: int, height: int) -> tuple[int, Size]:
    """Number of tiles, rows and columns that `preprocess` makes."""
    theirs = PROCESSORS[model]
    found = theirs._preprocess(
        [[unwritten(height, width)]], do_resize=theirs.do_resize,
        size=theirs.size, resample=theirs.resample,
        do_rescale=False, rescale_factor=1.0, do_normalize=False, image_mean=None, image_std=None,
        do_pad=False, do_image_splitting=theirs.do_image_splitting,
        max_image_size=theirs.max_image_size, return_row_col_info=True, return_tensors=None,
    )  # fmt: skip
    ((row,),), ((column,),) = found["rows"], found["cols"]
    ((*tiles,),) = found["pixel_values"]
    side = MODELS[model][1]
    assert {tile.shape for tile in tiles} == {(3, side, side)}
    return len(tiles), (row, column)


@pytest.mark.parametrize("model", MODELS)
@SHEER
@given(width=SIDES, height=SIDES)
@example(width=1, height=1)
@example(width=5, height=3)
@example(width=4000, height=3000)
@example(width=6000, height=1)
@example(width=1, height=6000)
@example(width=2048, height=513)  # 2048 / (2048 / 513) is less than 513
def test_tiles_of_any_size(model: str, width: int, height: int, scaled: list[Size]) -> None:
    scaled.clear()
    tiles, grid = preprocessed(model, width, height)
    tiler = tiler_of(model)
    plan = tiler.plan(width, height)
    assert (plan.tiles, plan.grid) == (tiles, grid)
    assert plan.tokens == tiles * TOKENS
    last = plan.sheets[-1]
    assert last is not None
    assert (
        list(last.scaled) == scaled
    )  # to the overview, through the picture that tiles are cut from
    for sheet in plan.sheets[:-1]:
        assert sheet is not None
        assert list(sheet.scaled) == scaled[:-1]
        assert sheet.canvas == scaled[-2]
    assert not tiler.grids() or plan.name in tiler.grids()


@pytest.mark.parametrize("model", ["Idefics3", "SmolVLM", "one tile", "beyond 4096"])
@settings(max_examples=600, deadline=None)
@given(width=SIDES, height=SIDES)
def test_the_processors_own_count(model: str, width: int, height: int) -> None:
    """The same where the long edge is whole tiles."""
    rows, columns = tiler_of(model).plan(width, height).grid
    theirs = PROCESSORS[model].get_number_of_image_patches(height, width)
    assert theirs == (rows * columns + 1 if rows else 0, rows, columns)


def test_where_the_processors_own_count_is_wrong(scaled: list[Size]) -> None:
    """A long edge of 201 pixels is 5.4 tiles of 37: the short edge grows with it before it is cut, which
    the count leaves out."""
    assert PROCESSORS["odd"].get_number_of_image_patches(3, 1) == (13, 6, 2)
    assert preprocessed("odd", 1, 3) == (19, (6, 3))
    assert tiler_of("odd").plan(1, 3).grid == (6, 3)


@pytest.fixture(scope="module")
def processor() -> Any:
    """Idefics3's, with tiles of 37 pixels that have TOKENS tokens."""
    return Idefics3Processor(PROCESSORS["odd"], tokenizer_of("smolvlm"), image_seq_len=TOKENS)


@pytest.mark.parametrize(
    "size",
    [(1, 1), (201, 201), (37, 37), (100, 400), (400, 100), (61, 37), (5, 3), (700, 9), (30, 40)],
)
def test_places_are_the_processors(size: tuple[int, int], processor: Any) -> None:
    tiler = SplitTiler(
        replace(
            tiler_of("odd").settings,
            fake_token=processor.fake_image_token, global_token=processor.global_image_tag,
        ),
        37,
    )  # fmt: skip
    plan = tiler.plan(*size)
    (rows, columns) = plan.grid
    expected = processor.replace_image_token({"rows": [[rows]], "cols": [[columns]]}, 0)
    found = tiler.places(plan, processor.image_token)
    assert found == expected
    assert found.count(processor.image_token) == plan.tokens
    image = scene(*size, 0)
    theirs = processor(text=processor.image_token, images=[image])["input_ids"][0]
    assert list(theirs) == processor.tokenizer(found)["input_ids"]


def test_one_tile_is_an_overview() -> None:
    plan = tiler_of("one tile").plan(50, 50)
    assert (plan.grid, plan.name, plan.tiles) == ((0, 0), "1", 1)
    assert plan.terms == (("overview", TOKENS),)
    found = tiler_of("one tile").places(plan, "*")
    assert found == "<fake><global>***<fake>"


def test_features_stay_in_order() -> None:
    tiler = tiler_of("odd")
    plan = tiler.plan(100, 60)
    features = np.arange(plan.tiles * TOKENS * 2, dtype=np.float32).reshape(plan.tiles, TOKENS, 2)
    np.testing.assert_array_equal(tiler.assemble(plan, features), features.reshape(-1, 2))
    assert len(tiler.assemble(plan, features)) == plan.tokens
