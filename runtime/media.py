"""Pictures that a language model attends to (Flamingo): who sees which, as masks and gates.

A picture's keys and values are constant, so they are computed once (`media_kv`) and every position reads
those of the pictures it sees.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from vlm_edge.runtime.feeds import MASKED
from vlm_edge.runtime.manifest import MediaSettings

# Added to all scores of a row it leaves nothing of them, so that the row is a mean, as in the reference; of
# one that is MASKED throughout, ONNX Runtime makes zeros.
ALIKE = np.float32(-1e30)

KeysValues = Mapping[
    str, np.ndarray
]  # of one picture, by name, float32 [kv_heads, tokens, head_dim]


@dataclass(frozen=True)
class Media:
    """What the positions of a prompt attend to besides each other.

    Attributes:
        arrays: keys and values of all pictures by name, float32 [1, kv_heads, media, head_dim].
        mask: float32 [n, media], added to the scores.
        gate: float32 [n, 2], factors of the cross-attention's output and of its feed-forward's.
    """

    arrays: dict[str, np.ndarray]
    mask: np.ndarray
    gate: np.ndarray

    def of(self, positions: slice) -> Media:
        """What these positions attend to."""
        return Media(self.arrays, self.mask[positions], self.gate[positions])

    def feeds(self) -> dict[str, np.ndarray]:
        """The graph's inputs by name."""
        return {**self.arrays, "media_mask": self.mask[None, None], "media_gate": self.gate[None]}


def seen(
    ids: np.ndarray, image_token_id: int, settings: MediaSettings, pictures: int
) -> np.ndarray:
    """bool [n, pictures]: which pictures each position of a prompt sees.

    "immediate": the one of the last image token at or before it, and none behind an end token until the
    next picture (IdeficsProcessor; OpenFlamingo's only_attend_immediate_media). "previous": all at or
    before it (OpenFlamingo otherwise). "mllama": those of the last row of image tokens, each from its own
    on (MllamaProcessor).
    """
    places = ids == image_token_id
    latest = np.cumsum(places)[:, None] - 1  # [n, 1]
    index = np.arange(pictures)
    if settings.rule == "previous":
        return latest >= index
    if settings.rule == "mllama":
        row = np.cumsum(np.diff(places, prepend=False) & places)  # [n]: how many have begun
        return (latest >= index) & (row[:, None] == row[places])
    found = latest == index
    if settings.end_token_id is not None:
        ended = np.zeros(pictures + 1, bool)  # by picture, -1 for the text before the first
        for position, token in enumerate(ids):
            picture = int(latest[position, 0])
            if ended[picture]:
                found[position] = False
            ended[picture] |= token == settings.end_token_id
    return found


def media(
    ids: np.ndarray,
    image_token_id: int,
    settings: MediaSettings,
    pictures: Sequence[KeysValues],
    tokens: Sequence[int] | None = None,
) -> Media:
    """All that the graph needs for a prompt.

    Args:
        ids: int64 [n].
        pictures: keys and values of each, in the order of their places; without any there is one position
            of zeros, which nobody sees.
        tokens: how many of each picture's tokens show it, the others being an encoder's empty tiles
            (Llama 3.2 Vision); None: all.
    """
    visible = seen(ids, image_token_id, settings, len(pictures))
    gate = _gate(visible, settings)
    names = [spec.name for spec in settings.arrays()]
    if not pictures:
        nothing = np.zeros((1, settings.kv_heads, 1, settings.head_dim), np.float32)
        return Media(dict.fromkeys(names, nothing), np.full((len(ids), 1), MASKED), gate)
    arrays = {
        name: np.concatenate([picture[name] for picture in pictures], axis=1)[None]
        for name in names
    }
    counts = [picture[names[0]].shape[1] for picture in pictures]
    shown = np.repeat(visible, counts, axis=1)  # [n, media]
    if tokens is not None:
        pairs = zip(counts, tokens, strict=True)
        shown &= np.concatenate([np.arange(count) < own for count, own in pairs])
    if settings.rule == "mllama":  # who sees nothing attends to all, empty tiles too
        shown |= ~visible.any(axis=1, keepdims=True)
    mask = np.where(shown, np.float32(0), MASKED)
    if settings.rule == "previous":
        mask[~visible.any(axis=1)] = ALIKE
    return Media(arrays, mask, gate)


def _gate(visible: np.ndarray, settings: MediaSettings) -> np.ndarray:
    """float32 [n, 2] of bool [n, pictures]."""
    gate = np.ones((len(visible), 2), np.float32)
    any_ = visible.any(axis=1)
    if visible.shape[1] == 0:
        gate[:, 0] = 0
    if settings.rule == "immediate":
        gate[:, 0] = any_
    if settings.rule == "mllama":  # without pictures its layers are left out
        gate[:, 1] = any_
    return gate


def position_keys(
    ids: np.ndarray, image_token_id: int, settings: MediaSettings, digests: Sequence[str]
) -> np.ndarray:
    """int64 [n]: a number for the token at each position and the pictures it sees; equal numbers mean
    that nothing differs but what stands before.

    Args:
        digests: hex, of the prompt's pictures in order.
    """
    visible = seen(ids, image_token_id, settings, len(digests))
    if settings.rule != "immediate":  # a row without any attends to all of them
        visible |= ~visible.any(axis=1, keepdims=True)
    keys = ids.copy()
    for position in np.flatnonzero(visible.any(axis=1)):
        sees = " ".join(d for d, sees in zip(digests, visible[position], strict=True) if sees)
        digest = hashlib.sha256(f"{ids[position]} {sees}".encode()).hexdigest()
        keys[position] = -1 - int(digest[:15], 16)
    return keys
