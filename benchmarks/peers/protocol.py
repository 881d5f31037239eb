"""What a file of `engines/` offers, so that one worker and one table serve them all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

Kind = Literal["language", "vision"]
Bits = Literal["fp32", "bf16", "int8", "int4"]  # how weights are stored


@dataclass(frozen=True)
class Generated:
    """A greedy answer and its times.

    Attributes:
        prefill_s: from the prompt to its first new token.
        decode_s: the steps after it, one position each.
        tokens: the first new token and one for every step.
    """

    prefill_s: float
    decode_s: float
    tokens: list[int]


class LanguageModel(Protocol):
    def generate(self, prompt: Sequence[int], steps: int) -> Generated:
        """Prefill a prompt that shares nothing with earlier ones, then take `steps` greedy steps."""


class VisionEncoder(Protocol):
    def encode(self, pixels: np.ndarray) -> np.ndarray:
        """Last hidden states before the final norm, [1, tokens, width], of float32 [1, 3, h, w]."""


class Engine(Protocol):
    """A module of `engines/`."""

    TITLE: str
    PACKAGES: Sequence[str]  # distributions whose versions decide the figures
    VARIANTS: Mapping[Kind, Mapping[str, Bits]]  # how it can hold the weights, by name

    def prepare(self, kind: Kind, source: Path, llava: Path, variant: str, target: Path) -> None:
        """Write the variant into the empty folder `target`, from one of a model's two forms."""

    def load_language(self, target: Path, variant: str, threads: int) -> LanguageModel: ...

    def load_vision(self, target: Path, variant: str, threads: int) -> VisionEncoder: ...
