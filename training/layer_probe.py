"""Which hidden state of the vision tower tells colour and shape best, for a model that reads only one.

python -m vlm_edge.training.layer_probe --out probe.json

On each layer's output a probe is trained: eight learned queries attend over the tokens, and a linear
layer names the answer. Pictures are easy-VQA train's and drawn ones with one shape.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from torch import nn

from vlm_edge.export.demo_parts import NORM_EPS, find_parts
from vlm_edge.training.data import COLOURS, SHAPES, Picture, drawn, easy_vqa
from vlm_edge.training.frozen import load_vision, pixels
from vlm_edge.training.recipe import learning_rate

LAYERS = range(2, 11)  # the last ones were tuned to saliency
DRAWN_SEED = 77  # of no training
WIDTH, QUERIES = 128, 8
ROWS, RATE = 48, 2e-3
KINDS = {"shape": SHAPES, "colour": tuple(COLOURS)}


class Probe(nn.Module):
    """Attention over the tokens by queries of its own, and a linear layer."""

    def __init__(self, features: int, answers: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(QUERIES, WIDTH) * 0.5)
        self.key, self.value = nn.Linear(features, WIDTH), nn.Linear(features, WIDTH)
        self.answer = nn.Linear(QUERIES * WIDTH, answers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [rows, tokens, features]
        """Scores [rows, answers]."""
        weights = (self.queries @ self.key(x).transpose(1, 2) / WIDTH**0.5).softmax(-1)
        return self.answer(nn.functional.gelu(weights @ self.value(x)).flatten(1))


def with_one_shape(count: int) -> list[tuple[Picture, dict[str, int]]]:
    """Pictures whose questions tell both answers, and the answers' numbers by kind."""
    real = easy_vqa("train")[: count // 3]
    found = []
    for picture in [*real, *(drawn(DRAWN_SEED, index) for index in range(count))]:
        asked = dict(picture.open)
        if asked.get("how many shapes are there?", "one") != "one":
            continue
        answers = {a for q, a in picture.open if "background" not in q}
        told = {
            kind: [n for n, word in enumerate(words) if word in answers]
            for kind, words in KINDS.items()
        }
        if all(len(numbers) == 1 for numbers in told.values()):
            found.append((picture, {kind: numbers[0] for kind, numbers in told.items()}))
    return found[:count]


@torch.no_grad()
def normalised_states(pictures: list[Picture]) -> dict[int, torch.Tensor]:
    """Each layer's output [pictures, tokens, width] through a norm, as BLIP-2's tower ends."""
    tower = load_vision(find_parts()["vision"])
    found: dict[int, list[torch.Tensor]] = {layer: [] for layer in LAYERS}
    for start in range(0, len(pictures), 32):
        batch = np.stack([pixels(p.load()) for p in pictures[start : start + 32]])
        states = tower(torch.from_numpy(batch), output_hidden_states=True).hidden_states
        for layer in LAYERS:
            normal = nn.functional.layer_norm(states[layer], states[layer].shape[-1:], eps=NORM_EPS)
            found[layer].append(normal)
    return {layer: torch.cat(batches) for layer, batches in found.items()}


def probe(
    features: torch.Tensor, truth: torch.Tensor, answers: int, steps: int
) -> dict[str, float]:
    """Train on four fifths of the pictures; accuracy and loss on the others."""
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(truth), generator=generator)
    train, test = order[len(order) // 5 :], order[: len(order) // 5]
    mean, std = features[train].mean((0, 1)), features[train].std((0, 1))
    net = Probe(features.shape[-1], answers)
    optimizer = torch.optim.AdamW(net.parameters(), lr=RATE)
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(RATE, step, step / steps)
        rows = train[torch.randint(len(train), (ROWS,), generator=generator)]
        loss = nn.functional.cross_entropy(net((features[rows] - mean) / std), truth[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        scores = net((features[test] - mean) / std)
    right = (scores.argmax(1) == truth[test]).float().mean().item()
    lost = nn.functional.cross_entropy(scores, truth[test]).item()
    return {"accuracy": round(right, 4), "loss": round(lost, 4)}


def main(argv: list[str] | None = None) -> None:
    """Probe every layer and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=int, default=1500)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--out", type=Path, default=Path("probe.json"))
    args = parser.parse_args(argv)
    chosen = with_one_shape(args.pictures)
    states = normalised_states([picture for picture, _ in chosen])
    report: dict[str, object] = {"pictures": len(chosen), "steps": args.steps}
    for layer, features in states.items():
        found = {}
        for kind, words in KINDS.items():
            torch.manual_seed(0)
            truth = torch.tensor([told[kind] for _, told in chosen])
            found[kind] = probe(features, truth, len(words), args.steps)
        report[f"layer {layer}"] = found
        args.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
