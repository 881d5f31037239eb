"""All questions about one picture in one sequence, so that its visual tokens are computed once.

A row is `prefix | question answer | question answer | ...`: every segment sees the prefix and
itself, and its positions go on from the prefix, as if it stood there alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

ANSWER = "{answer}<|im_end|>"
IGNORE = -100
Encode = Callable[[str], list[int]]


@dataclass(frozen=True)
class Layout:
    """A prompt, as the checkpoint's processor and template write it: `before`, the visual tokens, `ask`."""

    before: str
    ask: str  # with {question}


LLAVA = Layout("<|im_start|>user\n", "\n{question}<|im_end|>\n<|im_start|>assistant\n")
BLIP2 = Layout("", "<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n")


@dataclass(frozen=True)
class Packed:
    """A batch of rows; `image_at` is where the visual tokens go, the same in each row."""

    ids: torch.Tensor  # [rows, length] int64; 0 at the visual tokens
    labels: torch.Tensor  # [rows, length] int64; the token that each place must predict
    positions: torch.Tensor  # [rows, length] int64
    segments: torch.Tensor  # [rows, length] int64; 0 is the prefix, -1 is padding
    image_at: slice

    def mask(self, dtype: torch.dtype) -> torch.Tensor:
        """The additive attention mask [rows, 1, length, length]."""
        seg = self.segments
        length = seg.shape[1]
        order = torch.ones(length, length, dtype=torch.bool).tril()
        seen = order & ((seg[:, None, :] == 0) | (seg[:, None, :] == seg[:, :, None]))
        mask = torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
        return mask[:, None]


def pack(
    rows: Sequence[Sequence[tuple[str, str]]],
    encode: Encode,
    image_tokens: int,
    layout: Layout = LLAVA,
) -> Packed:
    """Pack (question, answer) pairs, one row a picture."""
    prefix = encode(layout.before)
    start, end = len(prefix), len(prefix) + image_tokens
    built = []
    for pairs in rows:
        ids = prefix + [0] * image_tokens
        labels, positions, segments = [IGNORE] * end, list(range(end)), [0] * end
        for number, (question, answer) in enumerate(pairs, 1):
            asked = encode(layout.ask.format(question=question))
            answered = encode(ANSWER.format(answer=answer))
            ids += asked + answered
            # a place's label is the next token; the last one of the segment predicts nothing
            labels += [IGNORE] * (len(asked) - 1) + answered + [IGNORE]
            positions += range(end, end + len(asked) + len(answered))
            segments += [number] * (len(asked) + len(answered))
        built.append((ids, labels, positions, segments))
    length = max(len(ids) for ids, *_ in built)
    columns = [
        torch.tensor([c + [filler] * (length - len(c)) for c in column])
        for column, filler in zip(zip(*built, strict=True), (0, IGNORE, 0, -1), strict=True)
    ]
    return Packed(columns[0], columns[1], columns[2], columns[3], slice(start, end))
