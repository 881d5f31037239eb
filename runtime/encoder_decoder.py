"""An encoder and a decoder as one language model (T5), on any engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from vlm_edge.errors import EngineFailure
from vlm_edge.runtime.engine import Decoder, Engine
from vlm_edge.runtime.media import Media


class CrossDecoder(Decoder, Protocol):
    """A `Decoder` whose steps also read arrays that stay the same."""

    def read(self, constants: dict[str, np.ndarray]) -> None:
        """From now on every step reads these inputs too; float arrays are rounded to the type that the
        graph takes."""


class EncoderDecoder:
    """An encoder-decoder (`engine.Decoder`), batch 1.

    The encoder reads a prompt once, whole, and gives what every layer of the decoder attends to: its keys
    and values stay bound to the decoder's steps until the next prompt.

    Args:
        encoder: inputs_embeds float32 [1, s, width] -> the decoder's `cross.*` (`DecoderSettings.cross`).
        start_token_id: what an answer begins with.
        start_embeds: float32 [width], its row of the token table.
    """

    keeps_prefix = False  # every position of a prompt is encoded in the light of all others

    def __init__(
        self,
        encoder: Engine,
        decoder: CrossDecoder,
        start_token_id: int,
        start_embeds: np.ndarray,
    ) -> None:
        self.encoder, self.decoder = encoder, decoder
        self._start, self._start_embeds = start_token_id, start_embeds

    @property
    def length(self) -> int:
        return self.decoder.length

    @length.setter
    def length(self, length: int) -> None:
        self.decoder.length = length

    @property
    def capacity(self) -> int:
        return self.decoder.capacity

    def history(self, prompt: Sequence[int]) -> list[int]:
        return [self._start]

    def check_room(self, prompt: int, new: int) -> None:
        self.decoder.check_room(1, new)  # the prompt is the encoder's

    def attend(self, media: Media) -> None:
        raise EngineFailure("llm", "an encoder-decoder attends to no pictures")

    def prefill(self, embeds: np.ndarray) -> np.ndarray:
        self.decoder.length = 0
        self.decoder.read(self.encoder.run({"inputs_embeds": embeds}))
        return self.decoder.prefill(self._start_embeds[None, None])

    def decode(self, embeds: np.ndarray) -> np.ndarray:
        return self.decoder.decode(embeds)

    def clear(self) -> None:
        self.decoder.clear()

    def close(self) -> None:
        self.encoder.close()
        self.decoder.close()
