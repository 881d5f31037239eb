"""Visual tokens spliced into the embedded prompt, and prompts compared position by position."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from vlm_edge.errors import VisualTokenMismatch


class TokenTable(Protocol):
    """Anything with the embedding rows of token ids."""

    def rows(self, ids: np.ndarray) -> np.ndarray:
        """float32 [n, width] of int64 [n]."""


def splice(
    ids: np.ndarray,
    image_token_id: int,
    embeddings: TokenTable,
    features: Sequence[np.ndarray],
    terms: Sequence[int] | None = None,
) -> np.ndarray:
    """inputs_embeds float32 [1, n, width].

    Args:
        ids: int64 [n], with `image_token_id` at every visual place.
        features: visual tokens [tokens, width] of each image, in the order of their places.
        terms: what the visual tokens are made of, for the message; None is their number by image.

    Raises:
        VisualTokenMismatch: there are more or fewer places than visual tokens.
    """
    places = ids == image_token_id
    counts = [len(tokens) for tokens in features]
    if int(places.sum()) != sum(counts):
        raise VisualTokenMismatch(int(places.sum()), counts if terms is None else terms)
    # The image token itself may have no row in the table (an id beyond the vocabulary).
    embeds = embeddings.rows(np.where(places, 0, ids))
    if counts:
        embeds[places] = np.concatenate(features)
    return embeds[None]


def prefix_keys(
    ids: np.ndarray, image_token_id: int, images: Sequence[tuple[str, int]]
) -> np.ndarray:
    """int64 [n]: a number for what stands at each position; equal numbers mean equal embeddings.

    Text positions keep their token id; the places of an image (digest, tokens) get a negative number
    made of its content's digest, since the placeholder alone does not tell two images apart.
    """
    keys = ids.copy()
    if images:
        marks = [np.full(count, -1 - int(digest[:15], 16), np.int64) for digest, count in images]
        keys[ids == image_token_id] = np.concatenate(marks)
    return keys


def shared_prefix(cached: np.ndarray, keys: np.ndarray) -> int:
    """Positions of `keys` that the cache holds already; the last one is always computed again,
    because its logits are wanted."""
    length = min(len(cached), len(keys) - 1)
    differs = np.flatnonzero(cached[:length] != keys[:length])
    return int(differs[0]) if len(differs) else length
