"""What transformers itself answers for a checkpoint: the truth the parity tests compare with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Answer:
    """A greedy answer: ids of prompt and answer, and how far each token won by."""

    prompt_ids: list[int]
    token_ids: list[int]  # new tokens, the end token included
    text: str
    margins: list[float]  # first logit less the second, per new token


class Reference:
    """The checkpoint's own class of model in float32, with its own processor."""

    def __init__(self, folder: Path) -> None:
        import torch
        from transformers import AutoModelForImageTextToText, AutoProcessor
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        self.processor = AutoProcessor.from_pretrained(folder)
        self.model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()

    def inputs(self, prompt: str, images: Sequence[Path] = ()) -> Any:
        from transformers.image_utils import load_image

        pictures = [load_image(str(image)) for image in images]
        return self.processor(images=pictures or None, text=prompt, return_tensors="pt")

    def answer(self, prompt: str, images: Sequence[Path] = (), new_tokens: int = 20) -> Answer:
        import torch

        inputs = self.inputs(prompt, images)
        length = inputs["input_ids"].shape[1]
        with torch.inference_mode():
            output = self.model.generate(
                **inputs,
                do_sample=False,
                max_new_tokens=new_tokens,
                output_scores=True,
                return_dict_in_generate=True,
            )
        best = torch.stack([scores[0].topk(2).values for scores in output.scores])
        token_ids = output.sequences[0, length:].tolist()
        return Answer(
            prompt_ids=inputs["input_ids"][0].tolist(),
            token_ids=token_ids,
            text=self.processor.tokenizer.decode(token_ids, skip_special_tokens=True),
            margins=(best[:, 0] - best[:, 1]).tolist(),
        )

    def logits(self, prompt: str, images: Sequence[Path] = ()) -> np.ndarray:
        """Logits of the position after the prompt, float32 [vocab]."""
        import torch

        with torch.inference_mode():
            logits = self.model(**self.inputs(prompt, images)).logits
        return logits[0, -1].numpy()
