"""Pictures to visual tokens, or to what a language model attends to, and a cache of what they gave."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from vlm_edge.runtime.engine import Engine
from vlm_edge.runtime.manifest import ImageSettings
from vlm_edge.runtime.picture import Picture
from vlm_edge.runtime.preprocess import preprocess
from vlm_edge.runtime.tiling import Tiler
from vlm_edge.runtime.timings import Stopwatch

CACHE_BYTES = 64 << 20  # of encoded pictures kept for further questions
# Visual tokens float32 [tokens, width]; or keys and values by name, float32 [kv_heads, tokens, head_dim].
Encoded = np.ndarray | dict[str, np.ndarray]


class ImageEncoder:
    """What a bundle does with pictures.

    Kept by a picture's key is what further questions need: its visual tokens; the keys and values that
    they become, where the language model attends to pictures; or, where the connector reads the
    instruction too (InstructBLIP), the vision features, which every question shares.

    Args:
        engines: vision, connector and media_kv, of which a bundle may lack the last two.
        instructed: does the connector read the instruction?
    """

    def __init__(
        self,
        engines: Mapping[str, Engine],
        settings: ImageSettings,
        tiler: Tiler,
        instructed: bool,
    ) -> None:
        self._vision, self._connector = engines["vision"], engines.get("connector")
        self._media_kv = engines.get("media_kv")
        self._settings, self._tiler, self._instructed = settings, tiler, instructed
        self._kept: OrderedDict[str, Encoded] = OrderedDict()

    def pixels(self, picture: Picture) -> np.ndarray:
        """float32 [tiles, 3, height, width] as the checkpoint's processor makes them."""
        return preprocess(picture.decoded.image, self._settings, picture.plan.sheets)

    def encode(
        self,
        picture: Picture,
        instruction: Sequence[int] | None = None,
        watch: Stopwatch | None = None,
    ) -> Encoded:
        """A picture as the language model takes it.

        Args:
            instruction: token ids that the connector reads beside the picture, where it reads any.
            watch: gets what the stages cost; nothing for what the cache had.
        """
        watch = watch or Stopwatch()
        kept = self._kept.get(picture.key)
        if kept is not None:
            self._kept.move_to_end(picture.key)
        if self._instructed:
            if not isinstance(kept, np.ndarray):
                kept = np.stack(list(self._features(picture, watch)))
                self._keep(picture, kept)
            return self._tokens(picture, kept, instruction, watch)
        if kept is None:
            kept = self._tokens(picture, self._features(picture, watch), None, watch)
            if self._media_kv is not None:
                with watch.stage("connector"):
                    found = self._media_kv.run({"image_features": kept[None]})
                kept = {name: array[0] for name, array in found.items()}
            self._keep(picture, kept)
        return kept

    def clear(self) -> None:
        """Forget all pictures, so that the next use encodes them again."""
        self._kept.clear()

    def _features(self, picture: Picture, watch: Stopwatch) -> Iterator[np.ndarray]:
        """Vision features [tokens, width], tile by tile."""
        with watch.stage("preprocess"):
            pixels = self.pixels(picture)
        for feeds in picture.plan.vision_inputs(pixels):
            with watch.stage("vision"):
                features = self._vision.run(feeds)["features"]
            yield from features

    def _tokens(
        self,
        picture: Picture,
        features: Iterator[np.ndarray] | np.ndarray,
        instruction: Sequence[int] | None,
        watch: Stopwatch,
    ) -> np.ndarray:
        """Visual tokens float32 [tokens, width]; of a bundle without a connector the features."""
        more = {}
        if instruction is not None:
            more["instruction_ids"] = np.array([instruction], np.int64)
        tiles = []
        for tile in features:
            if self._connector is None:
                tiles.append(tile[None])
                continue
            with watch.stage("connector"):
                feeds = {"features": tile[None], **more}
                tiles.append(self._connector.run(feeds)["image_features"])
        with watch.stage("connector"):
            return self._tiler.assemble(picture.plan, np.concatenate(tiles))

    def _keep(self, picture: Picture, encoded: Encoded) -> None:
        self._kept[picture.key] = encoded
        while len(self._kept) > 1 and sum(map(_bytes, self._kept.values())) > CACHE_BYTES:
            self._kept.popitem(last=False)


def _bytes(encoded: Encoded) -> int:
    arrays = encoded.values() if isinstance(encoded, dict) else [encoded]
    return sum(array.nbytes for array in arrays)
