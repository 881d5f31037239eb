"""What the demo models' recipes share: pictures with cached features, the language model's loss, reports.

Everything but the connector is frozen; the loss is the language model's, on the answers alone.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from vlm_edge.training.asking import answer_logits, validate
from vlm_edge.training.data import Picture, drawn, easy_vqa, questions, with_rephrasings
from vlm_edge.training.frozen import Frozen
from vlm_edge.training.packing import Layout, pack

VALIDATION = 200  # easy-VQA train pictures kept out of training, to choose the best weights
REAL_SHARE = 0.55  # of the pictures in a step; the others are drawn
OPEN, YES_NO = 4, 2  # questions about each; yes/no ones tell little about what is seen
WARM_UP = 60  # steps
FeatureMaker = Callable[[Sequence[Image.Image]], torch.Tensor]


def learning_rate(peak: float, step: int, progress: float) -> float:
    """Linear warm-up, then a cosine down to 2 % of the peak."""
    cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1)))
    return peak * min(1.0, step / WARM_UP) * (0.02 + 0.98 * cosine)


def cached_features(
    compute: FeatureMaker, pictures: Sequence[Picture], cache: Path | None
) -> torch.Tensor:
    """Vision features [pictures, tokens, features] float16, from the cache file if there is one."""
    if cache is not None and cache.exists():
        return torch.from_numpy(np.load(cache))
    batches = [pictures[i : i + 32] for i in range(0, len(pictures), 32)]
    found = torch.cat([compute([p.load() for p in b]).half() for b in batches])
    if cache is not None:
        cache.parent.mkdir(parents=True, exist_ok=True)
        np.save(cache, found.numpy())
    return found


@dataclass(frozen=True)
class Album:
    """Pictures and their features: two sources to train on, and pictures kept out of training."""

    real: tuple[list[Picture], torch.Tensor]
    made: tuple[list[Picture], torch.Tensor]
    checked: tuple[list[Picture], torch.Tensor]

    @classmethod
    def gather(cls, compute: FeatureMaker, seed: int, count: int, cache: Path | None) -> Album:
        """easy-VQA's train split and `count` pictures drawn by the seed; features once for all."""
        easy, made = easy_vqa("train"), [drawn(seed, i) for i in range(count)]
        features = cached_features(compute, easy, cache and cache / "easy.npy")
        drawn_file = cache and cache / f"drawn-{seed}-{count}.npy"
        real = [with_rephrasings(p) for p in easy[:-VALIDATION]]
        return cls(
            (real, features[:-VALIDATION]),
            (made, cached_features(compute, made, drawn_file)),
            (easy[-VALIDATION:], features[-VALIDATION:]),
        )

    def choose(self, rng: random.Random) -> tuple[Picture, torch.Tensor]:
        """A training picture and its features [tokens, features]."""
        pictures, features = self.made if rng.random() > REAL_SHARE else self.real
        index = rng.randrange(len(pictures))
        return pictures[index], features[index]

    def sample(self) -> torch.Tensor:
        """Features [tokens of some pictures, features] float32, to fit a connector's start to."""
        return torch.cat([self.real[1][:200], self.made[1][:200]]).float().flatten(0, 1)

    def sizes(self) -> dict[str, int]:
        """How many pictures there are to train on."""
        return {"easy-VQA train": len(self.real[0]), "drawn": len(self.made[0])}


class Log:
    """OUT.log: one JSON line a report."""

    def __init__(self, out: Path) -> None:
        self.path = out.with_suffix(".log")
        self.path.write_text("")

    def write(self, report: dict[str, object]) -> None:
        """Append a line."""
        with self.path.open("a") as log:
            log.write(json.dumps(report) + "\n")


def train_on_answers(
    frozen: Frozen,
    connector: nn.Module,
    album: Album,
    layout: Layout,
    rng: random.Random,
    args: argparse.Namespace,
    log: Log,
) -> dict[str, object]:
    """Train the connector with the language model's loss, keep the best, and say how it was done.

    `args` has steps, minutes, rows, rate, every and out; the best weights are OUT.safetensors.
    """
    trained = [p for p in connector.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.rate, weight_decay=0.01)
    start, best, asked, tokens, step, last = time.time(), -1.0, 0, 0, 0, False
    losses: list[float] = []
    kept: dict[str, object] = {}
    while not last:
        step += 1
        minutes = (time.time() - start) / 60
        progress = max(step / args.steps, minutes / args.minutes)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(args.rate, step, progress)
        rows, features = [], []
        for _ in range(args.rows):
            picture, feature = album.choose(rng)
            rows.append(list(questions(picture, rng, OPEN, YES_NO)))
            features.append(feature)
        image = connector(torch.stack(features).float())
        packed = pack(rows, frozen.encode, image.shape[1], layout)
        logits, labels = answer_logits(frozen, packed, image)
        loss = nn.functional.cross_entropy(logits.float(), labels)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()

        losses.append(loss.item())
        tokens += packed.ids.numel()
        asked += sum(map(len, rows))
        last = step == args.steps or progress >= 1
        if not (last or step % args.every == 0 or step in (10, 30)):
            continue
        seconds = time.time() - start
        report: dict[str, object] = {
            "step": step, "loss": round(sum(losses) / len(losses), 4), "questions": asked,
            "seconds": round(seconds, 1), "tokens_per_second": round(tokens / seconds),
        }  # fmt: skip
        losses = []
        if last or step % args.every == 0:
            pictures, kept_out = album.checked
            scores = validate(frozen, connector, kept_out, pictures, layout)
            scores = {kind: round(value, 4) for kind, value in scores.items()}
            report |= {f"validation_{kind}": value for kind, value in scores.items()}
            score = scores["open"] + 0.25 * scores["yes_no"]  # open questions decide
            if score >= best:
                best, kept = score, {"kept_step": step, "validation": scores}
                save_file(connector.state_dict(), args.out.with_suffix(".safetensors"))
                report["kept"] = True
        log.write(report)
    return {
        "seed": args.seed, "steps": step, "rows": args.rows, "rate": args.rate,
        "questions": asked, "pictures": album.sizes(),
        "minutes": round((time.time() - start) / 60, 1), **kept,
    }  # fmt: skip


def argument_parser(about: str | None, out: str) -> argparse.ArgumentParser:
    """The options that every recipe has."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--minutes", type=float, default=1e9, help="end (annealed) at this time")
    parser.add_argument("--rows", type=int, default=8, help="pictures in a step")
    parser.add_argument("--rate", type=float, default=1e-3, help="peak learning rate")
    parser.add_argument("--drawn", type=int, default=6000, help="drawn pictures")
    parser.add_argument("--every", type=int, default=100, help="steps between reports")
    parser.add_argument("--cache", type=Path, help="folder for vision features")
    parser.add_argument("--out", type=Path, default=Path(out))
    return parser


def scripts_sha256() -> str:
    """A hash of the training scripts, to tell which ones made some weights."""
    scripts = b"".join(p.read_bytes() for p in sorted(Path(__file__).parent.glob("*.py")))
    return hashlib.sha256(scripts).hexdigest()


def write_about(out: Path, module: str, argv: Sequence[str], about: dict[str, object]) -> None:
    """OUT.json: how the weights were made."""
    about = {"command": " ".join([f"python -m {module}", *argv]), **about}
    out.with_suffix(".json").write_text(json.dumps(about, indent=2) + "\n")
