"""A decoded image together with what will be made of it: its tiles and its visual tokens."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

from vlm_edge.runtime.images import DecodedImage, ImageInput, decode
from vlm_edge.runtime.tiling.plan import UNLIMITED, TileLimits, TilePlan, Tiler


@dataclass(frozen=True)
class Picture:
    """One image of a prompt."""

    decoded: DecodedImage
    plan: TilePlan

    @cached_property
    def key(self) -> str:
        """Hex digest of the pixels and the plan: equal keys mean equal visual tokens."""
        return hashlib.sha256(f"{self.decoded.digest} {self.plan}".encode()).hexdigest()


def open_picture(image: ImageInput, tiler: Tiler, limits: TileLimits = UNLIMITED) -> Picture:
    """Decode an image and plan its tiles.

    Raises:
        ImageError: it cannot be read or is too large, or the model cannot keep the limits.
    """
    decoded = decode(image)
    return Picture(decoded, tiler.plan(*decoded.image.size, limits))
