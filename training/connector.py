"""Train the demo LLaVA's connector with everything else frozen: stage 1 of the LLaVA recipe.

python -m vlm_edge.training.connector --seed 1 --steps 1600 --out connector

Writes OUT.safetensors (the best so far on validation pictures), OUT.log (one JSON line a report)
and OUT.json (how it was made). The vision features of every picture are computed once.
"""

from __future__ import annotations

import math
import random
import sys

import torch
from torch import nn

from vlm_edge.training.frozen import image_features, load_frozen
from vlm_edge.training.packing import LLAVA
from vlm_edge.training.recipe import (
    Album,
    Log,
    argument_parser,
    scripts_sha256,
    train_on_answers,
    write_about,
)


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


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    argv = sys.argv[1:] if argv is None else argv
    args = argument_parser(__doc__, "connector").parse_args(argv)
    sha256 = scripts_sha256()
    torch.manual_seed(args.seed)
    frozen, rng, log = load_frozen(), random.Random(args.seed), Log(args.out)
    album = Album.gather(lambda i: image_features(frozen, i), args.seed, args.drawn, args.cache)
    sample = album.sample()
    connector = Connector(sample.shape[1], frozen.table.shape[1])
    connector.fit(sample, frozen.word_norm())
    about = train_on_answers(frozen, connector, album, LLAVA, rng, args, log)
    about["training_sha256"] = sha256
    write_about(args.out, "vlm_edge.training.connector", argv, about)


if __name__ == "__main__":
    main()
