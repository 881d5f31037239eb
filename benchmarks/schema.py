"""What `vlm bench --json FILE` writes; docs/bench.md describes every key."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

SCHEMA = 1
TIMES = ("preprocess_ms", "vision_ms", "connector_ms", "prefill_ms", "ttft_ms")
RATES = ("prefill_tokens_per_s", "decode_tokens_per_s")
POWER = ("power_w", "energy_j", "energy_mj_per_token")
REPEATED = TIMES + RATES + POWER
ONCE = ("load_s", "peak_rss_mb", "bundle_mb")
FIGURES = ("load_s", *REPEATED, "peak_rss_mb", "bundle_mb")

Sample = dict[str, float]  # one run: a value of every figure of REPEATED that applies


@dataclass(frozen=True)
class Spread:
    """What repeated runs gave; p90 and p99 are at the slow end."""

    median: float
    p90: float
    p99: float


Figure = Spread | float | None


@dataclass(frozen=True)
class Measured:
    """One bundle: what it is, and its figures."""

    bundle: dict[str, Any]
    versions: dict[str, str]
    figures: dict[str, Figure]
    samples: list[Sample] = field(repr=False)

    def to_json(self) -> dict[str, Any]:
        figures = {name: _plain(self.figures[name]) for name in FIGURES}
        return {"bundle": self.bundle, "versions": self.versions, **figures}


@dataclass(frozen=True)
class Report:
    """The whole of a `vlm bench`."""

    date: str
    machine: dict[str, Any]
    settings: dict[str, Any]
    measured: Measured
    against: Measured | None = None
    power: dict[str, Any] = field(default_factory=dict)
    throttling: dict[str, Any] | None = None  # of a Jetson while the runs lasted

    def ratios(self) -> dict[str, Figure]:
        """The first bundle over the other: paired by run where the figure repeats."""
        if self.against is None:
            return {}
        mine, other = self.measured, self.against
        found: dict[str, Figure] = {}
        for name in REPEATED:
            pairs = zip(mine.samples, other.samples, strict=True)
            values = [a[name] / b[name] for a, b in pairs if a.get(name) and b.get(name)]
            found[name] = spread(name, values)
        for name in ONCE:
            a, b = mine.figures[name], other.figures[name]
            found[name] = a / b if isinstance(a, float) and isinstance(b, float) and b else None
        return found

    def to_json(self) -> dict[str, Any]:
        document = {
            "schema": SCHEMA,
            "date": self.date,
            "machine": self.machine,
            "settings": self.settings,
            "power": self.power,
            "throttling": self.throttling,
            **self.measured.to_json(),
        }
        if self.against is not None:
            document["against"] = self.against.to_json()
            document["ratios"] = {k: _plain(v) for k, v in self.ratios().items()}
        return document


def spread(name: str, values: Sequence[float]) -> Spread | None:
    """Median and slow-end percentiles, linearly interpolated; None where nothing was measured."""
    if not values:
        return None
    slow = (10, 1) if name in RATES else (90, 99)
    median, p90, p99 = (float(v) for v in np.percentile(values, (50, *slow)))
    return Spread(median, p90, p99)


def _plain(figure: Figure) -> Any:
    if isinstance(figure, Spread):
        return {name: _digits(value) for name, value in asdict(figure).items()}
    return None if figure is None else _digits(figure)


def _digits(value: float) -> float:
    """Four significant digits: more are noise."""
    return float(f"{value:.4g}")
