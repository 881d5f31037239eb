"""A bench report as a table for the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vlm_edge.benchmarks.schema import Figure, Measured, Report, Spread

if TYPE_CHECKING:
    from rich.table import Table

ROWS = {
    "load_s": "load, s",
    "preprocess_ms": "preprocess, ms",
    "vision_ms": "vision, ms",
    "connector_ms": "connector, ms",
    "prefill_ms": "prefill, ms",
    "ttft_ms": "first token, ms",
    "prefill_tokens_per_s": "prefill, tokens/s",
    "decode_tokens_per_s": "decode, tokens/s",
    "peak_rss_mb": "peak memory, MB",
    "bundle_mb": "bundle, MB",
}


def table(report: Report) -> Table:
    """One column per bundle with median, p90 and p99; with two bundles their ratio."""
    from rich.table import Table

    made = Table(title=title(report), title_justify="left", caption=_machine(report.machine))
    made.add_column("")
    ratios = report.ratios()
    sides = [report.measured] + ([report.against] if report.against else [])
    for side in sides:
        made.add_column(heading(side), justify="right")
        if len(sides) == 1:
            made.add_column("p90", justify="right")
            made.add_column("p99", justify="right")
    if ratios:
        made.add_column("ratio", justify="right")
    for name, label in ROWS.items():
        cells = []
        for side in sides:
            figure = side.figures[name]
            cells.append(middle(figure))
            if len(sides) == 1:
                slow = (figure.p90, figure.p99) if isinstance(figure, Spread) else ()
                cells += [number(value) for value in slow] or ["", ""]
        if ratios:
            cells.append(middle(ratios[name]))
        made.add_row(label, *cells)
    return made


def _machine(machine: dict[str, Any]) -> str:
    kernels = machine.get("kernels")
    return machine["name"] + (f", kernels of {kernels}" if kernels else "")


def title(report: Report) -> str:
    settings = report.settings
    tiles = f" of {settings['tiles']} tiles" if settings["tiles"] > 1 else ""
    return (
        f"{settings['prompt_tokens']} prompt tokens ({settings['visual_tokens']} visual{tiles}), "
        f"{settings['new_tokens']} new; median of {settings['runs']} runs"
    )


def heading(side: Measured) -> str:
    kinds = sorted(set(side.bundle["precisions"].values()))
    return f"{side.bundle['name']} ({'/'.join(kinds)})"


def middle(figure: Figure) -> str:
    return number(figure.median if isinstance(figure, Spread) else figure)


def number(value: float | None) -> str:
    """Three significant digits, or whole numbers from a hundred up."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
