"""What was measured as a document, a table for the terminal and a table for a page."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import numpy as np

from vlm_edge.benchmarks import machine
from vlm_edge.benchmarks.peers.limits import Limits
from vlm_edge.benchmarks.peers.measure import Row, Settings, ours_alike
from vlm_edge.benchmarks.peers.models import Model
from vlm_edge.benchmarks.table import number

if TYPE_CHECKING:
    from rich.table import Table

SCHEMA = 1
HEADS = {
    "language": ("prefill tok/s", "of floor", "ours is", "decode tok/s", "of floor", "ours is"),
    "vision": ("ms", "of floor", "ours is"),
}
LAST = ("memory MB (private)", "same")


@dataclass(frozen=True)
class Figure:
    """Median of the rounds with the lowest and highest, and how it stands to ours and to the floor.

    Attributes:
        share: of what the machine allows, 1 is the floor itself; None where that is unknown.
        ours: our speed over this one, paired by round: above 1 ours is quicker; None without ours.
    """

    median: float
    low: float
    high: float
    share: float | None
    ours: float | None


@dataclass(frozen=True)
class Compared:
    """All peers on one model."""

    model: Model
    rows: Sequence[Row]
    limits: Limits | None
    settings: Settings

    def figures(self, row: Row) -> dict[str, Figure]:
        """By name: prefill_tokens_per_s and decode_tokens_per_s, or encode_ms."""
        if not row.samples:
            return {}
        settings, config, limits = self.settings, self.model.config, self.limits
        if self.model.kind == "vision":
            best = limits.vision(config, row.bits) * 1e3 if limits else None
            return {"encode_ms": self._figure(row, lambda s: s["encode_s"] * 1e3, best, False)}
        context, steps = settings.context, settings.steps
        fill = context / limits.prefill(config, row.bits, context) if limits else None
        step = limits.decode(config, row.bits, context) if limits else None
        return {
            "prefill_tokens_per_s": self._figure(
                row, lambda s: context / s["prefill_s"], fill, True
            ),
            "decode_tokens_per_s": self._figure(row, lambda s: steps / s["decode_s"], step, True),
        }

    def _figure(
        self,
        row: Row,
        value: Callable[[dict[str, float]], float],
        best: float | None,
        rate: bool,
    ) -> Figure:
        values = np.array([value(sample) for sample in row.samples])
        median = float(np.median(values))
        share = (median / best if rate else best / median) if best else None
        mine = ours_alike(row, self.rows)
        ours = None
        if mine is not None:
            ratios = np.array([value(sample) for sample in mine.samples]) / values
            ours = float(np.median(ratios if rate else 1 / ratios))
        return Figure(median, float(values.min()), float(values.max()), share, ours)

    def agreement(self, row: Row) -> float | None:
        """How alike its answer is to full precision's.

        Of a language model the share of its greedy tokens before the first other one; of an encoder
        the cosine of its output.
        """
        reference = next((r for r in reversed(self.rows) if r.bits == "fp32" and r.samples), None)
        if reference is None or not row.samples:
            return None
        if row.tokens is not None and reference.tokens is not None:
            pairs = zip(row.tokens, reference.tokens, strict=True)
            return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs)) / len(
                row.tokens
            )
        if row.states is not None and reference.states is not None:
            tokens = min(row.states.shape[1], reference.states.shape[1])  # ours has no class token
            a, b = (s[:, -tokens:].ravel().astype(float) for s in (row.states, reference.states))
            return float(a @ b / np.sqrt((a @ a) * (b @ b)))
        return None

    def to_json(self) -> dict[str, Any]:
        made = []
        for row in self.rows:
            figures = {k: _digits(asdict(v)) for k, v in self.figures(row).items()}
            made.append(
                {
                    "peer": row.title,
                    "variant": row.variant,
                    "bits": row.bits,
                    "problem": row.problem,
                    "versions": row.versions,
                    "load_s": row.load_s,
                    "peak_rss_mb": _mb(row.memory.get("VmHWM")),
                    "peak_rss_anon_mb": _mb(row.memory.get("RssAnon")),
                    "agreement": self.agreement(row),
                    "figures": figures,
                    "samples": row.samples,
                }
            )
        return {"name": self.model.name, "kind": self.model.kind, "rows": made}

    def cells(self, row: Row) -> list[str]:
        """A line of the table: peer, variant, figures; or the problem in place of the figures."""
        heads = HEADS[self.model.kind]
        if row.problem is not None:
            return [row.title, row.variant, row.problem, *[""] * (len(heads) + len(LAST) - 1)]
        cells = [row.title, row.variant]
        for figure in self.figures(row).values():
            off = (figure.high - figure.low) / 2 / figure.median
            cells.append(f"{number(figure.median)} ±{off:.0%}")
            cells.append("" if figure.share is None else f"{figure.share:.0%}")
            cells.append("" if figure.ours is None else f"{figure.ours:.2f}")
        resident, private = row.memory.get("VmHWM"), row.memory.get("RssAnon")
        cells.append(f"{number(_mb(resident))} ({number(_mb(private))})")
        same = self.agreement(row)
        if same is None:
            return [*cells, ""]
        if row.tokens is not None:
            return [*cells, f"{round(same * len(row.tokens))}/{len(row.tokens)}"]
        return [*cells, f"{same:.4f}"]

    def headings(self) -> list[str]:
        return ["", "weights", *HEADS[self.model.kind], *LAST]


def document(compared: Sequence[Compared]) -> dict[str, Any]:
    """What `--json` writes."""
    first = compared[0]
    return {
        "schema": SCHEMA,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": machine.describe(),
        "limits": None if first.limits is None else _digits(asdict(first.limits)),
        "settings": asdict(first.settings),
        "models": [one.to_json() for one in compared],
    }


def table(compared: Compared) -> Table:
    """For the terminal."""
    from rich.table import Table

    made = Table(title=title(compared), title_justify="left", caption=machine.describe()["name"])
    for index, heading in enumerate(compared.headings()):
        made.add_column(heading, justify="left" if index < 2 else "right")
    for row in compared.rows:
        made.add_row(*compared.cells(row))
    return made


def markdown(compared: Compared) -> str:
    """For docs/performance.md; our rows are in bold."""
    headings = compared.headings()
    lines = [f"### {compared.model.title}", "", f"{title(compared, short=True)}.", ""]
    lines.append("| " + " | ".join(headings) + " |")
    lines.append("|---|---|" + "---:|" * (len(headings) - 2))
    for row in compared.rows:
        cells = compared.cells(row)
        if row.peer == "ours":
            cells = [f"**{cell}**" if cell and n < 2 else cell for n, cell in enumerate(cells)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def title(compared: Compared, short: bool = False) -> str:
    """What was done, in a line."""
    settings = compared.settings
    threads = f"{settings.threads} threads, median ± half the range of {settings.rounds} rounds"
    name = "" if short else f"{compared.model.title}: "
    if compared.model.kind == "vision":
        return f"{name}one picture, {threads}"
    return f"{name}prompt {settings.context}, {settings.steps} tokens decoded, {threads}"


def _mb(size: int | None) -> float | None:
    return None if size is None else round(size / 1e6, 1)


def _digits(value: Any) -> Any:
    """Four significant digits: more are noise."""
    if isinstance(value, dict):
        return {key: _digits(inner) for key, inner in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value
