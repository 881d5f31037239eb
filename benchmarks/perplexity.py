"""Perplexity of bundles' language models on a fixed text, and how far each is from the first bundle.

    python -m vlm_edge.benchmarks.perplexity BUNDLE [BUNDLE ...] [--text FILE]

The built-in text (`held_out.txt`, 73 KB) is prose from the proceedings of the Library of Congress'
Workshop on Electronic Texts, 1992, a work of the United States government and in the public domain:
Project Gutenberg's edition, in the Canterbury Corpus as lcet10.txt, paragraphs from every session with
their lines joined. No export calibrates on it.

The portable graph runs, in which every precision is what the bundle says. Windows of the text are
independent: each starts with an empty cache, and its first token is not counted.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from vlm_edge.calibration.divergence import kl_divergence, log_softmax
from vlm_edge.errors import SettingError
from vlm_edge.runtime.bundle import Bundle
from vlm_edge.runtime.feeds import prefill_feeds
from vlm_edge.runtime.ort import open_session
from vlm_edge.runtime.tokenizer import Tokenizer

WINDOW = 512  # tokens that see each other
console = Console()


def held_out_text() -> str:
    """The built-in text."""
    return (files("vlm_edge.benchmarks") / "held_out.txt").read_text(encoding="utf-8")


class LanguageModel:
    """A bundle's language model that gives the logits of every position.

    Args:
        bundle: a folder that `vlm export` wrote.
        threads: of the engine; None takes the processors there are.
    """

    def __init__(self, bundle: Path, threads: int | None = None) -> None:
        opened = Bundle(bundle)
        self.name = bundle.name
        self.tokenizer = Tokenizer(opened.file("tokenizer.json"))
        self._settings, self._table = opened.manifest.decoder, opened.embeddings()
        self._session = open_session(opened.graph("llm"), "llm", threads)
        self._inputs = {spec.name for spec in self._session.get_inputs()}

    def logits(self, ids: np.ndarray) -> np.ndarray:
        """float32 [n, vocab] after each of the token ids int64 [n]."""
        feeds = prefill_feeds(self._settings, self._table.rows(ids)[None])
        feeds["logit_positions"] = np.arange(len(ids))
        fed = {name: value for name, value in feeds.items() if name in self._inputs}
        return self._session.run(["logits"], fed)[0][0]


@dataclass
class Score:
    """Sums over predicted tokens; `kl` and `same` are against the first bundle."""

    tokens: int = 0
    loss: float = 0.0
    kl: float = 0.0
    same: int = 0

    def add(self, logits: np.ndarray, reference: np.ndarray, targets: np.ndarray) -> None:
        """Logits float32 [n, vocab] of this and of the first bundle; the true tokens int64 [n]."""
        q, p = log_softmax(logits), log_softmax(reference)
        self.tokens += len(targets)
        self.loss -= float(q[np.arange(len(targets)), targets].sum())
        self.kl += float(kl_divergence(q, p).sum())
        self.same += int((q.argmax(axis=1) == p.argmax(axis=1)).sum())

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss / self.tokens)

    def figures(self, first: Score) -> dict[str, float]:
        """Perplexity, its ratio to the first bundle's, KL divergence from it (nats a token) and the
        share of positions whose most likely token is the same."""
        return {
            "perplexity": self.perplexity,
            "ratio": self.perplexity / first.perplexity,
            "kl": self.kl / self.tokens,
            "top1_agreement": self.same / self.tokens,
        }


def windows(ids: Sequence[int], length: int) -> Iterator[np.ndarray]:
    """int64 pieces of `length` tokens, one after the other; a rest that predicts nothing is dropped."""
    for start in range(0, len(ids) - 1, length):
        yield np.asarray(ids[start : start + length], np.int64)


def measure(models: Sequence[LanguageModel], text: str, window: int = WINDOW) -> list[Score]:
    """Every model on the same tokens; the first one is the reference.

    Raises:
        SettingError: the models have different tokenizers, or the text is shorter than two tokens.
    """
    ids = models[0].tokenizer.encode(text)
    for model in models[1:]:
        if model.tokenizer.encode(text) != ids:
            raise SettingError(
                f"{model.name} has another tokenizer than {models[0].name}: their perplexities are over "
                "different tokens and cannot be compared; measure them one by one"
            )
    if len(ids) < 2:
        raise SettingError(f"the text has {len(ids)} token(s); at least 2 are needed")
    scores = [Score() for _ in models]
    for piece in track(list(windows(ids, window)), "perplexity", console=console, transient=True):
        reference = models[0].logits(piece)[:-1]
        for model, score in zip(models, scores, strict=True):
            logits = reference if model is models[0] else model.logits(piece)[:-1]
            for start in range(0, len(logits), 64):  # float64 over the vocabulary is large
                part = slice(start, start + 64)
                score.add(logits[part], reference[part], piece[1:][part])
    return scores


@click.command(help=__doc__)
@click.argument("bundles", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--text", type=click.Path(exists=True, dir_okay=False, path_type=Path),
              help="Another text, UTF-8.")  # fmt: skip
@click.option("--window", default=WINDOW, show_default=True, type=click.IntRange(min=2),
              help="Tokens that see each other.")  # fmt: skip
@click.option("--threads", type=click.IntRange(min=1))
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write figures here.")
def main(
    bundles: tuple[Path, ...],
    text: Path | None,
    window: int,
    threads: int | None,
    json_file: Path | None,
) -> None:
    content = held_out_text() if text is None else text.read_text(encoding="utf-8")
    models = [LanguageModel(bundle, threads) for bundle in bundles]
    scores = measure(models, content, window)
    table = Table("bundle", "perplexity", "ratio", "KL, nats", "same top token %")
    report: dict[str, Any] = {"tokens": scores[0].tokens, "window": window, "bundles": {}}
    for model, score in zip(models, scores, strict=True):
        figures = report["bundles"][model.name] = score.figures(scores[0])
        table.add_row(
            model.name,
            f"{figures['perplexity']:.3f}",
            f"{figures['ratio']:.4f}",
            f"{figures['kl']:.4f}",
            f"{100 * figures['top1_agreement']:.1f}",
        )
    console.print(table)
    console.print(f"{scores[0].tokens} predicted tokens in windows of {window}")
    if json_file is not None:
        json_file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
