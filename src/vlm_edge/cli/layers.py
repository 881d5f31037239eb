"""The layers of quantized parts as tables: by kind for `vlm export`, one by one for `vlm info`."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

Layers = Mapping[str, Mapping[str, Any]]  # by path, as the manifest has them (docs/bundle.md)
Parts = Mapping[str, Mapping[str, Any]]  # by name, `calibration.parts` of the manifest


def by_kind(parts: Parts) -> Table:
    """A row for the layers that have the same place in every block, times added up over them; and a
    row for all layers of a part, with the error of the whole."""
    table = _table("layers", "stored in", "largest error", "ms in float", "ms as written")
    table.add_column("kept in more bits")
    for part, entry in parts.items():
        kinds: dict[str, dict[str, Mapping[str, Any]]] = {}
        for path, layer in entry.get("layers", {}).items():
            kinds.setdefault(place(path)[1], {})[path] = layer
        for kind, layers in kinds.items():
            worst = max(layers, key=lambda path: layers[path]["error"])
            block, error = place(worst)[0], _error(entry, layers[worst]["error"])
            table.add_row(
                f"{part} {kind}",
                _stored(layers),
                f"{error} in {block}" if block and len(layers) > 1 else error,
                *_times(layers),
                kept(layers),
            )
        if len(kinds) > 1:
            every = entry["layers"]
            whole = entry.get("relative_error", entry.get("kl"))
            error = "" if whole is None else f"together {_error(entry, whole)}"
            table.add_row(f"{part}, all", _stored(every), error, *_times(every), "", style="bold")
        table.add_section()
    return table


def one_by_one(parts: Parts) -> Table:
    """A row for every layer."""
    table = _table("layer", "precision", "error", "ms float", "ms quantized")
    table.add_column("why not in fewer bits")
    for part, entry in parts.items():
        for path, layer in entry.get("layers", {}).items():
            together = layer.get("measured_with", 1)
            error = _error(entry, layer["error"])
            table.add_row(
                f"{part} {'.'.join(filter(None, place(path)))}",
                layer["precision"],
                error if together == 1 else f"{error} with {together - 1} more",
                *(
                    f"{layer[key]:.3g}" if key in layer else ""
                    for key in ("ms_float", "ms_quantized")
                ),
                layer.get("reason", ""),
            )
        table.add_section()
    return table


def untimed(target: str) -> str:
    """The sentence for layers that were quantized for an engine that is elsewhere."""
    return (
        f"Quantized for {target}, by their errors alone: what layers take there was not measured."
    )


def place(path: str) -> tuple[str, str]:
    """Block and kind: `vision_tower.encoder.layers.3.mlp.fc1` -> ("3", "mlp.fc1"); a layer outside of
    blocks has none."""
    found = re.fullmatch(r".*?\.(\d+)\.(.*)", path)
    return (found[1], found[2]) if found else ("", path.partition(".")[2] or path)


def kept(layers: Layers) -> str:
    """Which layers kept more bits than were asked for, by reason: `0, 9: budget`."""
    reasons: dict[str, list[str]] = {}
    for path, layer in layers.items():
        if "reason" in layer:
            reasons.setdefault(layer["reason"], []).append(place(path)[0])
    return "; ".join(
        reason if len(blocks) == len(layers) else f"{_ranges(blocks)}: {reason}"
        for reason, blocks in reasons.items()
    )


def _stored(layers: Layers) -> str:
    """`8 int8, 2 fp32`"""
    counts = Counter(layer["precision"] for layer in layers.values())
    return ", ".join(f"{count} {precision}" for precision, count in counts.most_common())


def _times(layers: Layers) -> tuple[str, str]:
    """Milliseconds of all layers in float, and in the precision each of them has; nothing where they were
    not timed."""
    rows = layers.values()
    if not all("ms_float" in row for row in rows):
        return "", ""
    exact = sum(row["ms_float"] for row in rows)
    written = sum(row["ms_float" if row["precision"] == "fp32" else "ms_quantized"] for row in rows)
    return f"{exact:.2f}", f"{written:.2f}"


def _ranges(blocks: Iterable[str]) -> str:
    """`0-3, 7` for 0, 1, 2, 3, 7."""
    runs: list[list[int]] = []
    for number in map(int, filter(str.isdigit, blocks)):
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def _error(part: Mapping[str, Any], error: float) -> str:
    return f"{error:.2g} nats" if "kl" in part else f"{error:.2%}"


def _table(first: str, *others: str) -> Table:
    from rich.table import Table

    table = Table()
    table.add_column(first, overflow="fold")  # a Q-Former's paths differ in their ends
    for name in others:
        table.add_column(name, justify="right")
    return table
