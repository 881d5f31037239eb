"""An image given by path, bytes or Pillow object as upright RGB pixels and a content hash.

The pixels equal `transformers.image_utils.load_image`: Pillow decodes at full size, the EXIF
orientation is applied, and `convert("RGB")` does the rest. With Pillow 13 that drops alpha instead of
blending it, and cuts 16-bit greyscale (I;16, I) at 255 instead of scaling it, so most of it turns
white. Both surprise, and both are what the checkpoint's own loader gives.
"""

from __future__ import annotations

import hashlib
import io
import os
import stat
import threading
import warnings
from dataclasses import dataclass

from PIL import Image, ImageOps, UnidentifiedImageError

from vlm_edge.errors import ImageError, ImageTooLarge, ImageUnreadable

ImageInput = str | os.PathLike[str] | bytes | Image.Image

# Pillow's warnings can only be silenced through process-wide state, which two threads must not swap
# at once; a model's forward pass outweighs the decoding that waits here.
_PILLOW = threading.Lock()


@dataclass(frozen=True)
class ImageLimits:
    """Bounds that hold before anything is decoded. Pillow's own bound on pixels holds as well."""

    file_bytes: int = 200_000_000  # a file of this size or more is refused
    pixels: int = 178_956_970  # more are refused; where Pillow sees a decompression bomb


@dataclass(frozen=True)
class DecodedImage:
    """Upright RGB pixels; `digest` is the sha256 of the file, or of a Pillow image's own pixels."""

    image: Image.Image
    digest: str  # hex
    name: str  # for messages


def decode(image: ImageInput, limits: ImageLimits = ImageLimits()) -> DecodedImage:
    """Decode one image; an animation gives its first frame, a Pillow image is left as it was.

    Raises:
        ImageTooLarge: the file's bytes or the header's pixels exceed `limits`.
        ImageUnreadable: missing, a folder, empty, truncated, damaged, or not an image.
    """
    name = _name(image)
    if isinstance(image, Image.Image):
        upright = _upright(image, name, limits)
        return DecodedImage(upright, _pixel_digest(upright), name)
    data = image if isinstance(image, bytes) else _read(image, name, limits)
    if len(data) >= limits.file_bytes:
        raise _too_many_bytes(len(data), name, limits)
    if not data:
        raise ImageUnreadable(name, "it is empty")
    return DecodedImage(_upright(data, name, limits), hashlib.sha256(data).hexdigest(), name)


def _name(image: object) -> str:
    if isinstance(image, Image.Image):
        filename = getattr(image, "filename", "")
        return filename if isinstance(filename, str) and filename else "<image>"
    if isinstance(image, bytes):
        return "<bytes>"
    if isinstance(image, (str, os.PathLike)):
        return os.fsdecode(image)
    raise ImageUnreadable(
        f"<{type(image).__name__}>", "an image is given as a path, as bytes or as a Pillow image"
    )


def _read(path: str | os.PathLike[str], name: str, limits: ImageLimits) -> bytes:
    try:
        found = os.stat(path)
        if stat.S_ISDIR(found.st_mode):
            raise ImageUnreadable(name, "it is a folder")
        if not stat.S_ISREG(found.st_mode):  # a pipe would block, a device may never end
            raise ImageUnreadable(name, "it is not a regular file")
        if found.st_size >= limits.file_bytes:
            raise _too_many_bytes(found.st_size, name, limits)
        with open(path, "rb") as file:
            return file.read(limits.file_bytes)  # bounded, should the file grow meanwhile
    except ImageError:
        raise
    except FileNotFoundError as error:
        url = name.startswith(("http://", "https://", "data:"))
        why = "it is a URL; download it first" if url else "there is no such file"
        raise ImageUnreadable(name, why) from error
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        raise ImageUnreadable(name, getattr(error, "strerror", None) or str(error)) from error


def _too_many_bytes(found: int, name: str, limits: ImageLimits) -> ImageTooLarge:
    return ImageTooLarge(name, f"{found} bytes", f"less than {limits.file_bytes} bytes")


def _upright(source: bytes | Image.Image, name: str, limits: ImageLimits) -> Image.Image:
    """Check the header, decode, turn as EXIF says, convert to RGB; never `source` itself."""
    try:
        with _PILLOW, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(source)) if isinstance(source, bytes) else source
            _check_header(image, name, limits)
            upright = ImageOps.exif_transpose(image)  # decodes, and always copies
            # transformers' processors paint a Pillow image's transparent parts white, though its
            # load_image drops the alpha channel of a file: each kind is treated as it is there.
            transparent = "A" in upright.getbands() or upright.info.get("transparency") is not None
            if isinstance(source, Image.Image) and transparent:
                return on_white(upright)
            return upright if upright.mode == "RGB" else upright.convert("RGB")
    except ImageError:
        raise
    except Image.DecompressionBombError as error:
        bound = 2 * (Image.MAX_IMAGE_PIXELS or 0)  # Pillow warns at the bound, refuses at twice it
        limit = min(limits.pixels, bound)
        raise ImageTooLarge(name, f"more than {bound} pixels", f"{limit} pixels") from error
    except UnidentifiedImageError as error:
        why = "it is cut short, or not an image in a format that Pillow reads"
        raise ImageUnreadable(name, why) from error
    except Exception as error:  # Pillow's decoders raise nearly any type on damaged data
        why = " ".join(str(error).split()) or type(error).__name__
        raise ImageUnreadable(name, f"its data is damaged or unsupported ({why})") from error


def on_white(image: Image.Image) -> Image.Image:
    """RGB with the transparent parts painted white, as transformers' convert_to_rgb does it."""
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")


def _check_header(image: Image.Image, name: str, limits: ImageLimits) -> None:
    if image.format == "EPS":
        raise ImageUnreadable(name, "EPS is a program for Ghostscript, which is not run")
    if image.width * image.height > limits.pixels:
        found = f"{image.width} x {image.height} pixels"
        raise ImageTooLarge(name, found, f"{limits.pixels} pixels")
    if image.width == 0 or image.height == 0:
        raise ImageUnreadable(name, f"it has no pixels ({image.width} x {image.height})")


def _pixel_digest(image: Image.Image) -> str:
    # A transparent colour outlives the conversion as metadata, and preprocessing honours it.
    head = (image.mode, image.size, image.info.get("transparency"))
    digest = hashlib.sha256(repr(head).encode())
    digest.update(image.tobytes())
    return digest.hexdigest()
