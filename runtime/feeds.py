"""The inputs of an llm graph that follow from positions alone: masks, positions, an empty cache."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import DTypeLike

from vlm_edge.runtime.manifest import DecoderSettings

MASKED = np.finfo(np.float32).min  # finite: some engines make NaN of a row of infinities


def windows(settings: DecoderSettings) -> dict[str, int | None]:
    """The mask inputs a graph may have, and how many keys each lets a query see (None: all)."""
    return {"attention_mask": None, "sliding_attention_mask": settings.sliding_window}


def causal_mask(queries: np.ndarray, capacity: int, window: int | None) -> np.ndarray:
    """float32 [s, capacity], added to the scores: 0 where a query sees a key, else MASKED.

    Args:
        queries: int64 [s], positions of the queries.
        capacity: keys in the cache, at positions 0, 1, ...
        window: how many of the latest keys a query sees, itself included; None: all.
    """
    keys, queries = np.arange(capacity), queries[:, None]
    seen = keys <= queries
    if window is not None:
        seen &= keys > queries - window
    return np.where(seen, np.float32(0), MASKED)


def empty_cache(
    settings: DecoderSettings, capacity: int, dtypes: Mapping[str, DTypeLike] | None = None
) -> dict[str, np.ndarray]:
    """The cache's arrays by name (`DecoderSettings.cache`), batch 1, with room for `capacity` positions.

    Args:
        dtypes: by name, what a lowered graph takes instead of the portable one's types.
    """
    sizes, dtypes = {"batch": 1, "capacity": capacity}, dtypes or {}
    return {
        spec.name: np.zeros(
            [sizes[d] if isinstance(d, str) else d for d in spec.shape],
            dtypes.get(spec.name, spec.dtype),
        )
        for spec in settings.cache()
    }


def prefill_feeds(settings: DecoderSettings, embeds: np.ndarray) -> dict[str, np.ndarray]:
    """All inputs an llm graph may have, for a whole prompt [1, n, width] and an empty cache of its
    length; the logits asked for are the last position's."""
    count = embeds.shape[1]
    positions = np.arange(count)
    return {
        "inputs_embeds": embeds,
        "positions": positions[None],
        "write_indices": np.zeros(1, np.int64),
        "logit_positions": positions[-1:],
        **{
            name: causal_mask(positions, count, window)[None, None]
            for name, window in windows(settings).items()
        },
        **{f"past.{name}": array for name, array in empty_cache(settings, count).items()},
    }
