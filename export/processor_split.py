"""How Idefics3ImageProcessor and SmolVLMImageProcessor (one code under two names) cut a picture into tiles.

Source: transformers' models/idefics3/image_processing_pil_idefics3.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

KINDS = ("Idefics3ImageProcessor", "SmolVLMImageProcessor")
DEFAULTS: dict[str, Any] = {
    "do_resize": True,
    "size": {"longest_edge": 4 * 364},
    "resample": 1,
    "do_image_splitting": True,
    "max_image_size": {"longest_edge": 364},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5] * 3,
    "image_std": [0.5] * 3,
    "do_pad": True,
}
# Padding makes equals of a batch's tiles, and here they are: all are full. Rows and columns are told
# to the processor whatever the file says. Video is another processor's, which is not read.
KEYS = {*DEFAULTS, "do_convert_rgb", "return_row_col_info", "video_sampling"}


class Keys(Protocol):
    """A processor file's keys, defaults filled in."""

    def get(self, key: str) -> Any: ...
    def flag(self, key: str) -> bool: ...
    def refuse(self, key: str, why: str) -> NoReturn: ...


@dataclass(frozen=True)
class SplitSettings:
    """What the processor does before it cuts tiles.

    Attributes:
        tile: side of a tile, pixels.
        longest_edge: pixels that the long edge is first scaled to; None leaves the picture its size.
        split: false makes one tile of the whole picture.
    """

    tile: int
    longest_edge: int | None
    split: bool

    def one_tile(self) -> dict[str, Any]:
        """Keys of a processor that makes one such tile of a picture."""
        size = {"height": self.tile, "width": self.tile}
        return {"do_resize": True, "size": size, "do_pad": False}


def read(keys: Keys) -> SplitSettings:
    """From `size`, `max_image_size`, `do_resize` and `do_image_splitting`.

    Raises:
        UnsupportedConfig: a size that is not a longest edge in pixels.
    """
    return SplitSettings(
        tile=_longest_edge(keys, "max_image_size"),
        longest_edge=_longest_edge(keys, "size") if keys.flag("do_resize") else None,
        split=keys.flag("do_image_splitting"),
    )


def _longest_edge(keys: Keys, key: str) -> int:
    value = keys.get(key)
    edge = value.get("longest_edge") if isinstance(value, dict) and len(value) == 1 else None
    if type(edge) is not int or edge < 1:
        keys.refuse(key, "it should be a longest_edge in pixels")
    return edge
