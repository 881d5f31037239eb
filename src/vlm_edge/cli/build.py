"""`vlm build`: a bundle's TensorRT engines for one GPU."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click

from vlm_edge.cli import options
from vlm_edge.cli.guard import Command

if TYPE_CHECKING:
    from vlm_edge.export.tensorrt.build import BuildOptions, BuildReport, EngineReport
    from vlm_edge.runtime.plans import FloatType

# As runtime/trt.py has them (a test says so); importing it here would slow every command's start.
DEVICES = ("tensorrt", "tensorrt-rtx")
MEGABYTE = 1_000_000


@click.command(cls=Command, short_help="Build a bundle's TensorRT engines.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--device",
    type=click.Choice(DEVICES),
    required=True,
    help="tensorrt: Jetson's and servers', for this machine's GPU. tensorrt-rtx: RTX cards', for any "
    "GPU, on a machine without one too.",
)
@options.compute_capability
@click.option(
    "-o",
    "--output",
    "folder",
    type=click.Path(path_type=Path, file_okay=False),
    help="The folder of the plans.  [default: BUNDLE.plans, beside the bundle]",
)
@options.room
@click.option(
    "--workspace",
    type=click.IntRange(min=1),
    metavar="MB",
    help="Memory a layer may use for itself.  [default: from the memory that is free]",
)
@click.option(
    "--force",
    is_flag=True,
    help="Build though the estimate (`vlm plan`) says that memory is short.",
)
def build(
    bundle: Path,
    device: str,
    compute_capability: str | None,
    folder: Path | None,
    capacity: int | None,
    chunk: int | None,
    tiles: int | None,
    images: int | None,
    float_type: FloatType,
    workspace: int | None,
    force: bool,
) -> None:
    """Build the TensorRT engines of BUNDLE, one after another.

    A plan runs on the GPU generation, TensorRT version and system it was built for, with room for what
    the options say. Plans that are there already are kept.
    """
    from vlm_edge.export.tensorrt.build import BuildOptions

    asked = BuildOptions(
        float_type=float_type,
        capacity=capacity,
        chunk=chunk,
        tiles=tiles,
        images=images,
        workspace=None if workspace is None else workspace * MEGABYTE,
        force=force,
    )
    run(bundle, device, compute_capability, folder, asked)


def run(
    bundle: Path,
    device: str,
    compute_capability: str | None,
    folder: Path | None = None,
    asked: BuildOptions | None = None,
) -> None:
    """Build and print the table."""
    from vlm_edge.export.tensorrt.build import build as build_engines

    with options.progress_bars() as progress:
        report = build_engines(bundle, device, compute_capability, folder, asked, progress)
    show(report, bundle, device, folder)


def show(report: BuildReport, bundle: Path, device: str, folder: Path | None) -> None:
    """The closing table, and how to go on."""
    from rich.table import Table

    table = Table("engine", "precision")
    for name in ("MB", "seconds", "INT8 products", "peak MB"):
        table.add_column(name, justify="right")
    for engine in report.engines:
        table.add_row(engine.engine, engine.precision, f"{engine.size / 1e6:,.1f}", *_facts(engine))
    console = options.console()
    console.print(table)
    for why, engines in _reasons(report).items():
        console.print(f"{', '.join(engines)}: {why}", soft_wrap=True, markup=False, highlight=False)
    for engine in report.engines:
        if engine.done is not None and engine.done.unpacked:
            click.echo(f"warning: {unpacked(engine.engine, engine.done.unpacked)}", err=True)
    console.print(
        f"{report.tensorrt}, compute capability {report.compute_capability}, {report.profile}",
        soft_wrap=True,
        markup=False,
        highlight=False,
    )
    plans = "" if folder is None else f" --plans {shlex.quote(str(folder))}"
    console.print(
        f"Ask it: vlm run {shlex.quote(str(bundle))} PICTURE -p QUESTION --device {device}{plans}",
        soft_wrap=True,
        markup=False,
    )


def unpacked(engine: str, count: int) -> str:
    """What INT8 weights in blocks cost."""
    weights = "weights are" if count > 1 else "weight is"
    return (
        f"{count} INT8 {weights} in blocks, as the CPU wants them: {engine} makes floats of them in every "
        "call; `vlm export --target tensorrt` writes the form that TensorRT multiplies as it is"
    )


def _facts(engine: EngineReport) -> tuple[str, str, str]:
    """Seconds, INT8 products found of those promised, and peak memory."""
    done = engine.done
    if done is None:
        return "kept", "", ""
    found = "?" if done.int8_found is None else done.int8_found
    products = f"{found} of {done.int8_promised}" if done.int8_promised else ""
    peak = f"{done.peak / 1e6:,.0f}" if done.peak else ""
    return f"{engine.seconds:.1f}", products, peak


def _reasons(report: BuildReport) -> dict[str, list[str]]:
    """Engines by why they were built anew though plans of them are there."""
    reasons: dict[str, list[str]] = {}
    for engine in report.engines:
        changes = (f"{name} was {has}, is {now}" for name, (has, now) in engine.changed.items())
        if engine.changed:
            reasons.setdefault(f"built anew: {'; '.join(changes)}", []).append(engine.engine)
    return reasons
