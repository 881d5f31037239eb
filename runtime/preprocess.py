"""From RGB pixels to the vision engine's input, tile by tile, as the checkpoint's processor does it.

Source: transformers 5 `PilBackend` (image_processing_backends.py, image_transforms.py), and
`LlavaImageProcessorPil.pad_to_square`. Equal to the bit: geometry is Pillow's own on uint8, and the
two float steps depend on a pixel's value alone, so they are a table of 256 values per channel.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vlm_edge.errors import ImageTooLarge, ImageUnreadable, SettingError
from vlm_edge.runtime.images import ImageLimits, on_white
from vlm_edge.runtime.manifest import ImageSettings, Resize
from vlm_edge.runtime.tiling.plan import Sheet
from vlm_edge.runtime.tiling.settings import Size


def preprocess(
    image: Image.Image, settings: ImageSettings, sheets: Sequence[Sheet | None] = (None,)
) -> NDArray[np.float32]:
    """One RGB image as its tiles: float32 [tiles, 3, height, width], C-contiguous.

    Args:
        sheets: what its tiles are cut from (`tiling.TilePlan`); None is the whole image as one tile.

    Raises:
        ImageUnreadable: `image` is not RGB; `decode` makes it so.
        ImageTooLarge: so narrow that padding or resizing it would exceed the bound on pixels.
        SettingError: the settings give another size than their own height and width.
    """
    if image.mode != "RGB":
        raise ImageUnreadable("<image>", f"its mode is {image.mode}, preprocessing takes RGB")
    check_size(*image.size, settings, sheets, "<image>")
    image = _opaque(image)
    values = _values(settings)  # [3, 256]
    count = sum(1 if sheet is None else sheet.count for sheet in sheets)
    tiles = np.empty((count, 3, settings.height, settings.width), np.float32)
    for tile, pixels in zip(tiles, _pieces(image, settings, sheets), strict=True):
        for channel in range(3):
            # "clip" because numpy buffers `out` under "raise"; a uint8 is never out of range.
            np.take(values[channel], pixels[:, :, channel], out=tile[channel], mode="clip")
    return tiles  # [tiles, 3, height, width]


def check_size(
    width: int, height: int, settings: ImageSettings, sheets: Sequence[Sheet | None], name: str
) -> None:
    """Refuse the strip of 1 x 100000 pixels whose shortest edge is to become 336.

    Raises:
        ImageTooLarge: padded or scaled to one tile, it would exceed the bound on pixels.
    """
    if None not in sheets:
        return  # what tiles are cut from is bounded by its settings
    limit = ImageLimits().pixels
    high, wide = height, width
    if settings.pad_to_square is not None:
        high = wide = max(width, height)
    sizes = [(high, wide)]
    if settings.resize is not None:
        sizes.append(resized(wide, high, settings.resize))
    for high, wide in sizes:
        if high * wide > limit:
            found = f"{width} x {height} pixels, {wide} x {high} once scaled or padded"
            raise ImageTooLarge(name, found, f"{limit} pixels")


def _pieces(
    image: Image.Image, settings: ImageSettings, sheets: Sequence[Sheet | None]
) -> Iterator[NDArray[np.uint8]]:
    """Tiles uint8 [height, width, 3] in order."""
    scaled: dict[tuple[Size, ...], Image.Image] = {(): image}  # by the sizes gone through
    for sheet in sheets:
        if sheet is None:
            yield np.asarray(_framed(image, settings))
            continue
        filter_ = Image.Resampling[sheet.resample.upper()]
        for index, (height, width) in enumerate(sheet.scaled):
            if sheet.scaled[: index + 1] not in scaled:
                before = scaled[sheet.scaled[:index]]
                after = (
                    before
                    if before.size == (width, height)
                    else before.resize((width, height), filter_)
                )
                scaled[sheet.scaled[: index + 1]] = after
        canvas = _on_canvas(scaled[sheet.scaled], sheet)
        (rows, columns), (down, right), (high, wide) = sheet.tiles, sheet.stride, sheet.tile
        for row in range(rows):
            for column in range(columns):
                top, left = row * down, column * right
                piece = canvas[top : top + high, left : left + wide]
                again = sheet.framed and not _fits(piece, settings)
                yield np.asarray(_framed(Image.fromarray(piece), settings)) if again else piece


def _on_canvas(picture: Image.Image, sheet: Sheet) -> NDArray[np.uint8]:
    """The picture on its black canvas, uint8 [height, width, 3]."""
    height, width = sheet.canvas
    if picture.size != (width, height):
        top, left = sheet.offset
        picture = picture.crop((-left, -top, width - left, height - top))
    return np.asarray(picture)


def _fits(piece: NDArray[np.uint8], settings: ImageSettings) -> bool:
    """Would resizing and cropping leave the tile as it is?"""
    size, resize = piece.shape[:2], settings.resize
    return size == (settings.height, settings.width) and (
        resize is None or size == (resize.height, resize.width)
    )


def _framed(image: Image.Image, settings: ImageSettings) -> Image.Image:
    """Padded, resized and cropped to the size of a tile."""
    if settings.pad_to_square is not None:
        image = _pad_to_square(image, settings.pad_to_square)
    if settings.resize is not None:
        image = _resize(image, settings.resize)
    if settings.crop is not None:
        image = _centre_crop(image, *settings.crop)
    if (image.height, image.width) != (settings.height, settings.width):
        raise SettingError(
            f"the image settings give a tile of {image.height} x {image.width} pixels, the vision "
            f"engine takes {settings.height} x {settings.width}; resize or crop must fix the size"
        )
    return image


def _opaque(image: Image.Image) -> Image.Image:
    # A PNG or GIF with one transparent colour is RGB by now, with that colour in `info`:
    # convert_to_rgb paints it white, though load_image has dropped any alpha channel unseen.
    if image.info.get("transparency") is None:
        return image
    return on_white(image)


def _pad_to_square(image: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    if image.width == image.height:
        return image
    side = max(image.size)
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def _resize(image: Image.Image, resize: Resize) -> Image.Image:
    height, width = resized(*image.size, resize)
    return image.resize((width, height), Image.Resampling[resize.resample.upper()])


def resized(width: int, height: int, resize: Resize) -> Size:
    """Height and width that a picture is scaled to."""
    if resize.mode == "exact":
        return resize.height, resize.width
    # get_resize_output_image_size: the long edge is cut, not rounded
    if width <= height:
        return int(resize.width * height / width), resize.width
    return resize.height, int(resize.height * width / height)


def _centre_crop(image: Image.Image, height: int, width: int) -> Image.Image:
    # Floor division, on either sign, is transformers' rounding; Pillow fills the outside with 0.
    top, left = (image.height - height) // 2, (image.width - width) // 2
    return image.crop((left, top, left + width, top + height))


def _values(settings: ImageSettings) -> NDArray[np.float32]:
    """What each of the 256 pixel values becomes in each channel, float32 [3, 256]."""
    values = np.arange(256, dtype=np.float32)
    if settings.rescale_factor is not None:
        # image_transforms.rescale multiplies in float64 and rounds once
        values = (np.arange(256, dtype=np.float64) * settings.rescale_factor).astype(np.float32)
    table = np.tile(values, (3, 1))
    if settings.mean is not None:
        table -= np.array(settings.mean, np.float32)[:, None]
    if settings.std is not None:
        table /= np.array(settings.std, np.float32)[:, None]
    return table
