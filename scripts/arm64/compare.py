"""Two machines' answers (`ask.py`): what has to be equal, how far the rest is apart, in a few lines."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

# Relative error of a step's logits. ONNX Runtime's kernels of two processors add in different orders
# (7e-6 as measured). Where activations are rounded to int8, one on the border between two values may fall
# either way, and a step is then 0.1 % to 3 % off: so it is on x86-64 alone when embeddings change by 1e-6.
FULL, QUANTIZED = 5e-5, 6e-2


@dataclass
class Precision:
    """What was found of all bundles of one precision."""

    answers: int = 0
    steps: int = 0
    exact: int = 0  # steps as near as in full precision
    worst: float = 0.0
    tied: list[str] = field(default_factory=list)


def compare(record: Path, results: Path) -> tuple[list[str], list[str]]:
    """Lines that sum up, and lines that each name a failure."""
    found, failures = defaultdict[str, Precision](Precision), list[str]()
    for path in sorted(record.glob("*.npz")):
        precision = path.stem.rpartition("-")[2]
        with np.load(path) as expected, np.load(results / path.name) as answers:
            questions = [key.removesuffix(".ids") for key in expected if key.endswith(".ids")]
            for q in questions:
                mine = {key: answers[f"{q}.{key}"] for key in ("ids", "pixels", "tokens", "logits")}
                theirs = {key: expected[f"{q}.{key}"] for key in mine}
                name = f"{path.stem}, question {q}"
                failures += _one(name, mine, theirs, precision == "fp32", found[precision])
    lines = []
    for precision, sums in sorted(found.items()):
        same = f"{sums.answers - len(sums.tied)} of {sums.answers} answers have the same tokens"
        near = f"{sums.exact} of {sums.steps} steps' logits within {FULL:.0e}, the worst {sums.worst:.1e}"
        lines += [f"{precision}: {same}; {near}", *sums.tied]
    return lines, failures


def _one(
    name: str,
    mine: dict[str, np.ndarray],
    theirs: dict[str, np.ndarray],
    full: bool,
    sums: Precision,
) -> Iterator[str]:
    for key, what in (("ids", "the prompt's tokens"), ("pixels", "preprocessed pictures")):
        if not np.array_equal(mine[key], theirs[key]):
            yield f"{name}: {what} differ"
            return
    distance = np.linalg.norm(mine["logits"] - theirs["logits"], axis=1)
    errors = distance / np.linalg.norm(theirs["logits"], axis=1)
    tolerance = FULL if full else QUANTIZED
    sums.answers += 1
    sums.steps += len(errors)
    sums.exact += int((errors <= FULL).sum())
    sums.worst = max(sums.worst, float(errors.max()))
    if not errors.max() <= tolerance:  # also where they are not numbers
        step = int(np.argmax(errors))
        yield f"{name}: logits of step {step} differ by {errors[step]:.1e} (tolerance {tolerance:.0e})"
    different = np.flatnonzero(mine["tokens"] != theirs["tokens"])
    if not different.size:
        return
    step = int(different[0])
    ours, other = int(mine["tokens"][step]), int(theirs["tokens"][step])
    logits = theirs["logits"][step]
    gap = float(logits[other] - logits[ours])
    apart = float(np.abs(mine["logits"][step] - logits).max())
    said = (
        f"{name}: token {step} differs, its two best logits are {gap:.2g} apart (error {apart:.2g})"
    )
    if full or gap > 2 * apart:
        yield said
    else:
        sums.tied.append(f"  {said}")
