"""Train the demo BLIP-2's Q-Former in two stages (arXiv:2301.12597), vision and language frozen.

python -m vlm_edge.training.qformer --seed 1 --contrast-minutes 12 --minutes 40 --out qformer

Stage 1 (``contrast``) needs no language model, stage 2 has its loss on the answers. Writes
OUT.safetensors (float16, the best on validation pictures), OUT.log (one JSON line a report) and
OUT.json (how it was made).
"""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Blip2QFormerConfig, Blip2QFormerModel

from vlm_edge.export import demo_blip2, demo_parts
from vlm_edge.training.contrast import contrast
from vlm_edge.training.frozen import hidden_state, load_frozen
from vlm_edge.training.packing import BLIP2
from vlm_edge.training.recipe import (
    Album,
    Log,
    argument_parser,
    scripts_sha256,
    train_on_answers,
    write_about,
)


class QFormer(nn.Module):
    """What stands between BLIP-2's tower and its language model; its names are the checkpoint's."""

    def __init__(self, config: Blip2QFormerConfig, queries: int, width: int) -> None:
        super().__init__()
        features, hidden = config.encoder_hidden_size, config.hidden_size
        norm = nn.LayerNorm(features, eps=demo_parts.NORM_EPS).requires_grad_(False)
        self.vision_model = nn.ModuleDict({"post_layernorm": norm})  # the tower's last norm
        self.query_tokens = nn.Parameter(torch.randn(1, queries, hidden))
        self.qformer = Blip2QFormerModel(config)
        self.language_projection = nn.Linear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [rows, tokens, features]
        """Visual tokens [rows, queries, width] from the tower's hidden state before its norm."""
        states = self.qformer(
            query_embeds=self.query_tokens.expand(len(x), -1, -1),
            encoder_hidden_states=self.vision_model["post_layernorm"](x),
        ).last_hidden_state
        return self.language_projection(states)

    @torch.no_grad()
    def fit(self, sample: torch.Tensor) -> None:
        """Let the tower's last norm give channels of mean 0 and deviation 1: a few dominate."""
        norm: Any = self.vision_model["post_layernorm"]  # still plain
        normal = norm(sample)
        mean, std = normal.mean(0), normal.std(0).clamp_min(1e-3)
        norm.weight.copy_(1 / std)
        norm.bias.copy_(-mean / std)

    @torch.no_grad()
    def scale_to(self, norm: float, features: torch.Tensor) -> None:
        """Give the visual tokens the mean norm of words, so the language model sees them as such."""
        factor = norm / self(features.float()).norm(dim=-1).mean()
        self.language_projection.weight.mul_(factor)
        self.language_projection.bias.mul_(factor)


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argument_parser(__doc__, "qformer")
    parser.set_defaults(rate=3e-4)
    parser.add_argument("--contrast-steps", type=int, default=1000, help="steps of stage 1")
    parser.add_argument("--contrast-minutes", type=float, default=1e9, help="end it at this time")
    parser.add_argument("--start", type=Path, help="a file that stage 1 wrote, instead of stage 1")
    args = parser.parse_args(argv)
    sha256 = scripts_sha256()
    torch.manual_seed(args.seed)
    frozen, rng, log = load_frozen(), random.Random(args.seed), Log(args.out)
    album = Album.gather(
        lambda images: hidden_state(frozen, images, demo_blip2.VISION_LAYERS),
        args.seed, args.drawn, args.cache,
    )  # fmt: skip
    config = Blip2QFormerConfig(**demo_blip2.QFORMER)
    qformer = QFormer(config, demo_blip2.QUERIES, frozen.table.shape[1])
    about: dict[str, object] = {}
    if args.start:
        qformer.load_state_dict(load_file(args.start))
    else:
        qformer.fit(album.sample())
        qformer.scale_to(frozen.word_norm(), album.made[1][:64])
        about["stage_1"] = contrast(frozen, qformer, album, rng, args, log)
        qformer.scale_to(frozen.word_norm(), album.made[1][:64])
        save_file(qformer.state_dict(), args.out.with_suffix(".stage1.safetensors"))
    about["stage_2"] = train_on_answers(frozen, qformer, album, BLIP2, rng, args, log)
    about["training_sha256"] = sha256
    weights = args.out.with_suffix(".safetensors")
    save_file({name: tensor.half() for name, tensor in load_file(weights).items()}, weights)
    write_about(args.out, "vlm_edge.training.qformer", argv, about)


if __name__ == "__main__":
    main()
