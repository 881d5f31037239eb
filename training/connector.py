"""Train the demo model's connector with everything else frozen: stage 1 of the LLaVA recipe.

python -m vlm_edge.training.connector --seed 1 --steps 1600 --out connector

Writes OUT.safetensors (the best so far on validation pictures), OUT.log (one JSON line a report)
and OUT.json (how it was made). The vision features of every picture are computed once.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import random
import sys
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

from vlm_edge.training.asking import answer_logits, validate
from vlm_edge.training.data import Picture, drawn, easy_vqa, questions, with_rephrasings
from vlm_edge.training.frozen import Frozen, image_features, load_frozen
from vlm_edge.training.packing import pack

VALIDATION = 200  # easy-VQA train pictures kept out of training, to choose the best weights
REAL_SHARE = 0.55  # of the pictures in a step; the others are drawn
OPEN, YES_NO = 4, 2  # questions about each; yes/no ones tell little about what is seen
WARM_UP = 60  # steps


class Connector(nn.Module):
    """LLaVA-1.5's projector: Linear, GELU, Linear; its names are the checkpoint's."""

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(features, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [.., features] -> [.., width]
        return self.linear_2(nn.functional.gelu(self.linear_1(x)))

    @torch.no_grad()
    def fit(self, sample: torch.Tensor, embedding_norm: float) -> None:
        """Start from a scale that suits both sides.

        Layers of the vision tower differ in scale and a few channels dominate: the features'
        mean and deviation are folded into linear_1, where LLaVA has no normalisation. Outputs
        start with the norm of a word's embedding, so the language model sees them as words.
        """
        mean, std = sample.mean(0), sample.std(0).clamp_min(1e-3)
        self.linear_1.weight.normal_(0, 1 / math.sqrt(len(mean))).div_(std)
        self.linear_1.bias.copy_(-self.linear_1.weight @ mean)
        self.linear_2.bias.zero_()
        self.linear_2.weight.normal_(0, 0.05)
        norm = self(sample).norm(dim=-1).mean()
        self.linear_2.weight.mul_(embedding_norm / norm)


def learning_rate(peak: float, step: int, progress: float) -> float:
    """Linear warm-up, then a cosine down to 2 % of the peak."""
    cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1)))
    return peak * min(1.0, step / WARM_UP) * (0.02 + 0.98 * cosine)


def cached_features(frozen: Frozen, pictures: list[Picture], cache: Path | None) -> torch.Tensor:
    """Vision features [pictures, tokens, features] float16, from the cache file if there is one."""
    if cache is not None and cache.exists():
        return torch.from_numpy(np.load(cache))
    batches = [pictures[i : i + 32] for i in range(0, len(pictures), 32)]
    found = torch.cat([image_features(frozen, [p.load() for p in b]).half() for b in batches])
    if cache is not None:
        cache.parent.mkdir(parents=True, exist_ok=True)
        np.save(cache, found.numpy())
    return found


def train(frozen: Frozen, args: argparse.Namespace) -> dict[str, object]:
    """Train, log, keep the best, and say how it was done."""
    rng = random.Random(args.seed)
    easy = easy_vqa("train")
    checked, real = easy[-VALIDATION:], [with_rephrasings(p) for p in easy[:-VALIDATION]]
    made = [drawn(args.seed, i) for i in range(args.drawn)]
    name = f"drawn-{args.seed}-{args.drawn}.npy"
    real_features = cached_features(frozen, easy, args.cache and args.cache / "easy.npy")
    made_features = cached_features(frozen, made, args.cache and args.cache / name)
    sources = [(real, real_features), (made, made_features)]

    connector = Connector(real_features.shape[-1], frozen.table.shape[1])
    sample = torch.cat([real_features[:200], made_features[:200]]).float().flatten(0, 1)
    connector.fit(sample, float(frozen.table.float().norm(dim=-1).mean()))
    optimizer = torch.optim.AdamW(connector.parameters(), lr=args.rate, weight_decay=0.01)

    start, best, asked, tokens, step, last = time.time(), -1.0, 0, 0, 0, False
    losses: list[float] = []
    args.out.with_suffix(".log").write_text("")
    while not last:
        step += 1
        minutes = (time.time() - start) / 60
        progress = max(step / args.steps, minutes / args.minutes)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(args.rate, step, progress)
        rows, features = [], []
        for _ in range(args.rows):
            pictures, source = sources[rng.random() > REAL_SHARE]
            index = rng.randrange(len(pictures))
            rows.append(list(questions(pictures[index], rng, OPEN, YES_NO)))
            features.append(source[index])
        packed = pack(rows, frozen.encode, real_features.shape[1])
        image = connector(torch.stack(features).float())
        logits, labels = answer_logits(frozen, packed, image)
        loss = nn.functional.cross_entropy(logits.float(), labels)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(connector.parameters(), 1.0)
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
            scores = validate(frozen, connector, real_features[-VALIDATION:], checked)
            report |= {f"validation_{kind}": round(v, 4) for kind, v in scores.items()}
            score = scores["open"] + 0.25 * scores["yes_no"]  # open questions decide
            if score >= best:
                best = score
                save_file(connector.state_dict(), args.out.with_suffix(".safetensors"))
                report["kept"] = True
        with args.out.with_suffix(".log").open("a") as log:
            log.write(json.dumps(report) + "\n")
    return {
        "seed": args.seed, "steps": step, "rows": args.rows, "rate": args.rate,
        "questions": asked, "pictures": {"easy-VQA train": len(real), "drawn": len(made)},
        "minutes": round((time.time() - start) / 60, 1),
    }  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--minutes", type=float, default=1e9, help="end (annealed) at this time")
    parser.add_argument("--rows", type=int, default=8, help="pictures in a step")
    parser.add_argument("--rate", type=float, default=1e-3, help="peak learning rate")
    parser.add_argument("--drawn", type=int, default=6000, help="drawn pictures")
    parser.add_argument("--every", type=int, default=100, help="steps between reports")
    parser.add_argument("--cache", type=Path, help="folder for vision features")
    parser.add_argument("--out", type=Path, default=Path("connector"))
    args = parser.parse_args(argv)
    scripts = b"".join(p.read_bytes() for p in sorted(Path(__file__).parent.glob("*.py")))
    torch.manual_seed(args.seed)
    about = {
        "command": " ".join(["python -m vlm_edge.training.connector", *argv]),
        **train(load_frozen(), args),
        "training_sha256": hashlib.sha256(scripts).hexdigest(),
    }
    args.out.with_suffix(".json").write_text(json.dumps(about, indent=2) + "\n")


if __name__ == "__main__":
    main()
