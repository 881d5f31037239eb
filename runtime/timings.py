"""What one answer cost, stage by stage."""

from __future__ import annotations

import time
from dataclasses import dataclass


@dataclass(frozen=True)
class Timings:
    """Wall times in milliseconds, and the counts that turn them into rates.

    Attributes:
        preprocess_ms: decoding, resizing and normalising all images.
        vision_ms, connector_ms: engines, over all images; 0 for images that were encoded before.
        prefill_ms: prompt into the cache, first token chosen.
        decode_ms: all further tokens.
        ttft_ms: from the call to the first token, everything included.
        prompt_tokens: in the prompt, visual ones included.
        prefilled_tokens: of these, computed now; a conversation re-uses the rest from its cache.
        new_tokens: generated.
        images: in the prompt.
    """

    preprocess_ms: float
    vision_ms: float
    connector_ms: float
    prefill_ms: float
    decode_ms: float
    ttft_ms: float
    prompt_tokens: int
    prefilled_tokens: int
    new_tokens: int
    images: int

    @property
    def prefill_tokens_per_s(self) -> float:
        return 1000 * self.prefilled_tokens / self.prefill_ms if self.prefill_ms else 0.0

    @property
    def decode_tokens_per_s(self) -> float:
        """Tokens after the first, per second; 0 where there is only one."""
        return 1000 * (self.new_tokens - 1) / self.decode_ms if self.new_tokens > 1 else 0.0


class Stopwatch:
    """Adds up milliseconds by stage."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.spent: dict[str, float] = {}

    def stage(self, name: str) -> _Stage:
        """`with watch.stage("decode"):` adds what the block takes, however it ends."""
        return _Stage(self.spent, name)

    def elapsed_ms(self) -> float:
        return 1000 * (time.perf_counter() - self.start)


class _Stage:
    """A class, because a generator's context manager costs a decode step twice as much."""

    def __init__(self, spent: dict[str, float], name: str) -> None:
        self._spent, self._name = spent, name

    def __enter__(self) -> None:
        self._begin = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        passed = 1000 * (time.perf_counter() - self._begin)
        self._spent[self._name] = self._spent.get(self._name, 0.0) + passed
