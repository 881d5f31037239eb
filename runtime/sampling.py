"""From logits to the next token, and from text to the point where a stop string ends it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from vlm_edge.errors import EngineFailure, SettingError

GREEDY_BELOW = 1e-6  # a lower temperature would overflow float32 and means argmax anyway
NUCLEUS_START = 512  # likeliest tokens that top_p looks at first; more only where they fall short


class Sampler:
    """Picks tokens as transformers' `generate` does: penalty, then temperature, top_k, top_p.

    Args:
        temperature: 0 is greedy (the first of equal maxima); else logits are divided by it.
        top_p: keep the smallest set of likeliest tokens whose mass reaches it; 1 keeps all.
        top_k: keep this many likeliest tokens and those equal to the last; 0 keeps all.
        repetition_penalty: divides positive and multiplies negative logits of tokens already in
            the prompt or the answer (CTRL, arXiv:1909.05858); 1 changes nothing. Greedy honours it.
        seed: makes the draws repeatable.

    Raises:
        SettingError: a value outside its range.
    """

    def __init__(
        self,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
    ) -> None:
        _check("temperature", temperature, lambda x: 0 <= x < math.inf, "a number, at least 0")
        _check("top_p", top_p, lambda x: 0 < x <= 1, "a number above 0 and at most 1")
        _check("top_k", top_k, _whole, "a whole number, at least 0")
        _check(
            "repetition_penalty",
            repetition_penalty,
            lambda x: 0 < x < math.inf,
            "a number above 0",
        )
        if seed is not None:
            _check("seed", seed, _whole, "a whole number, at least 0")
        self.temperature, self.top_p, self.top_k = float(temperature), float(top_p), int(top_k)
        self.repetition_penalty = float(repetition_penalty)
        self._random = np.random.default_rng(None if seed is None else int(seed))

    def pick(self, logits: np.ndarray, token_ids: Sequence[int]) -> int:
        """The next token.

        Args:
            logits: [vocab], float.
            token_ids: every id so far, of the prompt and of the answer.

        Raises:
            EngineFailure: the logits are NaN or infinite.
        """
        scores = self._penalized(np.asarray(logits, dtype=np.float32), token_ids)
        best = int(scores.argmax())  # a NaN counts as the largest
        if not math.isfinite(scores[best]):
            raise EngineFailure(
                "llm",
                f"its logits hold {scores[best]}; the prompt or a quantized weight overflows, "
                "compare with a bundle of full precision (vlm verify)",
            )
        if self.temperature < GREEDY_BELOW:
            return best
        ids, scores = self._warped(scores)
        mass = np.cumsum(np.exp(scores - scores.max(), dtype=np.float64))
        drawn = int(np.searchsorted(mass, self._random.random() * mass[-1], side="right"))
        return int(ids[min(drawn, len(ids) - 1)])

    def _penalized(self, scores: np.ndarray, token_ids: Sequence[int]) -> np.ndarray:
        if self.repetition_penalty == 1.0 or len(token_ids) == 0:
            return scores
        seen = np.unique(np.asarray(token_ids))
        seen = seen[(seen >= 0) & (seen < len(scores))]
        old = scores[seen]
        scores = scores.copy()
        penalty = self.repetition_penalty
        scores[seen] = np.where(old < 0, old * penalty, old / penalty)
        return scores

    def _warped(self, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The ids that stay, ascending, and their scores after the temperature; [kept] each."""
        scores = scores / np.float32(self.temperature)
        ids = np.arange(len(scores))
        if 0 < self.top_k < len(scores):
            place = len(scores) - self.top_k
            kept = scores >= np.partition(scores, place)[place]
            ids, scores = ids[kept], scores[kept]
        if self.top_p < 1:
            kept = _nucleus(scores, self.top_p)
            ids, scores = ids[kept], scores[kept]
        return ids, scores


def _nucleus(scores: np.ndarray, top_p: float) -> np.ndarray:
    """Indices, ascending, of the likeliest tokens that top_p keeps; at least one, of equals the first.

    A token goes when it and all that are less likely have at most 1 - top_p together (nucleus
    sampling, arXiv:1904.09751, as transformers' TopPLogitsWarper words it).
    """
    weights = np.exp(scores - scores.max())
    weights /= weights.sum()
    total = weights.sum(dtype=np.float64)
    look = NUCLEUS_START
    while True:
        if look < len(weights):
            place = len(weights) - look
            top = np.flatnonzero(weights >= np.partition(weights, place)[place])
        else:
            top = np.arange(len(weights))
        order = top[np.argsort(-weights[top], kind="stable")]
        mass = np.cumsum(weights[order], dtype=np.float64)
        # from_here[i]: the mass of the i-th likeliest and of everything less likely
        from_here = total - np.concatenate(([0.0], mass[:-1]))
        kept = int(np.count_nonzero(from_here.astype(np.float32) > np.float32(1 - top_p)))
        if kept < len(top) or len(top) == len(weights):
            return np.sort(order[: max(kept, 1)])
        look *= 8


def _check(name: str, value: object, allows: Callable[[float], bool], allowed: str) -> None:
    kinds = (int, float, np.integer, np.floating)
    if not isinstance(value, kinds) or isinstance(value, bool) or not allows(float(value)):
        raise SettingError(f"{name} = {value!r}; it should be {allowed}")


def _whole(value: float) -> bool:
    return 0 <= value < math.inf and value == int(value)


class StopStrings:
    """Ends a stream of text at the first stop string, which is not part of the text.

    Text that may be the beginning of a stop string is held back until it is decided.

    Attributes:
        stopped: a stop string has come; everything pushed from then on is dropped.

    Raises:
        SettingError: a stop string is empty.
    """

    def __init__(self, stop: str | Sequence[str] = ()) -> None:
        if not isinstance(stop, (str, Sequence)):
            raise SettingError(f"stop = {stop!r}; it should be a text or a list of texts")
        self._stops = (stop,) if isinstance(stop, str) else tuple(stop)
        for text in self._stops:
            if not isinstance(text, str) or not text:
                raise SettingError(f"stop = {text!r}; it should be a text that is not empty")
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """The part of the text so far that is certain now and has not been returned yet."""
        if self.stopped:
            return ""
        if not self._stops:
            return text
        text, self._held = self._held + text, ""
        # The one that ends first wins: how the text was cut into pieces must not matter.
        found = [(text.find(stop), stop) for stop in self._stops if stop in text]
        if found:
            self.stopped = True
            return text[: min((start + len(stop), start) for start, stop in found)[1]]
        hold = max((_overlap(text, stop) for stop in self._stops), default=0)
        if hold:
            text, self._held = text[:-hold], text[-hold:]
        return text

    def flush(self) -> str:
        """What was held back, when no more text comes."""
        text, self._held = self._held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
