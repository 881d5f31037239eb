"""What the parity ladder found: one rung a measurement, and which of them diverges first."""

from __future__ import annotations

import json
import math
import os
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vlm_edge.errors import BundleDamaged
from vlm_edge.runtime.manifest import NAME, read_manifest

STAGES = (
    "token ids",
    "tiling",
    "pixels",
    "vision",
    "connector",
    "embeddings",
    "prefill logits",
    "greedy tokens",
)
TEXT_STAGES = ("token ids", "embeddings", "prefill logits", "greedy tokens")  # without pictures


@dataclass(frozen=True)
class Rung:
    """One comparison with the reference.

    Attributes:
        name: the stage, one of STAGES.
        probe: which prompt: "picture" or "text".
        layer: the first layer of the stage that diverges ("vision.layers.3"); None for the whole stage.
        metric: what `value` is, with its unit where it has one.
        value: the figure; smaller is closer, but for cosines and agreements.
        tolerance: largest value that passes; None where a figure is reported and nothing is decided
            (stages that hold or follow quantized engines).
        detail: what the figure leaves out, such as the first differing token.
    """

    name: str
    probe: str
    layer: str | None
    metric: str
    value: float
    tolerance: float | None
    detail: str = ""

    @property
    def ok(self) -> bool | None:
        """None where nothing is decided."""
        return None if self.tolerance is None else self.value <= self.tolerance


@dataclass(frozen=True)
class Report:
    """The ladder of one bundle against one checkpoint.

    Attributes:
        reference: what computed the truth, with its version.
        against: the checkpoint's name.
        precision: of each engine.
        prompts: the probes' texts by name.
        rungs: in the order they were climbed, probe by probe.
        note: what the comparison leaves out, if anything.
    """

    reference: str
    against: str
    precision: dict[str, str]
    prompts: dict[str, str]
    rungs: tuple[Rung, ...]
    note: str = ""

    @property
    def ok(self) -> bool:
        """Nothing that can be decided failed."""
        return all(rung.ok is not False for rung in self.rungs)

    @property
    def divergence(self) -> Rung | None:
        """The first rung that fails, the lowest of all probes; its layer where one is known."""
        failed = [rung for rung in self.rungs if rung.ok is False]
        return min(failed, key=lambda r: (STAGES.index(r.name), r.layer is None), default=None)

    def sentence(self) -> str:
        """The outcome for people."""
        return f"{self._outcome()}; {self.note}" if self.note else self._outcome()

    def _outcome(self) -> str:
        rung = self.divergence
        if rung is not None:
            where = f"{rung.name}, {rung.layer}" if rung.layer else rung.name
            extra = f" ({rung.detail})" if rung.detail else ""
            return (
                f"diverges at {where} on the {rung.probe} prompt: {rung.metric} {rung.value:.3g}, "
                f"tolerance {rung.tolerance:.3g}{extra}"
            )
        if set(self.precision.values()) == {"fp32"}:
            return f"every stage agrees with {self.reference}, the greedy tokens are the same"
        return f"every exact stage agrees with {self.reference}; quantized stages are reported"

    def to_json(self) -> dict[str, Any]:
        """Plain data for the manifest's `parity` key (docs/bundle.md)."""
        return {
            "reference": self.reference,
            "against": self.against,
            "precision": dict(self.precision),
            "prompts": dict(self.prompts),
            "ok": self.ok,
            "sentence": self.sentence(),
            "rungs": [
                {**asdict(rung), "value": _finite(rung.value), "ok": rung.ok} for rung in self.rungs
            ],
        }


def store(bundle: Path, report: Report) -> None:
    """Put the report under the manifest's `parity` key; the file is replaced in one step.

    Raises:
        BundleMissing, BundleDamaged: there is no readable manifest, or it may not be written.
    """
    read_manifest(bundle)
    path = bundle / NAME
    data = json.loads(path.read_text(encoding="utf-8"))
    data["parity"] = report.to_json()
    try:
        handle, name = tempfile.mkstemp(dir=bundle, prefix=f".{NAME}.")
        try:
            os.fchmod(handle, path.stat().st_mode & 0o777)  # mkstemp makes files private
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(data, file, indent=1, ensure_ascii=False)
                file.write("\n")
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise BundleDamaged(bundle, f"the report cannot be stored in {NAME} ({error})") from error


def _finite(value: float) -> float | str:
    # JSON has no infinity, and a divergence may be one.
    return value if math.isfinite(value) else str(value)
