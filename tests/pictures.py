"""Image files of every kind people hand in, written at run time from a seed."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

EXIF_ORIENTATION = 0x0112

# file name -> width, height; all but the first few differ only in how the same kind of scene is stored
SIZES = {
    "wide.png": (61, 37),
    "tall.png": (34, 58),
    "small.png": (19, 23),
    "photo.jpg": (53, 44),
    "deep.png": (47, 40),  # 16 bits, grey
    "deep-colour.png": (39, 31),  # 16 bits per channel
    "cmyk.jpg": (41, 52),
    "palette.png": (44, 36),  # palette with a transparent entry
    "alpha.png": (38, 49),  # RGBA
    "grey.png": (50, 33),
    "rotated.jpg": (57, 35),  # EXIF: turn by 90 degrees
    "pixel.png": (1, 1),
}


def write_pictures(folder: Path) -> dict[str, Path]:
    """Write all of SIZES into `folder`; returns file name -> path."""
    return {name: _write(folder / name, index) for index, name in enumerate(SIZES)}


def scene(width: int, height: int, seed: int) -> Image.Image:
    """Smooth colours with noise and a block: unlike noise alone, the parts of it differ after resizing."""
    generator = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width] / max(width, height)
    waves = [np.sin(generator.uniform(2, 9) * x + generator.uniform(2, 9) * y) for _ in range(3)]
    pixels = 128 + 90 * np.stack(waves, axis=-1) + generator.normal(0, 20, (height, width, 3))
    pixels[height // 4 : height // 2, width // 3 : width // 2] = generator.integers(0, 256, 3)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _write(path: Path, seed: int) -> Path:
    image = scene(*SIZES[path.name], seed)
    options: dict[str, object] = {}
    if path.name == "deep.png":
        # transformers' load_image clips at 255 where others divide by 256: half of the values lie above
        image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 2)
    elif path.name == "deep-colour.png":
        return _write_deep_colour(path, np.asarray(image))
    elif path.name == "cmyk.jpg":
        image = image.convert("CMYK")
    elif path.name == "palette.png":
        image = image.convert("P", palette=Image.Palette.ADAPTIVE, colors=17)
        options["transparency"] = 3
    elif path.name == "alpha.png":
        alpha = np.linspace(0, 255, image.width).astype(np.uint8)
        image.putalpha(Image.fromarray(np.tile(alpha, (image.height, 1))))
    elif path.name == "grey.png":
        image = image.convert("L")
    elif path.name == "rotated.jpg":
        exif = Image.Exif()
        exif[EXIF_ORIENTATION] = 6
        options["exif"] = exif
    image.save(path, **options)
    return path


def _write_deep_colour(path: Path, pixels: np.ndarray) -> Path:
    """A PNG of 16 bits per channel, which Pillow reads but does not write."""
    height, width, _ = pixels.shape
    values = (pixels.astype(np.uint16) * 257).astype(">u2").reshape(height, width * 3)
    rows = b"".join(b"\0" + row.tobytes() for row in values)  # filter type 0 in front of each row
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    chunks = {b"IHDR": header, b"IDAT": zlib.compress(rows), b"IEND": b""}
    data = b"\x89PNG\r\n\x1a\n"
    for kind, body in chunks.items():
        data += struct.pack(">I", len(body)) + kind + body
        data += struct.pack(">I", zlib.crc32(kind + body))
    path.write_bytes(data)
    return path
