"""Pixels of a plan's sheets equal, to the bit, what each checkpoint's own processor cuts and scales."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pictures import scene
from PIL import Image
from transformers import (
    Idefics3ImageProcessorPil,
    LlavaNextImageProcessorPil,
    SmolVLMImageProcessorPil,
)

from vlm_edge.export.processor import read_processor
from vlm_edge.runtime.manifest import ImageSettings
from vlm_edge.runtime.preprocess import preprocess
from vlm_edge.runtime.tiling import AnyRes, Overlap, Sheet, Split, Tiler, tiler

FILTERS = [filter_.name.lower() for filter_ in sorted(Image.Resampling)]
SIZES = [
    (60, 60), (30, 30), (20, 80), (80, 20), (61, 37), (37, 62), (5, 3), (3, 5), (1, 1), (97, 12),
]  # fmt: skip

TILE: dict[str, Any] = {"size": {"shortest_edge": 30}, "crop_size": {"height": 30, "width": 30},
                        "image_grid_pinpoints": [[30, 60], [60, 30], [60, 60], [90, 30], [30, 90]]}  # fmt: skip
ANYRES: dict[str, dict[str, Any]] = {
    f"resample {number}": TILE | {"resample": number} for number in range(6)
} | {
    "framed, larger": TILE | {"size": {"shortest_edge": 44}},
    "framed, smaller": TILE | {"size": {"shortest_edge": 21}},
    "framed, oblong": TILE | {"size": {"height": 44, "width": 37}, "resample": 1},
    "cropped alone": TILE | {"do_resize": False, "size": {"shortest_edge": 33}},
    "not cropped": TILE | {"do_center_crop": False},
    "raw": TILE | {"do_rescale": False, "do_normalize": False},
}
CUT: dict[str, Any] = {"size": {"longest_edge": 128}, "max_image_size": {"longest_edge": 32}}
SPLIT: dict[str, tuple[Any, dict[str, Any]]] = {
    f"resample {number}": (Idefics3ImageProcessorPil, CUT | {"resample": number})
    for number in range(6)
} | {
    "SmolVLM": (SmolVLMImageProcessorPil, CUT),
    "odd": (SmolVLMImageProcessorPil, {"size": {"longest_edge": 201}, "max_image_size": {"longest_edge": 37}}),
    "one tile": (Idefics3ImageProcessorPil, {"size": {"longest_edge": 40}, "max_image_size": {"longest_edge": 40}}),
    "not split": (SmolVLMImageProcessorPil, CUT | {"do_image_splitting": False}),
    "its own size": (Idefics3ImageProcessorPil, CUT | {"do_resize": False}),
    "its own size, not split": (
        Idefics3ImageProcessorPil, CUT | {"do_resize": False, "do_image_splitting": False}
    ),
    "raw": (SmolVLMImageProcessorPil, CUT | {"do_rescale": False, "do_normalize": False}),
}  # fmt: skip


def anyres(folder: Path, options: dict[str, Any]) -> tuple[Any, ImageSettings, Tiler]:
    theirs = LlavaNextImageProcessorPil(**options)
    theirs.save_pretrained(folder)
    found = read_processor(folder)
    pins, image = found.pinpoints, found.image
    assert pins is not None
    settings = AnyRes("anyres", (2, 2), pins.resolutions, pins.overview, pins.resample, "n.npy")
    return theirs, image, tiler(settings, (image.height, image.width))


def split(folder: Path, kind: Any, options: dict[str, Any]) -> tuple[Any, ImageSettings, Tiler]:
    theirs = kind(**options)
    theirs.save_pretrained(folder)
    found = read_processor(folder)
    assert found.split is not None
    assert found.image.resize is not None
    settings = Split(
        "split", 3, found.split.longest_edge, found.split.split, found.image.resize.resample, "<f>", "<g>"
    )  # fmt: skip
    return theirs, found.image, tiler(settings, (found.split.tile, found.split.tile))


def assert_equal(picture: Image.Image, theirs: Any, image: ImageSettings, cut: Tiler) -> None:
    plan = cut.plan(*picture.size)
    found = preprocess(picture, image, plan.sheets)
    wanted = np.asarray(theirs(picture)["pixel_values"])
    wanted = wanted.reshape(-1, *wanted.shape[-3:])  # Idefics3 counts samples, then pictures
    assert found.shape == wanted.shape == (plan.tiles, 3, image.height, image.width)
    assert found.dtype == np.float32
    assert found.flags.c_contiguous
    np.testing.assert_array_equal(found, wanted.astype(np.float32))  # to the bit


@pytest.mark.parametrize("name", ANYRES)
def test_anyres_equals_the_processor(name: str, tmp_path: Path) -> None:
    theirs, image, cut = anyres(tmp_path, ANYRES[name])
    for seed, size in enumerate(SIZES):
        assert_equal(scene(*size, seed), theirs, image, cut)


@pytest.mark.parametrize("name", SPLIT)
def test_split_equals_the_processor(name: str, tmp_path: Path) -> None:
    theirs, image, cut = split(tmp_path, *SPLIT[name])
    for seed, size in enumerate(SIZES):
        assert_equal(scene(*size, seed), theirs, image, cut)


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (3000, 4000, 3), np.uint8)
    return Image.fromarray(pixels)


def test_at_full_size(photo: Image.Image, tmp_path: Path) -> None:
    """Tiles and resolutions of the published checkpoints."""
    published = {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}
    theirs, image, cut = anyres(tmp_path, published)
    assert cut.plan(*photo.size).tiles == 5
    assert_equal(photo, theirs, image, cut)
    theirs, image, cut = split(
        tmp_path, SmolVLMImageProcessorPil,
        {"size": {"longest_edge": 2048}, "max_image_size": {"longest_edge": 512}},
    )  # fmt: skip
    assert cut.plan(*photo.size).tiles == 13
    assert_equal(photo, theirs, image, cut)


def test_several_pictures_are_each_as_alone(tmp_path: Path) -> None:
    """The processor pads a batch to the most tiles; ours has a picture's own."""
    theirs, image, cut = split(tmp_path, Idefics3ImageProcessorPil, CUT)
    pictures = [scene(60, 60, 0), scene(80, 20, 1)]
    expected = theirs([pictures])["pixel_values"][0]
    found = [preprocess(p, image, cut.plan(*p.size).sheets) for p in pictures]
    assert len(found[0]) != len(found[1])
    np.testing.assert_array_equal(np.concatenate(found), expected)


RAW = ImageSettings(None, None, None, None, None, None, 8, 12)


@pytest.mark.parametrize("resample", FILTERS)
@pytest.mark.parametrize("size", [(60, 60), (61, 37), (37, 62), (5, 3), (1, 1), (90, 9)])
def test_overlapping_tiles_are_cut_from_the_sheet(size: tuple[int, int], resample: str) -> None:
    """By hand: scaled by Pillow, pasted on black, cut at each tile's place."""
    settings: Any = Overlap("overlap", (2, 3), (3, 2), (1, 1), "crop", resample)
    plan = tiler(settings, (8, 12)).plan(*size)
    picture = scene(*size, 5)
    (whole, sheet) = plan.sheets
    assert whole is None
    assert isinstance(sheet, Sheet)
    found = preprocess(picture, RAW, [sheet])
    assert found.shape == (6, 3, 8, 12)
    (high, wide), (top, left) = sheet.scaled[0], sheet.offset
    scaled = picture.resize((wide, high), Image.Resampling[resample.upper()])
    canvas = Image.new("RGB", (20, 16))  # 4 tokens down and 5 across, 4 pixels each
    canvas.paste(scaled, (left, top))
    for index, tile in enumerate(found):
        row, column = divmod(index, 2)
        box = (column * 8, row * 4, column * 8 + 12, row * 4 + 8)
        np.testing.assert_array_equal(tile, np.asarray(canvas.crop(box)).transpose(2, 0, 1))
