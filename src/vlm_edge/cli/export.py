"""`vlm export`: a checkpoint becomes a bundle, without torch."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vlm_edge.cli import layers, options
from vlm_edge.cli.guard import Command

if TYPE_CHECKING:
    from vlm_edge.export.pipeline import ExportReport, Target
    from vlm_edge.export.precision import PrecisionPlan
    from vlm_edge.runtime.manifest import CacheDtype
    from vlm_edge.runtime.tiling.settings import Merge

DEMO_ARCH = "llava"
# As export/static.py, export/pipeline.py, runtime/manifest.py and runtime/tiling have them (tests say so);
# importing them here would slow every command's start.
CACHES = ("float32", "int8")
MERGES = ("crop", "average", "keep")
TARGETS = ("cpu", "tensorrt", "tensorrt-rtx")
METHODS = ("auto", "minmax", "average", "percentile", "entropy", "mse", "smooth-65", "smooth-80")


@click.command(
    cls=Command,
    short_help="Turn a checkpoint into a bundle.",
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.argument("source", required=False)
@click.option("--arch", help="The architecture, such as llava.  [default: config.json says it]")
@click.option("--int8", is_flag=True, help="Every part in INT8; the language model's weights only.")
@click.option("--int4", is_flag=True, help="Block-wise INT4 language model, the rest INT8.")
@click.option(
    "--precision",
    metavar="PART=P,...",
    help="A precision per part: vision=int8,connector=fp32,llm=int4.  [default: all fp32]",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="The bundle's folder.  [default: SOURCE's name with the precision, here]",
)
@click.option(
    "--calibration",
    "calibration_images",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="Pictures, and prompts about them, that set the INT8 ranges and INT4 rounding.  "
    "[default: the built-in set]",
)
@click.option(
    "--method",
    type=click.Choice(METHODS),
    default="auto",
    show_default=True,
    help="How a range follows from the activations; auto tries the usual ones and takes what errs least.",
)
@click.option(
    "--max-error",
    type=float,
    metavar="E",
    help="Relative error that INT8 may add to the features of vision encoder and connector, each; "
    "layers that have no room in it stay in float.  [default: 0.04, a cosine above 0.999]",
)
@click.option(
    "--budget",
    type=float,
    metavar="KL",
    help="KL divergence to full precision (nats a token) that quantization may add to the language "
    "model; under --int4 layers that have no room in it take INT8, under --int8 they stay in float.  "
    "[default: 0.035 under --int4, 0.02 under --int8]",
)
@click.option(
    "--kv-cache",
    type=click.Choice(CACHES),
    default="float32",
    show_default=True,
    help="How the language model keeps the keys and values of earlier tokens; int8 takes a quarter of "
    "the memory.",
)
@click.option(
    "--tiling",
    metavar="ROWSxCOLUMNS",
    help="Show a model that sees one tile an overview and so many overlapping tiles, such as 2x2.",
)
@click.option(
    "--overlap",
    type=float,
    metavar="SHARE",
    help="With --tiling: of a tile's side that neighbours share, 0 to 0.9; rounded to whole tokens.  "
    "[default: 0.25]",
)
@click.option(
    "--merge",
    type=click.Choice(MERGES),
    help="With --tiling: a place that several tiles show has the token of the tile it lies deepest in "
    "(crop), the mean of all (average), or all of them (keep).  [default: crop]",
)
@click.option(
    "--target",
    type=click.Choice(TARGETS),
    default="cpu",
    show_default=True,
    help="The engine that layers are quantized for; for TensorRT by their errors alone, and its engines "
    "are built too, as by `vlm build`.",
)
@options.compute_capability
@click.option("--revision", help="Branch, tag or commit of a Hub repository.")
def export(
    source: str | None,
    arch: str | None,
    int8: bool,
    int4: bool,
    precision: str | None,
    output: Path | None,
    calibration_images: Path | None,
    method: str,
    max_error: float | None,
    budget: float | None,
    kv_cache: CacheDtype,
    tiling: str | None,
    overlap: float | None,
    merge: Merge | None,
    target: Target,
    compute_capability: str | None,
    revision: str | None,
) -> None:
    """Export SOURCE to a bundle: one engine per part, tokenizer and manifest.

    A layer is quantized if that makes it faster on this machine and its error has room in the
    budget (--max-error, --budget). The table at the end, and `vlm info --layers`, say why others are float.

    SOURCE is a Hugging Face checkpoint folder, a Hub name such as llava-hf/llava-1.5-7b-hf or, left
    out, the built-in demo model.
    """
    if int8 + int4 + (precision is not None) > 1:
        raise click.UsageError("--int8, --int4 and --precision exclude each other: give one")

    if tiling is None and (overlap is not None or merge is not None):
        raise click.UsageError("--overlap and --merge belong to --tiling: give it too, such as 2x2")

    if target == "cpu" and compute_capability is not None:
        raise click.UsageError("--compute-capability belongs to --target tensorrt or tensorrt-rtx")

    if target != "cpu" and kv_cache == "int8":
        raise click.UsageError("--kv-cache int8: TensorRT has no int8 cache; leave it out")

    from vlm_edge.export.pipeline import export as export_bundle
    from vlm_edge.export.precision import Budgets, PrecisionPlan
    from vlm_edge.export.tiling import MERGE, OVERLAP, OverlapOrder

    share = OVERLAP if overlap is None else overlap
    order = None if tiling is None else OverlapOrder.parse(tiling, share, merge or MERGE)
    uniform = PrecisionPlan.uniform("int8" if int8 else "int4" if int4 else "fp32")
    plan = PrecisionPlan.parse(precision) if precision is not None else uniform
    if target != "cpu":
        from vlm_edge.export.tensorrt.build import find_target

        find_target(target, compute_capability)  # before the long steps
    with options.progress_bars() as progress:
        report = export_bundle(
            source,
            output or default_output(source, arch, plan),
            arch=arch,
            precision=plan,
            calibration_images=calibration_images,
            calibration_method=method,
            progress=progress,
            revision=revision,
            budgets=Budgets(max_error, budget),
            cache_dtype=kv_cache,
            tiling=order,
            target=target,
        )
    show(report)
    if target != "cpu":
        from vlm_edge.cli import build

        build.run(report.bundle, target, compute_capability)


def default_output(source: str | None, arch: str | None, plan: PrecisionPlan) -> Path:
    """`llava-int8`, or `<name of SOURCE>-int8`, in the current folder."""
    name = Path(source).resolve().name if source else arch or DEMO_ARCH
    return Path(f"{name}-{suffix(plan)}")


def suffix(plan: PrecisionPlan) -> str:
    """The plan as part of a name; `mixed` where no flag stands for it."""
    from vlm_edge.export.precision import PrecisionPlan

    for name in ("fp32", "int8", "int4"):
        if plan == PrecisionPlan.uniform(name):
            return name
    return "mixed"


def show(report: ExportReport) -> None:
    """The closing table, and how to go on."""
    from rich.table import Table

    from vlm_edge.export.tiling import sentence

    table = Table("part", "precision")
    table.add_column("MB", justify="right")
    table.add_column("error of quantization")
    for part, size in report.sizes.items():
        found = report.errors.get(part, {})
        precision = describe_precision(report.precisions.get(part, ""), found.get("layers", {}))
        table.add_row(part, precision, f"{size / 1e6:,.1f}", describe_error(found))
    table.add_section()
    table.add_row("all", "", f"{sum(report.sizes.values()) / 1e6:,.1f}", "")
    console = options.console()
    console.print(table)
    if any(found.get("layers") for found in report.errors.values()):
        console.print(layers.by_kind(report.errors))
        if report.target != "cpu":
            console.print(layers.untimed(report.target))
    if report.tiling.kind == "overlap":
        console.print(f"tiling: {sentence(report.tiling)}")
    memory = f", {report.peak_rss_anon / 1e6:,.0f} MB of memory" if report.peak_rss_anon else ""
    console.print(f"{report.architecture} exported in {report.seconds:.1f} s{memory}")
    for warning in report.warnings:
        click.echo(f"warning: {warning}", err=True)
    console.print(
        f"Ask it: vlm run {shlex.quote(str(report.bundle))} PICTURE -p QUESTION",
        soft_wrap=True,
        markup=False,
    )


def describe_precision(precision: str, measured: layers.Layers) -> str:
    """A part's precision, and how many of its layers have it where that is not all of them."""
    quantized = sum(layer["precision"] != "fp32" for layer in measured.values())
    if quantized in (0, len(measured)):
        return precision
    return f"{precision}, {quantized} of {len(measured)} layers"


def describe_error(error: dict[str, Any]) -> str:
    """What the pipeline measured of a quantized part; nothing for one in full precision."""
    if "kl" in error:
        return f"KL {error['kl']:.3g} nats, same top token {error['top1_agreement']:.1%}"
    if "weight_error" in error:
        weight = error["weight_error"]
        return f"weights {weight['mean']:.2%}, worst layer {weight['worst']:.2%}"
    if "relative_error" in error:
        return f"features {error['relative_error']:.2%}, cosine {error['cosine']:.5f}"
    return ""
