"""Accuracy of a LLaVA or BLIP-2 checkpoint on easy-VQA's test split, by free greedy decoding.

python -m vlm_edge.training.accuracy CHECKPOINT --out accuracy.json

The same model is asked the same questions about the average of all test pictures: what it still
gets right there it did not get from looking.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from vlm_edge.training.data import Picture, drawn, easy_vqa, questions

DRAWN_SEED, DRAWN = 1_000_001, 120  # pictures of a seed that no training uses
Answer = Callable[[Sequence[Image.Image], Sequence[str]], list[str]]


def average_image(pictures: Sequence[Picture]) -> Image.Image:
    """The mean of all pictures, which are of one size."""
    total = np.mean([np.asarray(p.load(), np.float64) for p in pictures], axis=0)
    return Image.fromarray(total.round().astype(np.uint8))


def normalised(answer: str) -> str:
    """Case, spaces and a final full stop do not make an answer wrong."""
    return answer.strip().rstrip(".").strip().lower()


def answerer(checkpoint: Path, max_new_tokens: int = 8) -> Answer:
    """A function that answers questions about images with transformers, free and greedy."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(checkpoint)
    processor.tokenizer.padding_side = "left"
    model = AutoModelForImageTextToText.from_pretrained(checkpoint).eval()

    @torch.no_grad()
    def answer(images: Sequence[Image.Image], asked: Sequence[str]) -> list[str]:
        texts = [
            processor.tokenizer.apply_chat_template(  # Blip2Processor itself has no template
                [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": q}]}],
                add_generation_prompt=True,
                tokenize=False,
            )
            for q in asked
        ]
        inputs = processor(text=texts, images=list(images), padding=True, return_tensors="pt")
        made = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        return list(
            processor.batch_decode(
                made[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
            )
        )

    return answer


def measure(
    answer: Answer, asked: Sequence[tuple[Image.Image, str, str]], rows: int = 32
) -> dict[str, Any]:
    """Right answers of (image, question, answer) triples: all, and by the right answer."""
    keyed = [((id(image), text), image, truth) for image, text, truth in asked]
    different = {key: image for key, image, _ in keyed}  # no question is put twice
    order = sorted(different, key=lambda key: len(key[1]))  # like lengths pad little
    said: dict[tuple[int, str], str] = {}
    for start in range(0, len(order), rows):
        keys = order[start : start + rows]
        answers = answer([different[key] for key in keys], [text for _, text in keys])
        said |= zip(keys, map(normalised, answers), strict=True)
    right = Counter(truth for key, _, truth in keyed if said[key] == truth)
    wrong = Counter(f"{truth} -> {said[key]}" for key, _, truth in keyed if said[key] != truth)
    total = Counter(truth for *_, truth in keyed)
    return {
        "right": sum(right.values()),
        "of": len(asked),
        "accuracy": round(sum(right.values()) / len(asked), 4),
        "by_answer": {k: f"{right[k]}/{n}" for k, n in total.most_common(13)},
        "mistakes": dict(wrong.most_common(8)),
    }


def main(argv: list[str] | None = None) -> None:
    """Measure and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--limit", type=int, help="the first pictures of the test split only")
    parser.add_argument("--yes-no-limit", type=int, default=250, help="pictures for yes/no")
    parser.add_argument("--out", type=Path, default=Path("accuracy.json"))
    args = parser.parse_args(argv)
    pictures = easy_vqa("test")
    average = average_image(pictures)
    pictures = pictures[: args.limit]
    loaded = [p.load() for p in pictures]
    answer = answerer(args.checkpoint)
    rng = random.Random(0)
    unseen = [drawn(DRAWN_SEED, i) for i in range(DRAWN)]
    kinds = {
        "open": [(i, *qa) for i, p in zip(loaded, pictures, strict=True) for qa in p.open],
        "open_average_image": [(average, *qa) for p in pictures for qa in p.open],
        "yes_no": [
            (i, *qa)
            for i, p in list(zip(loaded, pictures, strict=True))[: args.yes_no_limit]
            for qa in p.yes_no
        ],
        "drawn_open": [
            (image, *qa) for p in unseen for image in [p.load()] for qa in questions(p, rng, 3, 0)
        ],
    }
    report: dict[str, Any] = {"data": "easy-VQA test", "pictures": len(pictures)}
    for kind, asked in kinds.items():
        start = time.time()
        report[kind] = measure(answer, asked) | {"seconds": round(time.time() - start, 1)}
        args.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
