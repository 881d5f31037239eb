"""BLIP-2's stage 1 for the demo: the Q-Former learns to see before the language model is asked.

The stage of arXiv:2301.12597 matches pictures with texts without the language model. Here the texts
are questions and answers: a small reader looks for the question among the visual tokens, and the
token it finds must lie nearest to the right answer's words among all answers', in the language
model's own table of embeddings. So the visual tokens come to say what they see in its words. A
picture costs about a fortieth of what it costs through the language model (10 and 375 ms on one
thread), and the reader is thrown away.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Sequence

import torch
from torch import nn

from vlm_edge.training.data import Picture, questions
from vlm_edge.training.frozen import Frozen
from vlm_edge.training.recipe import Album, Log, learning_rate

ROWS, QUESTIONS = 48, 6  # pictures in a step, open questions about each
RATE = 1e-3  # peak learning rate
READ_WIDTH = 128
TEMPERATURE = 0.07  # of the contrast, at the start; it is learned


def phrase(frozen: Frozen, text: str) -> torch.Tensor:
    """The mean embedding [width] float32 of a text's tokens, as they stand inside a sentence."""
    return frozen.embed(torch.tensor(frozen.encode(" " + text))).float().mean(0)


class Reader(nn.Module):
    """Answers a question by attention over the visual tokens, which are their own values."""

    def __init__(self, frozen: Frozen, answers: Sequence[str]) -> None:
        super().__init__()
        self.frozen = [frozen]  # in a list: not a part of this module
        self.numbers = {answer: number for number, answer in enumerate(answers)}
        bank = torch.stack([phrase(frozen, answer) for answer in answers])
        self.mean = bank.mean(0)  # what all words share tells no answer from another
        self.bank = nn.functional.normalize(bank - self.mean, dim=-1)  # [answers, width]
        width = bank.shape[1]
        self.scale = frozen.word_norm()
        self.ask = nn.Sequential(nn.Linear(width, 256), nn.GELU(), nn.Linear(256, READ_WIDTH))
        self.key = nn.Linear(width, READ_WIDTH)
        self.temperature = nn.Parameter(torch.tensor(TEMPERATURE).log())
        self.phrases: dict[str, torch.Tensor] = {}

    def question(self, text: str) -> torch.Tensor:
        """A question's embedding [width], of norm about one a channel."""
        if text not in self.phrases:
            self.phrases[text] = phrase(self.frozen[0], text) / self.scale * len(self.mean) ** 0.5
        return self.phrases[text]

    def forward(self, tokens: torch.Tensor, asked: Sequence[Sequence[str]]) -> torch.Tensor:
        """Scores [questions, answers] of every row's questions about its tokens [rows, n, width]."""
        texts = torch.stack([self.question(q) for row in asked for q in row])
        row_of = torch.tensor([r for r, row in enumerate(asked) for _ in row])
        keys = self.key(tokens)[row_of]  # [questions, n, READ_WIDTH]
        weights = (keys @ self.ask(texts)[:, :, None] / READ_WIDTH**0.5).softmax(1)
        found = (weights * tokens[row_of]).sum(1)  # [questions, width]
        return nn.functional.normalize(found, dim=-1) @ self.bank.T / self.temperature.exp()


def open_answers(album: Album) -> list[str]:
    """Every answer that the training pictures' open questions have."""
    return sorted(
        {a for pictures, _ in (album.real, album.made) for p in pictures for _, a in p.open}
    )


def contrast(
    frozen: Frozen,
    qformer: nn.Module,
    album: Album,
    rng: random.Random,
    args: argparse.Namespace,
    log: Log,
) -> dict[str, object]:
    """Train the Q-Former with a reader, and say how it was done. `args` has contrast_minutes,
    contrast_steps and every."""
    reader = Reader(frozen, open_answers(album))
    trained = [p for m in (qformer, reader) for p in m.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.01)
    start, step, losses, progress = time.time(), 0, [], 0.0
    while progress < 1:
        step += 1
        progress = max(
            step / args.contrast_steps, (time.time() - start) / 60 / args.contrast_minutes
        )
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(RATE, step, progress)
        asked: list[list[tuple[str, str]]] = []
        features = []
        while len(asked) < ROWS:
            picture, feature = album.choose(rng)
            pairs = list(questions(picture, rng, QUESTIONS, 0))
            if pairs:
                asked.append(pairs)
                features.append(feature)
        truth = torch.tensor([reader.numbers[a] for pairs in asked for _, a in pairs])
        scores = reader(qformer(torch.stack(features).float()), [[q for q, _ in p] for p in asked])
        loss = nn.functional.cross_entropy(scores, truth)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        losses.append(loss.item())
        if progress >= 1 or step % args.every == 0 or step in (10, 30):
            report = {"stage": 1, "step": step, "loss": round(sum(losses) / len(losses), 4)}
            right = accuracy(reader, qformer, *album.checked)
            losses = []
            log.write(
                {**report, "seconds": round(time.time() - start, 1), "validation_open": right}
            )
    return {
        "steps": step, "rows": ROWS, "questions_each": QUESTIONS, "rate": RATE,
        "minutes": round((time.time() - start) / 60, 1), "validation_open": right,
    }  # fmt: skip


@torch.no_grad()
def accuracy(
    reader: Reader, qformer: nn.Module, pictures: Sequence[Picture], features: torch.Tensor
) -> float:
    """How many of the pictures' own open questions the reader answers."""
    right = []
    for picture, feature in zip(pictures, features, strict=True):
        if picture.open:
            tokens = qformer(feature[None].float())
            found = reader(tokens, [[q for q, _ in picture.open]]).argmax(1)
            truth = [reader.numbers[a] for _, a in picture.open]
            right += (found == torch.tensor(truth)).tolist()
    return round(sum(right) / max(len(right), 1), 4)
