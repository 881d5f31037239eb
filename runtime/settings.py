"""How an answer is generated: the keyword arguments of `generate`, `stream` and `Chat.ask`."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass

from vlm_edge.errors import SettingError
from vlm_edge.runtime.tiling.plan import TileLimits


@dataclass(frozen=True)
class Settings:
    """Checked when made.

    Attributes:
        max_new_tokens: at most so many.
        temperature: 0 is greedy.
        top_p, top_k: nucleus and number of candidates; 1.0 and 0 switch them off.
        repetition_penalty: above 1 discourages tokens seen before; None takes the checkpoint's own.
        stop: text(s) that end the answer and are not part of it.
        ignore_eos: go on to max_new_tokens whatever the model says.
        seed: of the sampling; the same seed gives the same answer.
        max_tiles, max_visual_tokens: of each image (`tiling.plan.TileLimits`).

    Raises:
        SettingError: a number of tokens or tiles that is not a positive whole number (the others are
            checked by the sampler).
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float | None = None
    stop: str | Sequence[str] | None = None
    ignore_eos: bool = False
    seed: int | None = None
    max_tiles: int | None = None
    max_visual_tokens: int | None = None

    def __post_init__(self) -> None:
        count = self.max_new_tokens
        try:
            positive = operator.index(count) > 0 and not isinstance(count, bool)
        except TypeError:
            positive = False
        if not positive:
            raise SettingError(
                f"max_new_tokens = {count!r}; it should be a whole number, at least 1"
            )
        _ = self.limits  # checked when made

    @property
    def limits(self) -> TileLimits:
        """The bounds on each image."""
        return TileLimits(self.max_tiles, self.max_visual_tokens)
