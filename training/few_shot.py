"""Accuracy of a demo Flamingo on easy-VQA's test split, without and with examples in the prompt.

python -m vlm_edge.training.few_shot CHECKPOINT --out accuracy.json

Answers are decoded free and greedy by transformers. Examples are a question and its answer about
each of some other pictures, of the train split. Asked about the average of all test pictures the
model tells what it gets right without looking.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from vlm_edge.training.accuracy import DRAWN, DRAWN_SEED, Answer, average_image, measure
from vlm_edge.training.data import drawn, easy_vqa, questions

EXAMPLES = 2
Example = tuple[Image.Image, str, str]  # a picture, a question about it and its answer


def prompt(image: Image.Image, question: str, examples: Sequence[Example] = ()) -> list[Any]:
    """Texts and pictures as IdeficsProcessor takes them, which puts the first `<|im_start|>`."""
    parts: list[Any] = ["user\n"]
    for picture, asked, answer in examples:
        parts += [
            picture,
            f"{asked}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n<|im_start|>user\n",
        ]
    return [*parts, image, f"{question}<|im_end|>\n<|im_start|>assistant\n"]


def answerer(
    processor: Any, model: Any, pool: Sequence[Example], shots: int, max_new_tokens: int = 8
) -> Answer:
    """A function that answers questions about images, after `shots` examples drawn from the pool."""
    rng = random.Random(shots)

    @torch.no_grad()
    def answer(images: Sequence[Image.Image], asked: Sequence[str]) -> list[str]:
        prompts = [
            prompt(image, question, rng.sample(pool, shots))
            for image, question in zip(images, asked, strict=True)
        ]
        inputs = processor(text=prompts, padding=True, return_tensors="pt")
        made = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        new = made[:, inputs["input_ids"].shape[1] :]
        return list(processor.batch_decode(new, skip_special_tokens=True))

    return answer


def main(argv: list[str] | None = None) -> None:
    """Measure and write the figures."""
    from transformers import AutoProcessor, IdeficsForVisionText2Text

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--limit", type=int, help="the first pictures of the test split only")
    parser.add_argument("--yes-no-limit", type=int, default=150, help="pictures for yes/no")
    parser.add_argument("--examples-limit", type=int, default=200, help="pictures with examples")
    parser.add_argument("--out", type=Path, default=Path("accuracy.json"))
    args = parser.parse_args(argv)
    pictures = easy_vqa("test")
    average = average_image(pictures)
    shown = [(p, p.load()) for p in pictures[: args.limit]]
    pool = [(p.load(), *qa) for p in easy_vqa("train")[:200] for qa in p.open]
    answers_pool = [(p.load(), *qa) for p in easy_vqa("train")[:200] for qa in p.yes_no]
    processor = AutoProcessor.from_pretrained(args.checkpoint)
    processor.tokenizer.padding_side = "left"
    model = IdeficsForVisionText2Text.from_pretrained(args.checkpoint).eval()
    alone = answerer(processor, model, [], 0)
    few, rng = shown[: args.examples_limit], random.Random(0)
    unseen = [(p, p.load()) for p in (drawn(DRAWN_SEED, i) for i in range(DRAWN))]
    few_open = [(i, *qa) for p, i in few for qa in p.open]
    few_yes_no = [(i, *qa) for p, i in shown[: args.yes_no_limit] for qa in p.yes_no]
    after = f"_after_{EXAMPLES}_examples"
    kinds: dict[str, tuple[Answer, list[Example]]] = {
        "open": (alone, [(i, *qa) for p, i in shown for qa in p.open]),
        "open_average_image": (alone, [(average, *qa) for p, _ in shown for qa in p.open]),
        "open_same_pictures": (alone, few_open),
        f"open{after}": (answerer(processor, model, pool, EXAMPLES), few_open),
        "yes_no": (alone, few_yes_no),
        f"yes_no{after}": (answerer(processor, model, answers_pool, EXAMPLES), few_yes_no),
        "drawn_open": (alone, [(i, *qa) for p, i in unseen for qa in questions(p, rng, 3, 0)]),
    }
    report: dict[str, Any] = {"data": "easy-VQA test", "pictures": len(shown)}
    for kind, (answer, asked) in kinds.items():
        start = time.time()
        report[kind] = measure(answer, asked) | {"seconds": round(time.time() - start, 1)}
        args.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
