"""Train the demo Flamingo's resampler and gated layers (arXiv:2204.14198), all else frozen.

python -m vlm_edge.training.flamingo --seed 1 --contrast-minutes 4 --minutes 35 --out flamingo

The resampler first learns to see as BLIP-2's Q-Former does (``contrast``), then all is trained with
the language model's loss on the answers, after none, one or two examples. Writes OUT.safetensors
(float16, the best on validation pictures), OUT.log (one JSON line a report) and OUT.json (how it
was made).
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import nn

from vlm_edge.export import demo_flamingo, demo_parts
from vlm_edge.training.contrast import contrast
from vlm_edge.training.data import drawn, questions
from vlm_edge.training.flamingo_model import Flamingo, configuration, load_tower, shift_of
from vlm_edge.training.frozen import Frozen, load_frozen, pixels
from vlm_edge.training.interleaved import FLAMINGO, SHOTS, Row, choose_examples, pack_rows
from vlm_edge.training.packing import IGNORE
from vlm_edge.training.recipe import (
    OPEN,
    YES_NO,
    Album,
    Log,
    argument_parser,
    learning_rate,
    scripts_sha256,
    write_about,
)

GATE_RATE = 10  # the alphas' learning rate beside the others': they are single numbers
SAMPLE = 128  # drawn pictures to find the shift with
BEGIN = FLAMINGO.ask.format(question="user\nwhat is in the image?")  # to fit the gates' scale to


def with_added_tokens(frozen: Frozen) -> Frozen:
    """The frozen parts with a tokenizer that has IDEFICS's two tokens."""
    path = demo_parts.find_parts()["language"]
    tokenizer = Tokenizer.from_str(demo_parts.tokenizer_json(path, demo_flamingo.ADDED))
    return Frozen(
        frozen.vision,
        frozen.language,
        frozen.table,
        lambda text: tokenizer.encode(text, add_special_tokens=False).ids,
    )


def as_pixels(images: Sequence[Image.Image]) -> torch.Tensor:
    """Pixel values [images, 3, 112, 112], of the whole picture as IdeficsProcessor shrinks it."""
    size = (demo_parts.IMAGE, demo_parts.IMAGE)
    shrunk = [i.resize(size, Image.Resampling.BICUBIC) for i in images]
    return torch.from_numpy(np.stack([pixels(image) for image in shrunk]))


@torch.no_grad()
def hits(frozen: Frozen, model: Flamingo, rows: Sequence[Row]) -> list[list[bool]]:
    """Which questions of each row free greedy decoding would answer exactly (`asking.exact`)."""
    packed = pack_rows(rows, frozen.encode)
    logits, labels = model.answer_logits(frozen, packed, [row.features for row in rows])
    hit = torch.ones_like(packed.labels, dtype=torch.bool)
    hit[packed.labels != IGNORE] = logits.argmax(-1) == labels
    return [
        [bool(hit[r][packed.segments[r] == n].all()) for n in range(1, len(row.pairs) + 1)]
        for r, row in enumerate(rows)
    ]


def validate(
    frozen: Frozen, model: Flamingo, album: Album, shots: int, limit: int | None = None
) -> dict[str, float]:
    """Accuracy on the pictures kept out of training, open and yes/no apart, after `shots` examples."""
    rng = random.Random(0)
    right: dict[str, list[bool]] = {"open": [], "yes_no": []}
    pictures, kept_out = album.checked
    chosen = list(zip(pictures, kept_out, strict=True))[:limit]
    for start in range(0, len(chosen), 8):
        batch = chosen[start : start + 8]
        rows = []
        for picture, feature in batch:
            features, examples = choose_examples(album, shots, rng)
            pairs = [*picture.open, *picture.yes_no[:4]]
            rows.append(Row([*features, feature], examples, pairs))
        for (picture, _), found in zip(batch, hits(frozen, model, rows), strict=True):
            right["open"] += found[: len(picture.open)]
            right["yes_no"] += found[len(picture.open) :]
    return {kind: sum(found) / max(len(found), 1) for kind, found in right.items()}


def train(
    frozen: Frozen,
    model: Flamingo,
    album: Album,
    rng: random.Random,
    args: argparse.Namespace,
    log: Log,
) -> dict[str, object]:
    """Train with the language model's loss, keep the best, and say how it was done."""
    alphas = [p for name, p in model.named_parameters() if "alpha" in name]
    others = [p for name, p in model.named_parameters() if "alpha" not in name]
    optimizer = torch.optim.AdamW(
        [{"params": others, "rate": args.rate},
         {"params": alphas, "rate": GATE_RATE * args.rate, "weight_decay": 0.0}],
        lr=args.rate, weight_decay=0.01,
    )  # fmt: skip
    start, best, asked, tokens, step, last = time.time(), -1.0, 0, 0, 0, False
    losses: list[float] = []
    while not last:
        step += 1
        progress = max(step / args.steps, (time.time() - start) / 60 / args.minutes)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(group["rate"], step, progress)
        rows = []
        for shots in rng.choices(range(len(SHOTS)), SHOTS, k=args.rows):
            features, examples = choose_examples(album, shots, rng)
            picture, feature = album.choose(rng)
            pairs = list(questions(picture, rng, OPEN, YES_NO))
            rows.append(Row([*features, feature], examples, pairs))
        packed = pack_rows(rows, frozen.encode)
        logits, labels = model.answer_logits(frozen, packed, [row.features for row in rows])
        loss = nn.functional.cross_entropy(logits.float(), labels)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

        losses.append(loss.item())
        tokens += packed.ids.numel()
        asked += sum(len(row.pairs) for row in rows)
        last = step == args.steps or progress >= 1
        if not (last or step % args.every == 0 or step in (10, 30)):
            continue
        seconds = time.time() - start
        report: dict[str, object] = {
            "step": step, "loss": round(sum(losses) / len(losses), 4), "questions": asked,
            "seconds": round(seconds, 1), "tokens_per_second": round(tokens / seconds),
            "gates": [round(float(p.detach().tanh()), 3) for p in alphas],
        }  # fmt: skip
        losses = []
        if last or step % args.every == 0:
            scores = validate(frozen, model, album, 0)
            report |= {f"validation_{kind}": round(v, 4) for kind, v in scores.items()}
            few = validate(frozen, model, album, 2, 40)
            report["validation_open_2_examples"] = round(few["open"], 4)
            score = scores["open"] + 0.25 * scores["yes_no"]  # open questions decide
            if score >= best:
                best = score
                half = {name: tensor.half() for name, tensor in model.state_dict().items()}
                save_file(half, args.out.with_suffix(".safetensors"))
                report["kept"] = True
        log.write(report)
    return {
        "steps": step, "rows": args.rows, "rate": args.rate, "examples": SHOTS,
        "questions": asked, "pictures": album.sizes(),
        "minutes": round((time.time() - start) / 60, 1),
    }  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argument_parser(__doc__, "flamingo")
    parser.set_defaults(rate=5e-4)
    parser.add_argument("--contrast-steps", type=int, default=1000, help="steps of the warm start")
    parser.add_argument("--contrast-minutes", type=float, default=1e9, help="end it at this time")
    parser.add_argument("--start", type=Path, help="weights to go on from, without a warm start")
    args = parser.parse_args(argv)
    sha256 = scripts_sha256()
    torch.manual_seed(args.seed)
    frozen, rng, log = with_added_tokens(load_frozen()), random.Random(args.seed), Log(args.out)
    sample = as_pixels([drawn(args.seed, i).load() for i in range(SAMPLE)])
    shift = shift_of(frozen.vision, sample)
    config, tower = configuration(), load_tower(shift)
    model = Flamingo(config, shift)
    album = Album.gather(lambda images: tower(as_pixels(images)), args.seed, args.drawn, args.cache)
    about: dict[str, Any] = {"seed": args.seed}
    if args.start:
        trained = {name: tensor.float() for name, tensor in load_file(args.start).items()}
        model.load_state_dict(trained)
    else:
        model.fit(album.sample())
        to_words = nn.Linear(config.vision_config.embed_dim, config.hidden_size, bias=False)
        seeing = nn.Sequential(model.perceiver_resampler, to_words)
        about["contrast"] = contrast(frozen, seeing, album, rng, args, log)
        model.begin(frozen, to_words, album.made[1][:64], BEGIN)
        save_file(model.state_dict(), args.out.with_suffix(".start.safetensors"))
    about |= train(frozen, model, album, rng, args, log)
    about["training_sha256"] = sha256
    write_about(args.out, "vlm_edge.training.flamingo", argv, about)


if __name__ == "__main__":
    main()
