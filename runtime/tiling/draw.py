"""A tiling as text: each sheet in its proportions with the borders of its tiles, padding and overlaps.

Tiles are numbered as the vision encoder gets them. A character is taken to be twice as high as wide.
"""

from __future__ import annotations

import numpy as np

from vlm_edge.runtime.manifest import ImageSettings
from vlm_edge.runtime.preprocess import resized
from vlm_edge.runtime.tiling.plan import Sheet, TilePlan
from vlm_edge.runtime.tiling.settings import Size

WIDTH, HEIGHT = 76, 25  # characters; more only where tiles would become smaller than LEAST
TILE, LEAST = 16, 4  # columns of a tile: as it is drawn where there is room, and at least
GAP = 3  # columns between sheets
UP, DOWN, LEFT, RIGHT = 1, 2, 4, 8
LINES = " ╵╷│╴┘┐┤╶└┌├─┴┬┼"  # by the directions in which lines leave a character
PADDING, OVERLAP = "╱", "░"


def draw(plan: TilePlan, image: ImageSettings) -> str:
    """The drawing, and a line for each sheet with its sizes in pixels (width x height).

    Args:
        image: how the model's processor makes a single tile of a picture.
    """
    sheets = [s or _single_tile(plan.width, plan.height, image) for s in plan.sheets]
    scale = _scale(sheets)
    overview = any(name == "overview" for name, _ in plan.terms)
    first, drawings, captions = 1, [], []
    for sheet in sheets:
        drawings.append(_drawn(sheet, scale, first))
        captions.append((_numbers(first, sheet.count), _caption(sheet, overview)))
        first += sheet.count
    indent = max(len(numbers) for numbers, _ in captions)
    lines = _beside(drawings)
    lines += [f"{numbers:>{indent}}  {text}" for numbers, text in captions]
    shown = "".join(lines[: -len(captions)])
    legend = {PADDING: "padding", OVERLAP: "seen by several tiles"}
    lines += [f"{mark * 2:>{indent}}  {what}" for mark, what in legend.items() if mark in shown]
    return "\n".join(lines)


def _single_tile(width: int, height: int, image: ImageSettings) -> Sheet:
    """A single tile as `preprocess` makes it; the offset is negative where the picture is cut off."""
    canvas, scaled, offset = (height, width), (height, width), (0, 0)
    if image.pad_to_square is not None:
        side = max(canvas)
        canvas, offset = (side, side), ((side - height) // 2, (side - width) // 2)
    if image.resize is not None:
        high, wide = resized(canvas[1], canvas[0], image.resize)
        down, across = high / canvas[0], wide / canvas[1]
        scaled = round(scaled[0] * down), round(scaled[1] * across)
        canvas, offset = (high, wide), (round(offset[0] * down), round(offset[1] * across))
    if image.crop is not None:
        top, left = (canvas[0] - image.crop[0]) // 2, (canvas[1] - image.crop[1]) // 2
        canvas, offset = image.crop, (offset[0] - top, offset[1] - left)
    resample = "nearest" if image.resize is None else image.resize.resample
    return Sheet((scaled,), canvas, offset, (1, 1), canvas, resample)


def _scale(sheets: list[Sheet]) -> float:
    """Pixels of a column; a row has twice as many."""
    tile = max(sheets, key=lambda sheet: sheet.count).tile
    room = WIDTH - (len(sheets) - 1) * GAP - len(sheets)
    wide = sum(sheet.canvas[1] for sheet in sheets) / room
    high = max(sheet.canvas[0] for sheet in sheets) / 2 / HEIGHT
    columns = max(LEAST, min(TILE, int(tile[1] / max(wide, high))))
    return tile[1] / (columns - columns % 2)  # even, so that square tiles have whole rows


def _drawn(sheet: Sheet, scale: float, first: int) -> list[str]:
    """The sheet's lines of characters, its tiles numbered from `first`."""
    rows, down = _edges(sheet.canvas[0], sheet.tiles[0], sheet.stride[0], scale * 2)
    columns, across = _edges(sheet.canvas[1], sheet.tiles[1], sheet.stride[1], scale)
    bits = np.zeros((max(down) + 1, max(across) + 1), np.int64)
    y, x = _centres(rows, down), _centres(columns, across)
    covered = np.zeros(bits.shape, np.int64)
    numbers: dict[tuple[int, int], str] = {}
    for index in range(sheet.count):
        row, column = divmod(index, sheet.tiles[1])
        begin = row * sheet.stride[0], column * sheet.stride[1]
        top, bottom = (down[rows.index(begin[0] + edge)] for edge in (0, sheet.tile[0]))
        left, right = (across[columns.index(begin[1] + edge)] for edge in (0, sheet.tile[1]))
        bits[top:bottom, (left, right)] |= DOWN
        bits[top + 1 : bottom + 1, (left, right)] |= UP
        bits[(top, bottom), left:right] |= RIGHT
        bits[(top, bottom), left + 1 : right + 1] |= LEFT
        covered[top:bottom, left:right] += 1
        numbers[(top + bottom) // 2, (left + right) // 2] = str(first + index)
    inside_y = (sheet.offset[0] <= y) & (y <= sheet.offset[0] + sheet.scaled[-1][0])
    inside_x = (sheet.offset[1] <= x) & (x <= sheet.offset[1] + sheet.scaled[-1][1])
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


def _caption(sheet: Sheet, overview: bool) -> str:
    rows, columns = sheet.tiles
    what = "overview" if overview else "one tile"
    if sheet.count > 1:
        what = f"{rows}x{columns} tiles"
    text = f"{what} of {_size(sheet.tile)} pixels: the picture scaled to {_size(sheet.scaled[-1])}"
    if any(scaled < canvas for scaled, canvas in zip(sheet.scaled[-1], sheet.canvas, strict=True)):
        text += f" on {_size(sheet.canvas)}"
    missing = _cut(sheet)
    if missing:
        text += f", {missing} cut off"
    shared = sheet.tile[0] - sheet.stride[0], sheet.tile[1] - sheet.stride[1]
    if sheet.count > 1 and any(shared):
        text += f", neighbours share {_size(shared)}"
    return text


def _cut(sheet: Sheet) -> str:
    """Pixels of the scaled picture that no tile shows."""
    high, wide = (max(0, sheet.scaled[-1][i] - sheet.canvas[i]) for i in (0, 1))
    parts = [f"{n} of its {what}" for n, what in ((high, "rows"), (wide, "columns")) if n]
    return " and ".join(parts)


def _size(size: Size) -> str:
    """Width x height, as picture sizes are written."""
    return f"{size[1]}x{size[0]}"
