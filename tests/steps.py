"""An answer token by token, in transformers and in a bundle: logits of every step, and what was chosen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from vlm_edge import VLM
from vlm_edge.runtime.prompt import BuiltPrompt

NEW_TOKENS = 16
TOLERANCE = 1e-4  # relative error of a step's logits
MARGIN = 5e-4  # of the best logit over the next, in deviations: nearer ones are ties


def load(folder: Path, model_class: str) -> tuple[Any, Any]:
    """A checkpoint's processor, and its model in float32."""
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    processor = transformers.AutoProcessor.from_pretrained(folder)
    model = getattr(transformers, model_class).from_pretrained(folder, dtype=torch.float32)
    return processor, model.eval()


def greedy(model: Any, inputs: Any, **settings: Any) -> tuple[list[int], np.ndarray]:
    """transformers' new tokens, and the logits [new, vocab] each was chosen from, before any penalty."""
    import torch

    with torch.inference_mode():
        output = model.generate(
            **inputs, do_sample=False, max_new_tokens=NEW_TOKENS, output_logits=True,
            return_dict_in_generate=True, **settings,
        )  # fmt: skip
    return output.sequences[0, -len(output.logits) :].tolist(), torch.cat(output.logits).numpy()


def prefill(vlm: VLM, built: BuiltPrompt) -> np.ndarray:
    """Logits [vocab] behind a prompt that begins an empty cache."""
    read = vlm.inputs(built)
    vlm.decoder.length = 0
    if read.media is not None:
        vlm.decoder.attend(read.media)
    return vlm.decoder.prefill(read.embeds).copy()


def compare(vlm: VLM, built: BuiltPrompt, tokens: list[int], logits: np.ndarray) -> None:
    """The bundle's logits along the reference's answer, whose every choice must be a clear one."""
    found = [prefill(vlm, built)]
    rows = vlm.embeddings.rows(np.array(tokens[:-1], np.int64))
    found += [vlm.decoder.decode(row).copy() for row in rows]
    for step, (ours, theirs) in enumerate(zip(found, logits, strict=True)):
        error = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
        assert error < TOLERANCE, f"step {step}"
    best = np.sort(logits, axis=1)
    margins = (best[:, -1] - best[:, -2]) / logits.std(axis=1)
    assert margins.min() > MARGIN, "near a tie: choose another salt"


def cosine(found: np.ndarray, expected: np.ndarray) -> float:
    return float(found @ expected / np.linalg.norm(found) / np.linalg.norm(expected))
