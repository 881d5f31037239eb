"""A tiling as text: each sheet in its proportions with the borders of its tiles, padding and overlaps.

Tiles are numbered as the vision encoder gets them. A character is taken to be twice as high as wide.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from vlm_edge.runtime.tiling.plan import Sheet, TilePlan
from vlm_edge.runtime.tiling.settings import Size

if TYPE_CHECKING:
    from vlm_edge.runtime.manifest import ImageSettings

WIDTH, HEIGHT = 76, 25  # characters; more only where tiles would become smaller than LEAST
TILE, LEAST = 16, 4  # columns of a tile: as it is drawn where there is room, and at least
GAP = 3  # columns between sheets
UP, DOWN, LEFT, RIGHT = 1, 2, 4, 8
LINES = " ╵╷│╴┘┐┤╶└┌├─┴┬┼"  # by the directions in which lines leave a character
PADDING, OVERLAP = "╱", "░"


@dataclass(frozen=True)
class _Box:
    """What is drawn of a sheet, in pixels.

    Attributes:
        canvas: height and width that the tiles are cut from.
        scaled: height and width of the picture.
        offset: of the picture on the canvas, down and right; negative where it is cut off.
        tiles: rows and columns.
        stride: from one tile to the next, down and right.
    """

    canvas: Size
    scaled: Size
    offset: Size
    tiles: Size
    stride: Size

    @property
    def tile(self) -> Size:
        return (
            self.canvas[0] - (self.tiles[0] - 1) * self.stride[0],
            self.canvas[1] - (self.tiles[1] - 1) * self.stride[1],
        )

    @property
    def count(self) -> int:
        return self.tiles[0] * self.tiles[1]


def draw(plan: TilePlan, image: ImageSettings) -> str:
    """The drawing, and a line for each sheet with its sizes in pixels (width x height).

    Args:
        image: how the model's processor makes a single tile of a picture.
    """
    boxes = [_box(plan, sheet, image) for sheet in plan.sheets]
    scale = _scale(boxes)
    overview = any(name == "overview" for name, _ in plan.terms)
    first, drawings, captions = 1, [], []
    for box in boxes:
        drawings.append(_drawn(box, scale, first))
        captions.append((_numbers(first, box.count), _caption(box, overview)))
        first += box.count
    indent = max(len(numbers) for numbers, _ in captions)
    lines = _beside(drawings)
    lines += [f"{numbers:>{indent}}  {text}" for numbers, text in captions]
    shown = "".join(lines[: -len(captions)])
    legend = {PADDING: "padding", OVERLAP: "seen by several tiles"}
    lines += [f"{mark * 2:>{indent}}  {what}" for mark, what in legend.items() if mark in shown]
    return "\n".join(lines)


def _box(plan: TilePlan, sheet: Sheet | None, image: ImageSettings) -> _Box:
    if sheet is not None:
        return _Box(sheet.canvas, sheet.scaled[-1], sheet.offset, sheet.tiles, sheet.stride)
    canvas, scaled, offset = _single_tile(plan.width, plan.height, image)
    return _Box(canvas, scaled, offset, (1, 1), canvas)


def _single_tile(width: int, height: int, image: ImageSettings) -> tuple[Size, Size, Size]:
    """Size of the tile, size of the picture and its offset, as `preprocess` makes a single tile."""
    canvas, scaled, offset = (height, width), (height, width), (0, 0)
    if image.pad_to_square is not None:
        side = max(canvas)
        canvas, offset = (side, side), ((side - height) // 2, (side - width) // 2)
    if image.resize is not None:
        high, wide = image.resize.height, image.resize.width
        if image.resize.mode == "shortest_edge":  # the other edge follows the picture's shape
            if canvas[1] <= canvas[0]:
                high = int(wide * canvas[0] / canvas[1])
            else:
                wide = int(high * canvas[1] / canvas[0])
        down, across = high / canvas[0], wide / canvas[1]
        scaled = round(scaled[0] * down), round(scaled[1] * across)
        canvas, offset = (high, wide), (round(offset[0] * down), round(offset[1] * across))
    if image.crop is not None:
        top, left = (canvas[0] - image.crop[0]) // 2, (canvas[1] - image.crop[1]) // 2
        canvas, offset = image.crop, (offset[0] - top, offset[1] - left)
    return canvas, scaled, offset


def _scale(boxes: list[_Box]) -> float:
    """Pixels of a column; a row has twice as many."""
    tile = max(boxes, key=lambda box: box.count).tile
    room = WIDTH - (len(boxes) - 1) * GAP - len(boxes)
    wide = sum(box.canvas[1] for box in boxes) / room
    high = max(box.canvas[0] for box in boxes) / 2 / HEIGHT
    columns = max(LEAST, min(TILE, int(tile[1] / max(wide, high))))
    return tile[1] / (columns - columns % 2)  # even, so that square tiles have whole rows


def _drawn(box: _Box, scale: float, first: int) -> list[str]:
    """The sheet's lines of characters, its tiles numbered from `first`."""
    rows, down = _edges(box.canvas[0], box.tiles[0], box.stride[0], scale * 2)
    columns, across = _edges(box.canvas[1], box.tiles[1], box.stride[1], scale)
    bits = np.zeros((max(down) + 1, max(across) + 1), np.int64)
    y, x = _centres(rows, down), _centres(columns, across)
    covered = np.zeros(bits.shape, np.int64)
    numbers: dict[tuple[int, int], str] = {}
    for index in range(box.count):
        row, column = divmod(index, box.tiles[1])
        begin = row * box.stride[0], column * box.stride[1]
        top, bottom = (down[rows.index(begin[0] + edge)] for edge in (0, box.tile[0]))
        left, right = (across[columns.index(begin[1] + edge)] for edge in (0, box.tile[1]))
        bits[top:bottom, (left, right)] |= DOWN
        bits[top + 1 : bottom + 1, (left, right)] |= UP
        bits[(top, bottom), left:right] |= RIGHT
        bits[(top, bottom), left + 1 : right + 1] |= LEFT
        covered[top:bottom, left:right] += 1
        numbers[(top + bottom) // 2, (left + right) // 2] = str(first + index)
    inside_y = (box.offset[0] <= y) & (y <= box.offset[0] + box.scaled[0])
    inside_x = (box.offset[1] <= x) & (x <= box.offset[1] + box.scaled[1])
    shown = inside_y[:, None] & inside_x[None]
    fill = np.where(~shown, PADDING, np.where(covered > 1, OVERLAP, " "))
    characters = np.where(bits > 0, np.array(list(LINES))[bits], fill)
    for (row, column), number in numbers.items():
        at = column - (len(number) - 1) // 2
        characters[row, at : at + len(number)] = list(number)
    return ["".join(line) for line in characters]


def _edges(length: int, tiles: int, stride: int, scale: float) -> tuple[list[int], list[int]]:
    """Of tiles along one axis: where they begin and end in pixels, and in characters, two at least
    between different edges, so that narrow overlaps are seen."""
    tile = length - (tiles - 1) * stride
    pixels = sorted({i * stride + edge for i in range(tiles) for edge in (0, tile)})
    places = [0]
    for edge in pixels[1:]:
        places.append(max(round(edge / scale), places[-1] + 2))
    return pixels, places


def _centres(pixels: list[int], places: list[int]) -> np.ndarray:
    """float64: the pixel that each character along an axis stands for."""
    centres = np.interp(np.arange(places[-1] + 1), places, pixels)  # right for those with a line
    for begin, end, first, last in zip(pixels, pixels[1:], places, places[1:], strict=False):
        between = last - first - 1
        centres[first + 1 : last] = begin + (end - begin) * (np.arange(between) + 0.5) / between
    return centres


def _beside(drawings: list[list[str]]) -> list[str]:
    height = max(map(len, drawings))
    blocks = [lines + [" " * len(lines[0])] * (height - len(lines)) for lines in drawings]
    return [(" " * GAP).join(parts).rstrip() for parts in zip(*blocks, strict=True)]


def _numbers(first: int, count: int) -> str:
    return str(first) if count == 1 else f"{first}-{first + count - 1}"


def _caption(box: _Box, overview: bool) -> str:
    rows, columns = box.tiles
    what = "overview" if overview else "one tile"
    if box.count > 1:
        what = f"{rows}x{columns} tiles"
    text = f"{what} of {_size(box.tile)} pixels: the picture scaled to {_size(box.scaled)}"
    if any(scaled < canvas for scaled, canvas in zip(box.scaled, box.canvas, strict=True)):
        text += f" on {_size(box.canvas)}"
    missing = _cut(box)
    if missing:
        text += f", {missing} cut off"
    shared = box.tile[0] - box.stride[0], box.tile[1] - box.stride[1]
    if box.count > 1 and any(shared):
        text += f", neighbours share {_size(shared)}"
    return text


def _cut(box: _Box) -> str:
    """Pixels of the scaled picture that no tile shows."""
    high, wide = (max(0, box.scaled[i] - box.canvas[i]) for i in (0, 1))
    parts = [f"{n} of its {what}" for n, what in ((high, "rows"), (wide, "columns")) if n]
    return " and ".join(parts)


def _size(size: Size) -> str:
    """Width x height, as picture sizes are written."""
    return f"{size[1]}x{size[0]}"
