"""Quantized language models beside full precision: how far next tokens are, on what was held out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from vlm_edge.calibration.divergence import divergence
from vlm_edge.errors import CalibrationError
from vlm_edge.export import fold, graphs
from vlm_edge.export.examples import Example, Examples
from vlm_edge.export.layerwise import States, runner, session_runner
from vlm_edge.export.model import Part
from vlm_edge.export.quantizers import Float, Quantizer
from vlm_edge.export.static import Progress
from vlm_edge.runtime.manifest import DecoderSettings


@dataclass(frozen=True)
class Judge:
    """Writes a quantized part and compares the logits that follow from it with full precision's, on the
    examples that are held out."""

    settings: DecoderSettings
    examples: Sequence[Example]
    reference: Sequence[np.ndarray]  # float32 [positions, vocab]

    @classmethod
    def of(cls, name: str, part: Part, examples: Examples, states: States, scratch: Path) -> Judge:
        """From the states behind the last layer.

        Raises:
            CalibrationError: logits are not finite.
        """
        assert part.layers is not None
        run = runner(part.layers.build_head(Float()), scratch / "head.onnx")
        reference = []
        for number, example in enumerate(examples.held_out, len(examples.used)):
            outputs = run(example.feeds(examples.settings, states[number]))
            logits = example.logits(outputs)
            if not np.isfinite(logits).all():
                raise CalibrationError(
                    f"the {name} part's logits are not finite in full precision; the checkpoint's "
                    "weights are damaged, or too large for float32"
                )
            np.save(scratch / f"logits.{number}.npy", logits)
            reference.append(np.load(scratch / f"logits.{number}.npy", mmap_mode="r"))
        return cls(examples.settings, examples.held_out, reference)

    def write(
        self,
        name: str,
        part: Part,
        quantizer: Quantizer,
        folder: Path,
        precision: str,
        progress: Progress,
    ) -> dict[str, float]:
        """Write `<name>.onnx`; its KL divergence (nats a token) and top-1 agreement."""
        model = part.build(quantizer)
        fold.into_norms(model.graph)
        fold.into_products(model.graph)
        path = folder / f"{name}.onnx"
        graphs.save(model, path, lambda done, of: progress(f"write {name} {precision}", done, of))
        # Not frugal: unpacked INT4 weights are twenty times slower.
        run = session_runner(path, frugal=False)
        found = (example.logits(run(example.feeds(self.settings))) for example in self.examples)
        return asdict(divergence(zip(found, self.reference, strict=True)))


def unmet(name: str, budget: float, least: float) -> CalibrationError:
    """The sentence for a budget that no assignment meets."""
    return CalibrationError(
        f"{name} cannot be quantized within --budget {budget:g}: the least KL divergence reached is "
        f"{least:.3g} nats; raise --budget, or keep the part in more bits with --precision {name}=int8 "
        f"or {name}=fp32"
    )
