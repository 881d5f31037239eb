"""`vlm plan`: the memory that a bundle's TensorRT engines will take, before anything is built."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vlm_edge.cli import options
from vlm_edge.cli.guard import Command
from vlm_edge.errors import SettingError

if TYPE_CHECKING:
    from vlm_edge.export.tensorrt.planner import Memory
    from vlm_edge.runtime.plans import FloatType


@click.command(cls=Command, short_help="Estimate what a bundle's TensorRT engines take.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--board",
    metavar="NAME",
    help="Refuse what a board such as orin-nano-8gb does not hold.  [default: this machine's free memory]",
)
@options.room
@click.option(
    "--tensorrt",
    "version",
    metavar="VERSION",
    help="That will build them, such as 10.3 (JetPack 6): before 10.15 it holds a language model's INT8 "
    "weights as floats.  [default: a newer one]",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def plan(
    bundle: Path,
    board: str | None,
    as_json: bool,
    float_type: FloatType,
    version: str | None,
    **sizes: Any,
) -> None:
    """Say what BUNDLE's TensorRT engines take of a device's memory, running and while they are built.

    The figures are estimates from above, from the graphs alone; nothing is built. What does not fit is
    an error that names the largest part.
    """
    from vlm_edge.export.lowering import trt10
    from vlm_edge.export.tensorrt import memory, planner
    from vlm_edge.export.tensorrt.build import BuildOptions, profile_of
    from vlm_edge.runtime.bundle import Bundle

    if version is not None and not re.fullmatch(r"\d+(\.\d+)+", version):
        raise SettingError(f"--tensorrt {version}; give at least two numbers, such as 10.3")
    manifest = Bundle(bundle).manifest
    free = memory.available() if board is None else planner.budget(board)
    profile = profile_of(manifest, BuildOptions(float_type=float_type, **sizes))
    old = version is not None and trt10.needed(version)
    found = planner.estimate(bundle, manifest, profile, unpacked=old)
    if as_json:
        click.echo(json.dumps(facts(found, free, board), indent=1))
    else:
        show(found, free, board, str(profile))
    planner.check(found, free, board or "this machine")


def facts(found: Memory, free: int, board: str | None) -> dict[str, Any]:
    """What `--json` prints; sizes in bytes."""
    engines = {
        e.name: {"weights": e.weights, "activations": e.activations, "building": e.building}
        for e in found.engines
    }
    return {
        "engines": engines,
        "cache": found.cache,
        "overhead": found.overhead,
        "running": found.running,
        "building": found.building,
        "board": board,
        "available": free,
    }


def show(found: Memory, free: int, board: str | None, profile: str) -> None:
    """The table in MB."""
    from rich.table import Table

    table = Table("", title=profile, title_justify="left")
    for name in ("weights", "activations", "while it is built"):
        table.add_column(f"{name}, MB", justify="right")
    for engine in found.engines:
        sizes = (engine.weights, engine.activations, engine.building)
        table.add_row(engine.name, *map(_mb, sizes))
    console = options.console()
    console.print(table)
    console.print(
        f"keys and values {_mb(found.cache)} MB, CUDA and the process {_mb(found.overhead)} MB"
    )
    where = board or "this machine"
    console.print(
        f"running {_mb(found.running)} MB, building {_mb(found.building)} MB at most; {where} has "
        f"{_mb(free)} MB for it"
    )


def _mb(size: int) -> str:
    return f"{size / 1e6:,.0f}" if size >= 100e6 else f"{size / 1e6:,.1f}"
