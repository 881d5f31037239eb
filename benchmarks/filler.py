"""A prompt of exactly so many tokens: words are added until the count is right."""

from __future__ import annotations

from collections.abc import Callable

from vlm_edge.errors import SettingError

WORDS = (" the", " a", " I", ".", " 1", "a")  # one of them is one token in nearly every tokenizer


def fill(prompt: str, total: int, count: Callable[[str], int]) -> str:
    """`prompt` with words added, so that the whole request has `total` tokens.

    `count` gives the tokens of the whole request with a prompt: template and visual ones included.

    Raises:
        SettingError: the prompt has more tokens already, or no added text gives the count.
    """
    bare = count(prompt)
    if bare > total:
        raise SettingError(
            f"--prompt-tokens {total} is too small: image, template and question take {bare}"
        )
    for word in WORDS:
        times = total - bare
        for _ in range(4):  # the first word or a join may count otherwise than the rest
            filled = prompt + word * times
            off = count(filled) - total
            if off == 0:
                return filled
            times -= off
            if times < 1:
                break
    raise SettingError(
        f"no filler text gives exactly {total} tokens with this tokenizer; try a number near it"
    )
