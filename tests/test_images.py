"""`decode` against transformers' load_image for every mode, and every way an image can be bad."""

from __future__ import annotations

import io
import os
import struct
import threading
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pictures import scene
from PIL import Image, ImageOps
from transformers.image_transforms import convert_to_rgb
from transformers.image_utils import load_image

from vlm_edge.errors import ImageTooLarge, ImageUnreadable
from vlm_edge.runtime.images import DecodedImage, ImageLimits, decode

GREY_16 = Image.fromarray(np.arange(35, dtype=np.uint16).reshape(5, 7) * 1800)


def encoded(image: Image.Image, kind: str = "png", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png_header(width: int, height: int, data: bytes = b"") -> bytes:
    """A PNG whose header claims a size; its pixels are `data`, whatever that is."""
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(data)),
    ]
    body = b"".join(
        struct.pack(">I", len(content))
        + kind
        + content
        + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + body


def with_orientation(orientation: int) -> dict[str, Any]:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return {"exif": exif}


def palette(**options: Any) -> bytes:
    return encoded(scene(31, 22, 4).convert("P", palette=Image.Palette.ADAPTIVE), **options)


FILES = {
    "rgb.png": encoded(scene(41, 30, 1)),
    "rgb.jpg": encoded(scene(640, 427, 2), "jpeg"),  # large enough for draft mode to show
    "progressive.jpg": encoded(scene(64, 48, 2), "jpeg", progressive=True),
    "grey.png": encoded(scene(20, 33, 3).convert("L")),
    "grey.jpg": encoded(scene(20, 33, 3).convert("L"), "jpeg"),
    "grey-alpha.png": encoded(scene(20, 33, 3).convert("LA")),
    "grey-transparent.png": encoded(scene(20, 33, 3).convert("L"), transparency=120),
    "grey-16.png": encoded(GREY_16),
    "grey-16.tif": encoded(GREY_16, "tiff"),
    "grey-16-transparent.png": encoded(GREY_16, transparency=1800),
    "int32.tif": encoded(
        Image.fromarray(np.arange(-20, 300, 4, dtype=np.int32).reshape(8, 10)), "tiff"
    ),
    "float.tif": encoded(
        Image.fromarray(np.linspace(-9, 300, 42, dtype=np.float32).reshape(6, 7)), "tiff"
    ),
    "bilevel.png": encoded(scene(29, 17, 5).convert("1")),
    "palette.png": palette(),
    "palette-one-transparent.png": palette(transparency=3),
    "palette-alpha.png": palette(transparency=bytes(range(256))),
    "rgba.png": encoded(scene(25, 24, 6).convert("RGBA").rotate(30)),
    "rgb-transparent.png": encoded(Image.new("RGB", (9, 8), (1, 2, 3)), transparency=(1, 2, 3)),
    "cmyk.jpg": encoded(scene(33, 21, 7).convert("CMYK"), "jpeg"),
    "ycbcr.tif": encoded(scene(33, 21, 7).convert("YCbCr"), "tiff"),
    "lab.tif": encoded(Image.new("LAB", (4, 3), (120, 10, 200)), "tiff"),
    "bmp.bmp": encoded(scene(13, 9, 8), "bmp"),
    "webp.webp": encoded(scene(48, 31, 9), "webp"),
    "animated.gif": encoded(
        scene(18, 12, 10), "gif", save_all=True, append_images=[scene(18, 12, 11)], loop=0
    ),
    "pixel.png": encoded(Image.new("RGB", (1, 1), (9, 8, 7))),
    "wrong-name.jpg": encoded(scene(8, 8, 12)),
} | {
    f"turned-{n}.jpg": encoded(scene(40, 26, 13), "jpeg", **with_orientation(n))
    for n in range(1, 9)
}


def same(found: Image.Image, wanted: Image.Image) -> bool:
    return (
        found.mode == wanted.mode == "RGB"
        and found.size == wanted.size
        and found.tobytes() == wanted.tobytes()
        and found.info.get("transparency") == wanted.info.get("transparency")
    )


@pytest.mark.parametrize("name", FILES)
def test_equals_load_image(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(FILES[name])
    # given the path, load_image leaves an animation's file open
    with Image.open(path) as opened, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, on palettes with alpha; ours must not leak
        wanted = load_image(opened)
    from_path, from_bytes = decode(path), decode(FILES[name])
    assert same(from_path.image, wanted)
    assert same(from_bytes.image, wanted)
    assert same(decode(str(path)).image, wanted)
    assert from_path.digest == from_bytes.digest
    assert (from_path.name, from_bytes.name) == (str(path), "<bytes>")
    with Image.open(path) as lazy, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        given = convert_to_rgb(ImageOps.exif_transpose(lazy))
    with Image.open(path) as lazy:  # as a processor takes a Pillow image, turned upright
        assert same(decode(lazy).image, given)


@pytest.mark.parametrize(
    "mode", ["1", "L", "P", "I;16", "I", "F", "LA", "PA", "RGBA", "RGBa", "RGBX", "HSV"]
)
def test_pillow_images_of_any_mode(mode: str) -> None:
    image = Image.new(mode, (3, 2))
    assert same(decode(image).image, convert_to_rgb(image))


def test_transparent_parts_of_a_pillow_image_are_white() -> None:
    image = Image.new("RGBA", (2, 1), (10, 20, 30, 0))
    image.putpixel((1, 0), (10, 20, 30, 255))
    assert np.asarray(decode(image).image).tolist() == [[[255, 255, 255], [10, 20, 30]]]


def test_16_bits_are_cut_not_scaled() -> None:
    grey = decode(Image.fromarray(np.array([[3, 255, 256, 65535]], np.uint16))).image
    assert np.asarray(grey)[0, :, 0].tolist() == [3, 255, 255, 255]


def test_a_pillow_image_is_left_alone_and_its_copy_is_independent() -> None:
    image = scene(12, 10, 0)
    image.getexif()[0x0112] = 6
    before = image.tobytes()
    decoded = decode(image)
    assert decoded.image.size == (10, 12)
    decoded.image.paste((0, 0, 0), (0, 0, 10, 12))
    assert (image.size, image.tobytes(), image.getexif()[0x0112]) == ((12, 10), before, 6)


def test_digest_follows_the_content() -> None:
    image = scene(12, 10, 0)
    assert decode(image).digest == decode(image.copy()).digest
    assert decode(image).name == "<image>"
    assert len(decode(image).digest) == 64
    others = [
        image.rotate(180),
        Image.frombytes("RGB", (10, 12), image.tobytes()),  # the same bytes in another shape
        scene(12, 10, 1),
    ]
    marked = image.copy()
    marked.info["transparency"] = image.getpixel((0, 0))
    digests = {decode(i).digest for i in (image, *others, marked)}
    assert len(digests) == 5
    first, second = image.convert("P"), image.convert("P")
    second.putpalette(list(range(255, -1, -1)) * 3)  # equal indices, other colours
    assert decode(first).digest != decode(second).digest


def pipe(folder: Path) -> Path:
    os.mkfifo(folder / "pipe")
    return folder / "pipe"


JPEG, PNG = FILES["rgb.jpg"], FILES["rgb.png"]
UNREADABLE: dict[str, tuple[Any, str]] = {
    "missing": (lambda f: f / "none.png", "there is no such file"),
    "folder": (lambda f: f, "it is a folder"),
    "pipe": (pipe, "not a regular file"),
    "url": (lambda f: "https://example.com/a.png", "it is a URL; download it first"),
    "null byte": (lambda f: "a\0b.png", "null byte"),
    "long name": (lambda f: "a" * 5000, "name too long"),
    "empty": (lambda f: b"", "it is empty"),
    "text": (lambda f: b"not an image at all", "not an image in a format"),
    "truncated jpeg": (lambda f: JPEG[: len(JPEG) // 2], "truncated"),
    "truncated png": (lambda f: PNG[: len(PNG) // 2], "damaged"),
    "header only": (lambda f: PNG[:40], "cut short, or not an image"),
    "corrupt png": (lambda f: PNG[:60] + bytes(200) + PNG[260:], "damaged"),
    "no pixels behind the header": (lambda f: png_header(100, 100, b"abc"), "damaged"),
    "truncated gif": (lambda f: FILES["animated.gif"][:60], "cut short"),
    "truncated tiff": (lambda f: FILES["grey-16.tif"][:70], "image"),
    "script": (
        lambda f: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n",
        "EPS",
    ),
    "no pixels": (lambda f: Image.new("RGB", (0, 5)), r"no pixels \(0 x 5\)"),
    "mode without RGB": (lambda f: Image.new("La", (2, 2)), "unsupported"),
    "array": (
        lambda f: np.zeros((2, 2, 3), np.uint8),
        "<ndarray> cannot be read: an image is given",
    ),
    "none": (lambda f: None, "as a path, as bytes or as a Pillow image"),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_unreadable(case: str, tmp_path: Path) -> None:
    make, why = UNREADABLE[case]
    with pytest.raises(ImageUnreadable, match=f"(?i){why}") as caught:
        decode(make(tmp_path))
    assert "\n" not in str(caught.value)
    assert str(caught.value).count("cannot be read") == 1


def test_a_closed_pillow_image_is_unreadable(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(PNG)
    image = Image.open(tmp_path / "a.png")
    image.close()
    with pytest.raises(ImageUnreadable, match=r"a\.png"):
        decode(image)


def test_a_text_chunk_that_unpacks_without_end_is_refused() -> None:
    chunk = b"zTXtcomment\0\0" + zlib.compress(bytes(100_000_000), 9)
    bomb = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    with pytest.raises(ImageUnreadable, match="too large"):
        decode(PNG[:33] + bomb + PNG[33:])


@pytest.mark.parametrize(
    ("width", "height", "found"),
    [(20000, 20000, "more than 178956970 pixels"), (40, 30, "40 x 30 pixels")],
)
def test_pixels_are_bounded_before_decoding(width: int, height: int, found: str) -> None:
    # There are no pixels behind these headers: decoding them would raise something else.
    limits = ImageLimits(pixels=min(ImageLimits().pixels, width * height - 1))
    with pytest.raises(ImageTooLarge, match=f"<bytes> has {found}, the limit is {limits.pixels} p"):
        decode(png_header(width, height), limits)


def test_pixels_of_pillow_images_are_bounded() -> None:
    with pytest.raises(ImageTooLarge, match="<image> has 5 x 4 pixels, the limit is 19 pixels"):
        decode(Image.new("RGB", (5, 4)), ImageLimits(pixels=19))
    assert decode(Image.new("RGB", (5, 4)), ImageLimits(pixels=20)).image.size == (5, 4)


def test_a_hundred_megapixels_pass_the_bound_without_a_warning() -> None:
    # Pillow warns from 89 megapixels on; the missing pixels are all that is wrong here.
    with pytest.raises(ImageUnreadable, match="truncated"):
        decode(png_header(12000, 9000))


def test_bytes_are_bounded_before_reading(tmp_path: Path) -> None:
    path = tmp_path / "sparse.jpg"
    with path.open("wb") as file:
        file.truncate(ImageLimits().file_bytes)
    with pytest.raises(
        ImageTooLarge, match="200000000 bytes, the limit is less than 200000000 bytes"
    ):
        decode(path)
    with pytest.raises(ImageTooLarge, match=f"<bytes> has {len(PNG)} bytes"):
        decode(PNG, ImageLimits(file_bytes=len(PNG)))
    assert decode(PNG, ImageLimits(file_bytes=len(PNG) + 1)).image.size == (41, 30)


def test_threads_decode_alike() -> None:
    found: list[DecodedImage] = []
    threads = [threading.Thread(target=lambda: found.append(decode(JPEG))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert len({f.image.tobytes() for f in found}) == 1
