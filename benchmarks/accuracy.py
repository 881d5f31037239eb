"""Accuracy of bundles on held-out easy-VQA questions, by free greedy decoding with the runtime.

    python -m vlm_edge.benchmarks.accuracy BUNDLE [BUNDLE ...] --questions 600

Several bundles answer the same questions, so that a difference is a paired one. The first bundle is
also asked about the average of all test pictures: what it gets right there it did not get from looking.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table

from vlm_edge.runtime.settings import Settings
from vlm_edge.runtime.vlm import VLM
from vlm_edge.training.data import easy_vqa

LONGEST = 8  # tokens of an answer; right ones have one to three
BOOTSTRAPS = 2000
console = Console()


@dataclass(frozen=True)
class Question:
    """One question about one picture of the test split."""

    picture: int
    text: str
    answer: str


def questions(kind: str, count: int, seed: int) -> tuple[list[Image.Image], list[Question]]:
    """All test pictures, and `count` questions drawn by the seed: "open" or "yes_no"."""
    pictures = easy_vqa("test")
    asked = [
        Question(index, text, answer)
        for index, picture in enumerate(pictures)
        for text, answer in getattr(picture, kind)
    ]
    chosen = random.Random(seed).sample(asked, min(count, len(asked)))
    # Neighbours share their picture, which the runtime then encodes and prefills once.
    return [picture.load() for picture in pictures], sorted(chosen, key=lambda q: q.picture)


def average(pictures: Sequence[Image.Image]) -> Image.Image:
    """The mean of all pictures."""
    total = np.mean([np.asarray(picture, np.float64) for picture in pictures], axis=0)
    return Image.fromarray(total.round().astype(np.uint8))


def answers(
    bundle: Path, asked: Sequence[Question], pictures: Sequence[Image.Image], what: str
) -> np.ndarray:
    """bool [questions]: which were answered rightly. Case and a final full stop do not matter."""
    right = np.zeros(len(asked), bool)
    with VLM.load(bundle) as vlm:
        for index, question in enumerate(track(asked, f"{bundle.name}: {what}", console=console)):
            stream = vlm.start(
                question.text, [pictures[question.picture]], True, Settings(LONGEST), reuse=True
            )
            said = stream.result.text.strip().rstrip(".").lower()
            right[index] = said == question.answer
    return right


def interval(values: np.ndarray) -> tuple[float, float]:
    """95 % bootstrap interval of the mean."""
    random_ = np.random.default_rng(0)
    means = values[random_.integers(0, len(values), (BOOTSTRAPS, len(values)))].mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def summary(right: np.ndarray, first: np.ndarray | None) -> dict[str, Any]:
    """Accuracy with its interval and, against the first bundle, the paired difference."""
    values = right.astype(np.float64)
    figures: dict[str, Any] = {"accuracy": float(values.mean()), "interval": interval(values)}
    if first is not None:
        difference = values - first.astype(np.float64)
        figures["difference"] = float(difference.mean())
        figures["difference_interval"] = interval(difference)
    return figures


@click.command(help=__doc__)
@click.argument("bundles", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--questions", "count", default=600, show_default=True, help="Of each kind.")
@click.option("--seed", default=0, show_default=True, help="Which questions are drawn.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write figures here.")
def main(bundles: tuple[Path, ...], count: int, seed: int, json_file: Path | None) -> None:
    report: dict[str, Any] = {"questions": count, "seed": seed}
    table = Table("bundle", "questions", "accuracy %", "95 %", "difference", "95 %")
    for kind in ("open", "yes_no"):
        pictures, asked = questions(kind, count, seed)
        first: np.ndarray | None = None
        for bundle in bundles:
            right = answers(bundle, asked, pictures, kind)
            figures = summary(right, first)
            first = right if first is None else first
            report.setdefault(bundle.name, {})[kind] = figures
            table.add_row(bundle.name, kind, *_cells(figures))
        mean = [average(pictures)] * len(pictures)
        figures = summary(answers(bundles[0], asked, mean, f"{kind}, average picture"), None)
        report[bundles[0].name][f"{kind}_average_picture"] = figures
        table.add_row(bundles[0].name, f"{kind}, average picture", *_cells(figures))
    console.print(table)
    if json_file is not None:
        json_file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def _cells(figures: dict[str, Any]) -> list[str]:
    def span(pair: tuple[float, float]) -> str:
        return f"{100 * pair[0]:.1f} to {100 * pair[1]:.1f}"

    cells = [f"{100 * figures['accuracy']:.1f}", span(figures["interval"])]
    if "difference" in figures:
        cells += [f"{100 * figures['difference']:+.1f}", span(figures["difference_interval"])]
    return cells


if __name__ == "__main__":
    main()
