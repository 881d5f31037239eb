"""The portable graph rewritten for an engine, over the same weights; one file an engine."""

from __future__ import annotations

from pathlib import Path

from vlm_edge.export.lowering import cpu, cuda, native
from vlm_edge.export.lowering.cpu import Windows


def lower(portable: Path, windows: Windows) -> dict[str, str]:
    """Write all lowered graphs beside the portable one.

    Args:
        windows: by mask input, how many keys a query sees (`runtime.feeds.windows`).

    Returns:
        File names by engine kind (`EngineEntry.lowered`).
    """
    lowered = {
        "cpu": cpu.lower(portable, windows),
        "cpu-native": native.lower(portable, windows),
        "cuda": cuda.lower(portable, windows),
    }
    return {kind: name for kind, name in lowered.items() if name is not None}
