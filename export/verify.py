"""`vlm verify`: a bundle against the checkpoint it was made of, in transformers and float32."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vlm_edge.errors import CheckpointMissing, VerificationError
from vlm_edge.export.verification.ladder import Probe, climb
from vlm_edge.export.verification.report import STAGES, TEXT_STAGES, Report, Rung, store
from vlm_edge.runtime.manifest import Manifest
from vlm_edge.runtime.tiling.plan import UNLIMITED, TileLimits
from vlm_edge.runtime.tiling.settings import Overlap
from vlm_edge.runtime.vlm import VLM

__all__ = ["Report", "Rung", "store", "verify"]

PICTURE = Path(__file__).with_name("demo_data") / "held_out.png"
QUESTIONS = {"picture": "What is in the picture?", "text": "What is the capital of France?"}
NEW_TOKENS = 16
OVERVIEW_ALONE = (
    "pictures were compared with --max-tiles 1, their overview alone: "
    "the checkpoint has no overlapping tiles"
)

Progress = Callable[[str, int, int], Any]  # what is done, steps done, steps in all


def verify(
    bundle: str | Path,
    against: str | Path,
    images: Sequence[Path] | None = None,
    prompt: str | None = None,
    new_tokens: int = NEW_TOKENS,
    progress: Progress | None = None,
) -> Report:
    """Climb the ladder twice: with pictures and without.

    Args:
        bundle: the folder `vlm export` wrote.
        against: the checkpoint's folder or Hub name.
        images: None takes the built-in held-out picture.
        prompt: asked with and without the images; None takes the built-in questions. It goes through
            the chat template where the checkpoint has one.
        new_tokens: of the greedy answers.
        progress: called with what is done, steps done and steps in all.

    Raises:
        ExtraMissing: torch or transformers is not installed.
        CheckpointMissing: transformers cannot load the checkpoint.
        VerificationError: no reference exists for the bundle's architecture.
        BundleError, DeviceError, ImageError, PromptError: the bundle cannot be run.
    """
    with VLM.load(bundle, device="cpu") as vlm:
        probes = _probes(vlm, images, prompt)
        steps = _Steps(progress, sum(len(STAGES if p.images else TEXT_STAGES) for p in probes))
        reference = _reference(vlm.manifest.architecture, against)
        rungs: list[Rung] = []
        for probe in probes:
            for rung in climb(vlm, reference, probe, new_tokens):
                steps(rung.name)
                rungs.append(rung)
    return Report(
        reference=reference.name,
        against=Path(against).resolve().name if Path(against).is_dir() else str(against),
        precision=precisions(vlm.manifest),
        prompts={probe.name: probe.text for probe in probes},
        rungs=tuple(rungs),
        note=OVERVIEW_ALONE if _overlapping(vlm.manifest) else "",
    )


def _overlapping(manifest: Manifest) -> bool:
    return isinstance(manifest.tiling, Overlap)


def precisions(manifest: Manifest) -> dict[str, str]:
    """Of each engine; a rounded cache is named, since it makes no engine "fp32"."""
    found = {name: str(engine.precision) for name, engine in manifest.engines.items()}
    if manifest.decoder.cache_dtype != "float32":
        found["llm"] += f", {manifest.decoder.cache_dtype} cache"
    return found


class _Steps:
    """Counts stages for the progress callback; several rungs of one stage are one step."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress, self._total = progress, total
        self._done, self._last = 0, ""
        if progress is not None:
            progress("verify", 0, total)

    def __call__(self, name: str) -> None:
        if name != self._last:
            self._done, self._last = self._done + 1, name
            if self._progress is not None:
                self._progress("verify", self._done, self._total)


def _reference(architecture: str, against: str | Path) -> Any:
    """The architecture's `Reference`, in its own file under verification/."""
    name = f"vlm_edge.export.verification.{architecture}"
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise VerificationError(
            f"there is no reference for architecture {architecture!r}"
        ) from error
    try:
        return module.Reference(against)
    except (OSError, ValueError) as error:
        first = " ".join(str(error).split())
        raise CheckpointMissing(against, f"transformers cannot load it ({first})") from error


def _probes(vlm: VLM, images: Sequence[Path] | None, prompt: str | None) -> list[Probe]:
    template = vlm.manifest.prompt.chat_template is not None
    pictures = tuple(Path(image) for image in images) if images is not None else (PICTURE,)
    # Of overlapping tiles the checkpoint knows nothing; their overview is its single tile.
    limits = TileLimits(max_tiles=1) if _overlapping(vlm.manifest) else UNLIMITED
    asked = vlm.manifest.prompt
    # The template or the processor makes the places.
    first = template or asked.visual_tokens_first or asked.interleave is not None
    places = "" if first else f"{asked.image_token}\n" * len(pictures)
    probes = [Probe("text", prompt or QUESTIONS["text"], (), template)]
    if pictures:
        text = places + (prompt or QUESTIONS["picture"])
        probes.insert(0, Probe("picture", text, pictures, template, limits))
    for probe in probes:  # our own sentence for a bad picture or prompt, before the reference's
        built = vlm.build_prompt(probe.text, probe.images, probe.template, probe.limits)
        for picture in built.pictures:
            vlm.pixels(picture)
    return probes
