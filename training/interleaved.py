"""Packed rows whose text has pictures in it: earlier examples, then all questions about the last one.

A row is `example | ... | prefix | question answer | question answer | ...`, as in
``training.packing``, but no visual token stands in it: each place only knows which picture it sees,
the last one before it, as IdeficsProcessor has it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vlm_edge.export.demo_flamingo import AROUND, IMAGE_TOKEN
from vlm_edge.training.data import questions
from vlm_edge.training.packing import ANSWER, IGNORE, Encode, Layout, Packed, pack
from vlm_edge.training.recipe import Album

FLAMINGO = Layout(
    f"<|im_start|>user\n{AROUND}{IMAGE_TOKEN}{AROUND}",
    "{question}<|im_end|>\n<|im_start|>assistant\n",
)
SHOTS = (0.7, 0.15, 0.15)  # how many of the rows have 0, 1, 2 examples


@dataclass(frozen=True)
class Row:
    """Questions about a picture, after examples: one question and its answer about each."""

    features: Sequence[torch.Tensor]  # one a picture [tokens, features], the examples' first
    examples: Sequence[tuple[str, str]]
    pairs: Sequence[tuple[str, str]]

    def before(self) -> str:
        """The text before the questions, as the chat template writes it."""
        turns = [
            FLAMINGO.before + FLAMINGO.ask.format(question=q) + ANSWER.format(answer=a) + "\n"
            for q, a in self.examples
        ]
        return "".join(turns) + FLAMINGO.before


def choose_examples(
    album: Album, shots: int, rng: random.Random
) -> tuple[list[torch.Tensor], list[tuple[str, str]]]:
    """The features of `shots` training pictures, and a question with its answer about each."""
    features: list[torch.Tensor] = []
    pairs: list[tuple[str, str]] = []
    while len(pairs) < shots:
        picture, feature = album.choose(rng)
        told = list(questions(picture, rng, 1, 1))
        if told:
            pairs.append(rng.choice(told))
            features.append(feature)
    return features, pairs


def pack_rows(rows: Sequence[Row], encode: Encode) -> Packed:
    """The rows side by side; those that are shorter are padded at the end."""
    packs = [pack([row.pairs], encode, 0, Layout(row.before(), FLAMINGO.ask)) for row in rows]
    length = max(p.ids.shape[1] for p in packs)

    def side_by_side(name: str, filler: int) -> torch.Tensor:
        return torch.cat(
            [
                torch.nn.functional.pad(column, (0, length - column.shape[1]), value=filler)
                for column in (getattr(p, name) for p in packs)
            ]
        )

    fillers = {"ids": 0, "labels": IGNORE, "positions": 0, "segments": -1}
    return Packed(
        **{name: side_by_side(name, filler) for name, filler in fillers.items()},
        image_at=slice(0, 0),  # no visual tokens
    )


def seen_picture(ids: torch.Tensor, image_id: int) -> torch.Tensor:
    """Which picture each place sees [rows, length]: the last one at or before it, -1 for none."""
    return (ids == image_id).cumsum(1) - 1
