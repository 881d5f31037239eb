"""How MllamaImageProcessor makes tiles of a picture.

Source: transformers' models/mllama/image_processing_pil_mllama.py.
"""

from __future__ import annotations

from typing import Any

from vlm_edge.export.processor_split import Keys

KIND = "MllamaImageProcessor"
DEFAULTS: dict[str, Any] = {
    "do_resize": True,
    "size": {"height": 224, "width": 224},
    "resample": 2,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5] * 3,
    "image_std": [0.5] * 3,
    "do_pad": True,
    "max_image_tiles": 4,
}


def read(keys: Keys) -> int:
    """`max_image_tiles`: tiles that a picture is cut into at most.

    Raises:
        UnsupportedConfig: it is no number of tiles, or a key is set to what the processor itself refuses.
    """
    for key in ("do_resize", "do_pad"):
        if not keys.flag(key):
            keys.refuse(key, f"{KIND} always does it")
    size = keys.get("size")
    if not isinstance(size, dict) or size.get("height") != size.get("width"):
        keys.refuse("size", "tiles are square: it should be a height and a width that are equal")
    tiles = keys.get("max_image_tiles")
    if type(tiles) is not int or tiles < 1:
        keys.refuse("max_image_tiles", "it should be a number of tiles")
    return tiles
