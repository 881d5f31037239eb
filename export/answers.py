"""What an encoder-decoder is calibrated on: prompts for its encoder, and its own answers for its decoder.

The model in full precision answers the prompts, so that the decoder sees what it will see when it runs.
The encoder is judged by the logits of the decoder in full precision over what the quantized encoder gives.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vlm_edge.export.checkpoint import TensorRef
from vlm_edge.export.examples import Arrays, Example, Examples, own_logits
from vlm_edge.export.layerwise import Run, runner
from vlm_edge.export.model import Part
from vlm_edge.export.quantizers import Float
from vlm_edge.export.static import Progress
from vlm_edge.runtime.manifest import DecoderSettings

LONGEST = 24  # tokens of an answer


def answered(
    parts: dict[str, Part],
    prompts: Examples,
    table: TensorRef,
    ends: Collection[int],
    scratch: Path,
    progress: Progress,
) -> dict[str, Examples]:
    """Examples for `llm_encoder` and for `llm`, of the same prompts.

    Both graphs in full precision lie in `scratch` until it goes, with what the encoder gives for each
    prompt; all are mapped, not loaded.

    Args:
        parts: the two, by name.
        prompts: what the encoder reads.
        table: the token table [vocab, width].
        ends: tokens that end an answer.
    """
    encode, decode = (
        runner(parts[name].build(Float()), scratch / f"{name}_answers.onnx")
        for name in ("llm_encoder", "llm")
    )
    settings, every = prompts.settings, list(prompts)
    names = [spec.name for spec in settings.cross()]
    reader, writer = list[Example](), list[Example]()
    for index, prompt in enumerate(every):
        found = encode({"inputs_embeds": prompt.embeds})
        path = scratch / f"cross.{index}.npy"
        np.save(path, np.stack([found[name] for name in names]))
        kept = _Kept(path, names)
        answer = Example(_greedy(decode, settings, table, ends, kept), kept)
        writer.append(answer)
        reader.append(Example(prompt.embeds, logits=_Follow(decode, settings, answer.embeds)))
        progress("answer prompts", index + 1, len(every))
    held_out = range(len(prompts.used), len(every))
    return {
        "llm_encoder": Examples.split(settings, reader, held_out),
        "llm": Examples.split(settings, writer, held_out),
    }


@dataclass(frozen=True)
class _Kept:
    """Arrays of one shape in a file, by name."""

    path: Path
    names: Sequence[str]

    def __call__(self) -> Arrays:
        return dict(zip(self.names, np.load(self.path, mmap_mode="r"), strict=True))


@dataclass(frozen=True)
class _Follow:
    """The decoder's logits of an answer that is given, over what the encoder gives."""

    decode: Run
    settings: DecoderSettings
    answer: np.ndarray

    def __call__(self, cross: Arrays) -> np.ndarray:
        example = Example(self.answer, lambda: cross)
        return own_logits(self.decode(example.feeds(self.settings)))


def _greedy(
    decode: Run,
    settings: DecoderSettings,
    table: TensorRef,
    ends: Collection[int],
    cross: Callable[[], Arrays],
) -> np.ndarray:
    """inputs_embeds float32 [1, n, width] that give the answer's n tokens, one after the other."""
    assert settings.start_token_id is not None, "an encoder-decoder has a start token"
    tokens = [settings.start_token_id]
    while True:
        embeds = np.array(table.view[tokens], np.float32)[None]
        # As a whole each time: answers are short, and reading the weights takes the time.
        best = int(own_logits(decode(Example(embeds, cross).feeds(settings)))[-1].argmax())
        if best in ends or len(tokens) == LONGEST:
            return embeds
        tokens.append(best)
