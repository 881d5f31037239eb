"""What calibration exercised, and what it never did: facts for the manifest, and warnings.

Only the items that set something count; those held out measure the error and exercise nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from statistics import median
from typing import Any

from vlm_edge.calibration.data import CalibrationSet, Prompt
from vlm_edge.runtime.tiling.plan import Tiler
from vlm_edge.runtime.tokenizer import Tokenizer

LONG = 128  # tokens of a text: about a paragraph; shorter ones leave later positions unseen
EXTREME = 2  # an aspect ratio beyond 1:2 or 2:1
UNBOUNDED = (
    "calibration cannot exercise every tiling: this model scales pictures to no fixed size "
    "(longest_edge is null), so larger ones have ever more tiles"
)


def audit(data: CalibrationSet, tiler: Tiler) -> tuple[dict[str, Any], list[str]]:
    """What the calibration data is, and what its pictures lack.

    Args:
        tiler: of the model, which decides what tiles a picture becomes.

    Returns:
        The manifest's `calibration.data`, and one sentence for each path never exercised.
    """
    sizes = [size for index, size in enumerate(data.sizes) if index not in data.held_out]
    plans = [tiler.plan(*size) for size in sizes]
    tiles, grids = Counter(plan.tiles for plan in plans), Counter(plan.name for plan in plans)
    shapes = aspect_ratios(sizes)
    facts: dict[str, Any] = {
        "sha256": data.sha256, "pictures": len(data.paths), "prompts": len(data.prompts),
        "held_out": len(data.held_out), "held_out_prompts": len(data.held_out_prompts),
        "aspect_ratios": shapes, "tiles": {str(n): tiles[n] for n in sorted(tiles)},
        "tilings": {name: grids[name] for name in sorted(grids)},
    }  # fmt: skip
    lacking = [f"no {shape} picture" for shape in ("portrait", "landscape") if not shapes[shape]]
    unseen = [name for name in tiler.grids() if name not in grids]
    if len(tiler.grids()) > 1 and not shapes["extreme"]:
        lacking.append("no picture beyond 1:2 or 2:1")
    if unseen:
        lacking.append(f"no picture of the tilings {', '.join(unseen)} (rows x columns)")
    warnings = _sentences(lacking)
    return facts, warnings if tiler.grids() else [*warnings, UNBOUNDED]


def audit_prompts(
    prompts: Sequence[Prompt], tokenizer: Tokenizer
) -> tuple[dict[str, Any], list[str]]:
    """The same of the prompts that a language model was calibrated on.

    Args:
        tokenizer: measures texts, without template and pictures.

    Returns:
        More of `calibration.data`, and one sentence for each path never exercised.
    """
    lengths = [len(tokenizer.encode(p.text, add_special_tokens=False)) for p in prompts]
    counts = [len(prompt.pictures) for prompt in prompts]
    pictures = {
        "none": sum(n == 0 for n in counts),
        "one": sum(n == 1 for n in counts),
        "several": sum(n > 1 for n in counts),
    }
    tokens = {"min": min(lengths), "median": median(lengths), "max": max(lengths)}
    lacking = []
    if not pictures["none"]:
        lacking.append("no text without a picture (texts.txt)")
    if not pictures["one"] + pictures["several"]:
        lacking.append("no prompt with a picture (prompts.jsonl)")
    elif not pictures["several"]:
        lacking.append('no prompt with several pictures (prompts.jsonl, "images")')
    if max(lengths) < LONG:
        lacking.append(
            f"no text of {LONG} tokens or more; the longest has {max(lengths)} (texts.txt)"
        )
    return {"prompt_pictures": pictures, "text_tokens": tokens}, _sentences(lacking)


def aspect_ratios(sizes: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """Pictures by shape, those beyond 1:2 or 2:1 among them, and the least and largest ratio."""
    ratios = [width / height for width, height in sizes]
    return {
        "portrait": sum(ratio < 1 for ratio in ratios),
        "square": sum(ratio == 1 for ratio in ratios),
        "landscape": sum(ratio > 1 for ratio in ratios),
        "extreme": sum(max(ratio, 1 / ratio) > EXTREME for ratio in ratios),
        "narrowest": round(min(ratios), 3),
        "widest": round(max(ratios), 3),
    }


def _sentences(lacking: Sequence[str]) -> list[str]:
    return [f"calibration had {what}" for what in lacking]
