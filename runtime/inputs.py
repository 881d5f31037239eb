"""What a language model reads of a prompt: embeddings with visual tokens in them, or pictures beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vlm_edge.runtime.encode import Encoded
from vlm_edge.runtime.manifest import DecoderSettings
from vlm_edge.runtime.media import Media, media, position_keys
from vlm_edge.runtime.prompt import BuiltPrompt
from vlm_edge.runtime.splice import TokenTable, prefix_keys, splice


@dataclass(frozen=True)
class PromptInputs:
    """Of one prompt.

    Attributes:
        embeds: float32 [1, n, width].
        media: what its positions attend to besides, where the model attends to pictures.
        keys: int64 [n], a number for all that decides a position's values but what stands before it.
    """

    embeds: np.ndarray
    media: Media | None
    keys: np.ndarray

    def after(self, kept: int) -> PromptInputs:
        """Without the first `kept` positions."""
        rest = None if self.media is None else self.media.of(slice(kept, None))
        return PromptInputs(self.embeds[:, kept:], rest, self.keys[kept:])


def prompt_inputs(
    built: BuiltPrompt,
    encoded: Sequence[Encoded],
    image_token_id: int,
    settings: DecoderSettings,
    table: TokenTable,
) -> PromptInputs:
    """Put a prompt and its encoded pictures together.

    Args:
        encoded: of each picture, in the order of their places (`ImageEncoder.encode`).

    Raises:
        VisualTokenMismatch: there are more or fewer places than visual tokens.
    """
    ids = np.asarray(built.token_ids, np.int64)
    if settings.media is None:
        tokens = [picture for picture in encoded if isinstance(picture, np.ndarray)]
        embeds = splice(ids, image_token_id, table, tokens, built.terms)
        return PromptInputs(embeds, None, prefix_keys(ids, image_token_id, built.visual_keys))
    pictures = [picture for picture in encoded if isinstance(picture, dict)]
    keys = built.visual_keys
    digests, counts = [digest for digest, _ in keys], [count for _, count in keys]
    return PromptInputs(
        table.rows(ids)[None],
        media(ids, image_token_id, settings.media, pictures, counts),
        position_keys(ids, image_token_id, settings.media, digests),
    )
