"""What the frozen language model says to packed rows: logits, exact answers, validation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from vlm_edge.training.data import Picture
from vlm_edge.training.frozen import Frozen
from vlm_edge.training.packing import IGNORE, LLAVA, Layout, Packed, pack


def answer_logits(
    frozen: Frozen, packed: Packed, image: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [answers, vocab] at the places that predict an answer, and the right tokens [answers].

    `image` is the connector's output [rows, tokens, width].
    """
    embeds = frozen.embed(packed.ids)  # [rows, length, width]
    at = packed.image_at
    embeds = torch.cat([embeds[:, : at.start], image.to(embeds.dtype), embeds[:, at.stop :]], 1)
    states = frozen.language(
        inputs_embeds=embeds,
        attention_mask=packed.mask(embeds.dtype),
        position_ids=packed.positions,
        use_cache=False,
    ).last_hidden_state
    asked = packed.labels != IGNORE  # the head is costly: only where there is a label
    return states[asked] @ frozen.table.T, packed.labels[asked]


@torch.no_grad()
def exact(
    frozen: Frozen,
    connector: nn.Module,
    features: torch.Tensor,
    rows: Sequence[Sequence[tuple[str, str]]],
    layout: Layout = LLAVA,
) -> list[list[bool]]:
    """Which questions about `features` [rows, tokens, features] are answered exactly.

    Free greedy decoding gives the right answer if and only if every right token is the most
    likely one after the right tokens before it, so one forward pass decides.
    """
    image = connector(features.float())
    packed = pack(rows, frozen.encode, image.shape[1], layout)
    logits, labels = answer_logits(frozen, packed, image)
    hit = torch.ones_like(packed.labels, dtype=torch.bool)
    hit[packed.labels != IGNORE] = logits.argmax(-1) == labels
    return [
        [bool(hit[r][packed.segments[r] == n].all()) for n in range(1, len(pairs) + 1)]
        for r, pairs in enumerate(rows)
    ]


def validate(
    frozen: Frozen,
    connector: nn.Module,
    features: torch.Tensor,
    pictures: Sequence[Picture],
    layout: Layout = LLAVA,
) -> dict[str, float]:
    """Accuracy on the pictures' own questions, open and yes/no apart."""
    right: dict[str, list[bool]] = {"open": [], "yes_no": []}
    for start in range(0, len(pictures), 8):
        chosen = pictures[start : start + 8]
        rows = [list(p.open + p.yes_no[:4]) for p in chosen]
        found = exact(frozen, connector, features[start : start + 8], rows, layout)
        for picture, hits in zip(chosen, found, strict=True):
            right["open"] += hits[: len(picture.open)]
            right["yes_no"] += hits[len(picture.open) :]
    return {kind: sum(hits) / max(len(hits), 1) for kind, hits in right.items()}
