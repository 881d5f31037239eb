"""What a language part is calibrated on and judged by: its inputs, and the logits that follow from it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from vlm_edge.calibration.data import evenly
from vlm_edge.runtime.feeds import prefill_feeds
from vlm_edge.runtime.manifest import DecoderSettings

Arrays = Mapping[str, np.ndarray]  # a graph's inputs or outputs, by name
LAST = 32  # positions of a prompt whose logits are compared


def own_logits(outputs: Arrays) -> np.ndarray:
    return outputs["logits"][0]


@dataclass(frozen=True)
class Example:
    """One thing that a language part reads.

    Attributes:
        embeds: inputs_embeds float32 [1, n, width].
        constants: inputs that follow neither from it nor from positions (an encoder-decoder's keys and
            values of the prompt), by name; made anew for each call, because they may be large.
        logits: from the part's outputs, float32 [positions, vocab]: those of the tokens by which the part
            is judged.
    """

    embeds: np.ndarray
    constants: Callable[[], Arrays] = dict
    logits: Callable[[Arrays], np.ndarray] = own_logits

    def feeds(self, settings: DecoderSettings, states: np.ndarray | None = None) -> Arrays:
        """Every input that the part, one of its layers or what follows them may have.

        Args:
            settings: of the language model.
            states: float32 [1, n, width] in the place of `embeds`.
        """
        count = self.embeds.shape[1]
        return {
            **prefill_feeds(settings, self.embeds if states is None else states),
            **self.constants(),
            "logit_positions": np.arange(max(0, count - LAST), count),
        }


@dataclass(frozen=True)
class Examples:
    """Of one part.

    Attributes:
        settings: of the language model.
        used: what sets something.
        held_out: what sets nothing and measures the error.
    """

    settings: DecoderSettings
    used: Sequence[Example]
    held_out: Sequence[Example]

    @classmethod
    def split(
        cls, settings: DecoderSettings, every: Sequence[Example], held_out: Sequence[int]
    ) -> Examples:
        """With those at the indices `held_out` held out."""
        used = [example for index, example in enumerate(every) if index not in held_out]
        return cls(settings, used, [every[index] for index in held_out])

    def thinned(self, most: int) -> Examples:
        """At most so many that are used, and half as many that are held out, taken evenly."""
        used, held_out = evenly(self.used, most), evenly(self.held_out, most // 2)
        return Examples(self.settings, used, held_out)

    def __iter__(self) -> Iterator[Example]:
        """Those that are used, then those that are held out."""
        return iter((*self.used, *self.held_out))
