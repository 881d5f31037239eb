"""What bundles answer, with the runtime alone: the same program on every machine, its results compared.

`python ask.py FOLDER RESULTS [RECORD]`, FOLDER of `bundles.py`: RESULTS/<bundle>.npz holds for each
question `<number>.ids` (the prompt's tokens), `.pixels` (sha256 of its pictures as preprocessed), `.tokens`
(greedy) and `.logits` [steps, vocab] along these tokens, or along those of RECORD, another machine's
results; RESULTS/machine.json says where and with what they were made.
"""

from __future__ import annotations

import hashlib
import json
import platform
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np

from vlm_edge import VLM
from vlm_edge.runtime.prompt import BuiltPrompt

NEW_TOKENS = 12
HEAVY = ("torch", "transformers", "onnx", "onnx_ir", "onnxscript", "safetensors")
VERSIONS = ("onnxruntime", "numpy", "pillow", "tokenizers", "jinja2")


def pixels(vlm: VLM, built: BuiltPrompt) -> str:
    """sha256 of all that the vision encoder reads: shapes, and every bit."""
    digest = hashlib.sha256()
    for picture in built.pictures:
        values = vlm.pixels(picture)
        digest.update(f"{values.shape} {values.dtype}".encode() + values.tobytes())
    return digest.hexdigest()


def logits(vlm: VLM, built: BuiltPrompt, tokens: np.ndarray) -> np.ndarray:
    """Logits [steps, vocab] that an answer of these tokens [steps] is chosen from, before any penalty."""
    read = vlm.inputs(built)
    vlm.decoder.length = 0
    if read.media is not None:
        vlm.decoder.attend(read.media)
    steps = [vlm.decoder.prefill(read.embeds).copy()]
    steps += [vlm.decoder.decode(row).copy() for row in vlm.embeddings.rows(tokens[:-1])]
    return np.stack(steps)


def main(folder: Path, results: Path, record: Path | None = None) -> None:
    results.mkdir(parents=True)
    asked = json.loads((folder / "questions.json").read_text(encoding="utf-8"))
    for name in asked["bundles"]:
        found: dict[str, np.ndarray] = {}
        with VLM.load(folder / name, device="cpu", threads=1) as vlm:
            for number, (text, pictures) in enumerate(asked["questions"]):
                images = [folder / "pictures" / picture for picture in pictures]
                answer = vlm.generate(text, images, max_new_tokens=NEW_TOKENS, ignore_eos=True)
                tokens = np.array(answer.token_ids, np.int64)
                along = (
                    tokens
                    if record is None
                    else np.load(record / f"{name}.npz")[f"{number}.tokens"]
                )
                built = vlm.build_prompt(text, images)
                found[f"{number}.ids"] = np.array(built.token_ids)
                found[f"{number}.pixels"] = np.array(pixels(vlm, built))
                found[f"{number}.tokens"] = tokens
                found[f"{number}.logits"] = logits(vlm, built, along)
        np.savez(results / name, **found)  # type: ignore[arg-type]  # its names are data
    versions = {package: version(package) for package in VERSIONS}
    heavy = [package for package in HEAVY if package in sys.modules]
    said = {"machine": platform.machine(), "versions": versions, "heavy": heavy}
    (results / "machine.json").write_text(json.dumps(said, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
