"""A bench report as a table for the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vlm_edge.benchmarks.schema import POWER, Figure, Measured, Report, Spread

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
    "power_w": "power, W",
    "energy_j": "energy, J",
    "energy_mj_per_token": "decode, mJ/token",
    "peak_rss_mb": "peak memory, MB",
    "bundle_mb": "bundle, MB",
}


def table(report: Report) -> Table:
    """One column per bundle with median, p90 and p99; with two bundles their ratio."""
    from rich.table import Table

    made = Table(title=title(report), title_justify="left", caption=_caption(report))
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
    unknown = {n for n in POWER if all(side.figures[n] is None for side in sides)}
    for name, label in ROWS.items():
        if name in unknown:
            continue  # the caption says why
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


def _caption(report: Report) -> str:
    """The machine, how it ran, and what the power is of."""
    lines = [_machine(report.machine)]
    slowed = report.throttling or {}
    events = [f"{name} {count} times" for name, count in slowed.get("overcurrent", {}).items()]
    if found := [*slowed.get("active", []), *events]:
        lines.append(f"throttled: {', '.join(found)}")
    power = report.power
    if power.get("reason"):
        lines.append(f"no power: {power['reason']}")
    elif power.get("source"):
        idle = f", {number(power['idle_w'])} W idle" if power["idle_w"] else ""
        lines.append(f"power: {power['covers']}{idle}")
    return "\n".join(lines)


def _machine(machine: dict[str, Any]) -> str:
    parts = [machine["name"]]
    if board := machine.get("jetson"):
        parts.append(f"JetPack {board['jetpack']} (L4T {board['l4t']}), {board['power_mode']}")
    if kernels := machine.get("kernels"):
        parts.append(f"kernels of {kernels}")
    return ", ".join(parts)


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
