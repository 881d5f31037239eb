"""Quantized language models beside full precision: how far their next tokens are, on held-out prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from vlm_edge.calibration.divergence import divergence
from vlm_edge.errors import CalibrationError
from vlm_edge.export import fold, graphs
from vlm_edge.export.layerwise import States, last_positions, runner, session_runner
from vlm_edge.export.model import Part
from vlm_edge.export.quantizers import Float, Quantizer
from vlm_edge.export.static import Progress
from vlm_edge.runtime.manifest import DecoderSettings


@dataclass(frozen=True)
class Judge:
    """Writes a quantized model and compares its logits with full precision's on held-out prompts."""

    settings: DecoderSettings
    embeds: Sequence[np.ndarray]
    reference: Sequence[np.ndarray]  # float32 [positions, vocab]

    @classmethod
    def of(
        cls,
        part: Part,
        settings: DecoderSettings,
        embeds: Sequence[np.ndarray],
        states: States,
        held_out: Sequence[int],
        scratch: Path,
    ) -> Judge:
        """From the states behind the last layer.

        Raises:
            CalibrationError: logits are not finite.
        """
        assert part.layers is not None
        run = runner(part.layers.build_head(Float()), settings, scratch / "head.onnx")
        reference = []
        for number, index in enumerate(held_out):
            exact = states[index]
            logits = run(exact, logit_positions=last_positions(exact.shape[1]))["logits"][0]
            if not np.isfinite(logits).all():
                raise CalibrationError(
                    "the llm part's logits are not finite in full precision; the checkpoint's weights "
                    "are damaged, or too large for float32"
                )
            np.save(scratch / f"logits.{number}.npy", logits)
            reference.append(np.load(scratch / f"logits.{number}.npy", mmap_mode="r"))
        return cls(settings, [embeds[index] for index in held_out], reference)

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
        run = session_runner(path, self.settings, frugal=False)
        found = (
            run(embed, logit_positions=last_positions(embed.shape[1]))["logits"][0]
            for embed in self.embeds
        )
        return asdict(divergence(zip(found, self.reference, strict=True)))


def unmet(name: str, budget: float, least: float) -> CalibrationError:
    """The sentence for a budget that no assignment meets."""
    return CalibrationError(
        f"{name} cannot be quantized within --budget {budget:g}: the least KL divergence reached is "
        f"{least:.3g} nats; raise --budget, or keep the part in more bits with --precision {name}=int8 "
        f"or {name}=fp32"
    )
