"""`preprocess` equals the checkpoint's own processor to the bit, or says why it cannot."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import scene
from PIL import Image
from transformers import (
    BitImageProcessorPil,
    CLIPImageProcessorPil,
    LlavaImageProcessorPil,
    SiglipImageProcessorPil,
    ViTImageProcessorPil,
)
from transformers.image_utils import load_image

from vlm_edge.errors import ImageTooLarge, ImageUnreadable, SettingError
from vlm_edge.export.processor import read_processor
from vlm_edge.runtime.images import decode
from vlm_edge.runtime.manifest import ImageSettings
from vlm_edge.runtime.preprocess import preprocess

LLAVA = {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}
SMALL: dict[str, Any] = {"size": {"shortest_edge": 30}, "crop_size": {"height": 30, "width": 30}}
PADDED: dict[str, Any] = {"do_pad": True, **SMALL}

PROCESSORS: dict[str, tuple[Any, dict[str, Any]]] = {
    "clip": (CLIPImageProcessorPil, SMALL),
    "crop larger than the image": (CLIPImageProcessorPil, SMALL | {"crop_size": 50}),
    "crop larger one way": (CLIPImageProcessorPil, SMALL | {"crop_size": [41, 20]}),
    "odd crop of an even image": (CLIPImageProcessorPil, SMALL | {"crop_size": 27}),
    "crop alone": (CLIPImageProcessorPil, {"do_resize": False, "crop_size": 33}),
    "oblong": (CLIPImageProcessorPil, {"size": [25, 40], "do_center_crop": False}),
    "unscaled": (CLIPImageProcessorPil, SMALL | {"do_rescale": False}),
    "not normalised": (CLIPImageProcessorPil, SMALL | {"do_normalize": False}),
    "-1 to 1": (CLIPImageProcessorPil, SMALL | {"rescale_factor": 1 / 127.5, "image_mean": 1.0}),
    "raw": (CLIPImageProcessorPil, SMALL | {"do_rescale": False, "do_normalize": False}),
    "padded": (LlavaImageProcessorPil, PADDED),
    "padded, then exact": (
        LlavaImageProcessorPil,
        PADDED | {"size": [28, 28], "do_center_crop": False},
    ),
    "padded, no crop": (LlavaImageProcessorPil, PADDED | {"do_center_crop": False}),
    "padded, not normalised": (LlavaImageProcessorPil, PADDED | {"do_normalize": False}),
    "llava without padding": (LlavaImageProcessorPil, SMALL),
    "dinov2": (BitImageProcessorPil, {"size": {"shortest_edge": 32}, "crop_size": 28}),
    "siglip": (SiglipImageProcessorPil, {"size": {"height": 48, "width": 48}}),
    "vit": (ViTImageProcessorPil, {"size": {"height": 32, "width": 32}}),
} | {
    f"resample {number}": (CLIPImageProcessorPil, SMALL | {"resample": number})
    for number in range(6)
}
# width, height: ratios of 1:4 and 4:1, odd ones, one row, one column, one pixel, already that size
SIZES = [
    (20, 80),
    (80, 20),
    (5, 3),
    (61, 37),
    (37, 62),
    (1, 40),
    (40, 1),
    (1, 1),
    (30, 30),
    (31, 97),
]


def pair(name: str, folder: Path) -> tuple[Any, ImageSettings]:
    kind, options = PROCESSORS[name]
    theirs = kind(**options)
    theirs.save_pretrained(folder)
    return theirs, read_processor(folder).image


def loaded(theirs: Any, path: Path) -> Any:
    with Image.open(path) as opened:  # given the path, load_image leaves a GIF's file open
        return np.asarray(theirs(load_image(opened))["pixel_values"])


def assert_equal(image: Image.Image, theirs: Any, ours: ImageSettings) -> None:
    found = preprocess(image, ours)
    wanted = np.asarray(theirs(image)["pixel_values"])
    assert found.shape == wanted.shape == (1, 3, ours.height, ours.width)
    assert found.dtype == np.float32
    assert found.flags.c_contiguous
    assert np.array_equal(found, wanted.astype(np.float32))  # to the bit


@pytest.mark.parametrize("name", PROCESSORS)
def test_equals_the_processor(name: str, tmp_path: Path) -> None:
    theirs, ours = pair(name, tmp_path)
    for seed, (width, height) in enumerate(SIZES):
        assert_equal(scene(width, height, seed), theirs, ours)


@pytest.mark.parametrize("size", [(4000, 3000), (640, 480), (336, 336)])
def test_equals_the_processor_at_full_size(size: tuple[int, int], tmp_path: Path) -> None:
    theirs = CLIPImageProcessorPil(**LLAVA)
    theirs.save_pretrained(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    assert_equal(Image.fromarray(pixels), theirs, read_processor(tmp_path).image)


@given(width=st.integers(1, 400), height=st.integers(1, 400), data=st.data())
@settings(max_examples=150, deadline=None)
def test_equals_the_processor_at_any_size(
    width: int, height: int, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    name = data.draw(st.sampled_from(list(PROCESSORS)))
    edge = data.draw(st.integers(1, 60))
    kind, options = PROCESSORS[name]
    if "shortest_edge" in options.get("size", {}):
        options = options | {"size": {"shortest_edge": edge}}
    theirs = kind(**options)
    folder = tmp_path_factory.mktemp("processor")
    theirs.save_pretrained(folder)
    assert_equal(scene(width, height, edge), theirs, read_processor(folder).image)


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "CMYK", "I", "F"])
def test_decode_then_preprocess_equals_the_processor_on_a_file(mode: str, tmp_path: Path) -> None:
    theirs, ours = pair("clip", tmp_path)
    path = tmp_path / "image.tif"
    scene(50, 41, 3).convert(mode).save(path)
    assert np.array_equal(preprocess(decode(path).image, ours), loaded(theirs, path))


@pytest.mark.parametrize("kind", ["png", "gif"])
def test_one_transparent_colour_turns_white(kind: str, tmp_path: Path) -> None:
    theirs, ours = pair("clip", tmp_path)
    image = scene(50, 41, 3).convert("P", palette=Image.Palette.ADAPTIVE, colors=5)
    path = tmp_path / f"image.{kind}"
    image.save(path, transparency=2)
    found = preprocess(decode(path).image, ours)
    assert np.array_equal(found, loaded(theirs, path))
    image.save(path)
    assert not np.array_equal(found, preprocess(decode(path).image, ours))


def test_the_image_is_left_alone() -> None:
    image = scene(40, 30, 0)
    before = image.tobytes()
    preprocess(image, ImageSettings(None, None, (30, 30), None, None, None, 30, 30))
    assert image.tobytes() == before


def test_the_result_can_be_written_to() -> None:
    tile = preprocess(scene(4, 4, 0), ImageSettings(None, None, None, None, None, None, 4, 4))
    tile += 1


SQUARE = ImageSettings((0, 0, 0), None, None, None, None, None, 30, 30)


def test_another_size_than_the_engine_takes_is_refused() -> None:
    with pytest.raises(
        SettingError, match="a tile of 50 x 50 pixels, the vision engine takes 30 x 30"
    ):
        preprocess(scene(50, 20, 0), SQUARE)


def test_only_rgb_is_taken() -> None:
    with pytest.raises(ImageUnreadable, match="its mode is L, preprocessing takes RGB"):
        preprocess(scene(30, 30, 0).convert("L"), SQUARE)


def test_a_strip_is_refused_before_it_fills_the_memory(tmp_path: Path) -> None:
    strip = Image.new("RGB", (1, 200_000))
    with pytest.raises(ImageTooLarge, match="1 x 200000 pixels, 200000 x 200000 once"):
        preprocess(strip, SQUARE)
    CLIPImageProcessorPil(**LLAVA).save_pretrained(tmp_path)
    clip = read_processor(tmp_path).image
    with pytest.raises(ImageTooLarge, match="1 x 200000 pixels, 336 x 67200000 once"):
        preprocess(strip, clip)
    with pytest.raises(ImageTooLarge, match="200000 x 1 pixels, 67200000 x 336 once"):
        preprocess(strip.transpose(Image.Transpose.ROTATE_90), clip)


def test_null_steps_are_skipped(tmp_path: Path) -> None:
    image = scene(30, 30, 1)
    file = io.BytesIO()
    image.save(file, "png")
    raw = preprocess(decode(file.getvalue()).image, replace(SQUARE, pad_to_square=None))
    assert np.array_equal(raw[0], np.moveaxis(np.asarray(image), -1, 0).astype(np.float32))
