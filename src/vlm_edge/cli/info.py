"""`vlm info`: what is in a bundle, from its manifest alone."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vlm_edge.cli import layers as tables
from vlm_edge.cli import options, tiling
from vlm_edge.cli.guard import Command

if TYPE_CHECKING:
    from vlm_edge.runtime.manifest import Manifest


class ImageSize(click.ParamType[tuple[int, int]]):
    """WIDTHxHEIGHT in pixels."""

    name = "WIDTHxHEIGHT"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, int]:
        found = re.fullmatch(r"([1-9]\d{0,5})[xX×]([1-9]\d{0,5})", str(value))
        if not found:
            self.fail(f"{value!r} is not WIDTHxHEIGHT in pixels, such as 672x1008", param, ctx)
        return int(found[1]), int(found[2])


@click.command(cls=Command, short_help="Say what is in a bundle.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--image-size",
    type=ImageSize(),
    help="Also the tiles and tokens that such an image becomes, with a drawing.",
)
@options.tile_limits
@click.option("--layers", is_flag=True, help="Also every measured layer: precision, error, time.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def info(
    bundle: Path,
    image_size: tuple[int, int] | None,
    max_tiles: int | None,
    max_visual_tokens: int | None,
    layers: bool,
    as_json: bool,
) -> None:
    """Say what BUNDLE holds: architecture, parts, precisions, sizes, tokens and context."""
    if image_size is None and (max_tiles is not None or max_visual_tokens is not None):
        raise click.UsageError("--max-tiles and --max-visual-tokens need --image-size here")

    from vlm_edge.runtime.manifest import read_manifest
    from vlm_edge.runtime.tiling import TileLimits, tiler

    manifest = read_manifest(bundle)
    made = tiler(manifest.tiling, (manifest.image.height, manifest.image.width))
    facts = describe(bundle, manifest)
    drawing = ""
    if image_size is not None:
        from vlm_edge.runtime.preprocess import check_size
        from vlm_edge.runtime.tiling.draw import draw

        width, height = image_size
        plan = made.plan(width, height, TileLimits(max_tiles, max_visual_tokens))
        unlimited = made.plan(width, height)
        check_size(width, height, manifest.image, plan.sheets, f"of {width}x{height}")
        facts["image"] = tiling.facts(plan, unlimited)
        drawing = f"{tiling.sentences(plan, unlimited)}\n\n{draw(plan, manifest.image)}"
    parts = (manifest.calibration or {}).get("parts", {})
    if layers:
        facts["measured_for"] = (manifest.calibration or {}).get("target", "cpu")
        facts["measured"] = {name: part.get("layers", {}) for name, part in parts.items()}
    if as_json:
        click.echo(json.dumps(facts, ensure_ascii=False, indent=1))
        return
    show(facts, tiling.every(manifest.tiling, made.grids()))
    if drawing:
        click.echo(f"\n{drawing}")
    if layers and any(facts["measured"].values()):
        options.console().print(tables.one_by_one(parts))
        if facts["measured_for"] != "cpu":
            click.echo(tables.untimed(facts["measured_for"]))
    elif layers:
        click.echo("No layer was measured: nothing is quantized, or its weights only.")


def describe(bundle: Path, manifest: Manifest) -> dict[str, Any]:
    """What `--json` prints; sizes in bytes, files of no engine under `other`."""
    sizes = dict.fromkeys([*manifest.engines, "embeddings", "other"], 0)
    for name, entry in manifest.files.items():
        part = name.partition(".")[0].removesuffix("_scales")  # vision.onnx, vision.cpu.onnx, ...
        sizes[part if part in sizes else "other"] += entry.size
    return {
        "bundle": bundle.resolve().name,
        "architecture": manifest.architecture,
        "source": manifest.source.name,
        "source_dtype": manifest.source.dtype,
        "producer": manifest.producer,
        "format": manifest.format,
        "precisions": {name: engine.precision for name, engine in manifest.engines.items()},
        "sizes": sizes,
        "size": sum(sizes.values()),
        "tile": {"width": manifest.image.width, "height": manifest.image.height},
        "tiling": manifest.tiling.kind,
        "tokens_per_tile": manifest.tiling.tile_tokens,
        "context": manifest.decoder.max_positions,
        "layers": manifest.decoder.layers,
        "cache": {
            "dtype": manifest.decoder.cache_dtype,
            "bytes_per_token": manifest.decoder.cache_bytes(),
        },
        "vocabulary": manifest.decoder.vocab_size,
        "verified": manifest.parity is not None,
        "warnings": (manifest.calibration or {}).get("warnings", []),
    }


def show(facts: dict[str, Any], tilings: str) -> None:
    """The facts as two tables: the model, and what its parts weigh."""
    from rich.table import Table

    model = Table(show_header=False, box=None, pad_edge=False)
    tile = facts["tile"]
    rows = {
        "architecture": facts["architecture"],
        "source": f"{facts['source']} ({facts['source_dtype']})",
        "made by": f"{facts['producer']}, format {facts['format']}",
        "image": f"{tile['width']}x{tile['height']} pixels, {facts['tokens_per_tile']} tokens a tile",
        "tiling": tilings,
        "context": f"{facts['context']:,} tokens" if facts["context"] else "no bound",
        "cache": f"{facts['cache']['bytes_per_token']:,} bytes a token ({facts['cache']['dtype']})",
        "verified": "yes" if facts["verified"] else "no: see `vlm verify`",
    }
    for name, value in rows.items():
        model.add_row(name, value)

    parts = Table("part", "precision")
    parts.add_column("MB", justify="right")
    for part, size in facts["sizes"].items():
        parts.add_row(part, facts["precisions"].get(part, ""), f"{size / 1e6:,.1f}")
    parts.add_section()
    parts.add_row("all", "", f"{facts['size'] / 1e6:,.1f}")
    console = options.console()
    console.print(model)
    console.print(parts)
    for warning in facts["warnings"]:
        console.print(f"warning: {warning}", soft_wrap=True, markup=False)
