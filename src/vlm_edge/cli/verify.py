"""`vlm verify`: the parity ladder of a bundle against transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from vlm_edge.cli import options
from vlm_edge.cli.guard import Command

if TYPE_CHECKING:
    from vlm_edge.export.verify import Report


@click.command(cls=Command, short_help="Compare a bundle with its checkpoint.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--against",
    metavar="CHECKPOINT",
    help="The checkpoint it was made of: a folder or a Hub name.  [default: the demo model]",
)
@click.option(
    "--image",
    "images",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="PATH",
    help="A picture to ask about; may repeat.  [default: a built-in one]",
)
@click.option("--prompt", metavar="TEXT", help="The question.  [default: a built-in one]")
@click.option(
    "--new-tokens",
    type=click.IntRange(min=1),
    default=16,
    show_default=True,
    help="Tokens of the answers that are compared.",
)
@click.option("--no-store", is_flag=True, help="Leave the manifest as it is.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def verify(
    bundle: Path,
    against: str | None,
    images: tuple[Path, ...],
    prompt: str | None,
    new_tokens: int,
    no_store: bool,
    as_json: bool,
) -> None:
    """Compare BUNDLE with its checkpoint in transformers, stage by stage.

    Token ids, tiling, pixels, vision, connector, embeddings, prefill logits, greedy tokens: the first
    stage and layer that diverges is named, and the exit code is 1. The result is stored in the manifest.
    """
    from vlm_edge.export.source import resolve
    from vlm_edge.export.verify import store
    from vlm_edge.export.verify import verify as climb
    from vlm_edge.runtime.manifest import read_manifest

    with options.progress_bars() as progress:
        reference: str | Path | None = against
        if reference is None:  # the demo model of the bundle's architecture
            reference, _ = resolve(None, arch=read_manifest(bundle).architecture)
        report = climb(
            bundle,
            reference,
            images=images or None,
            prompt=prompt,
            new_tokens=new_tokens,
            progress=progress,
        )
    if not no_store:
        store(bundle, report)
    if as_json:
        click.echo(json.dumps(report.to_json(), ensure_ascii=False))
    else:
        show(report)
    if not report.ok:
        click.get_current_context().exit(1)


def show(report: Report) -> None:
    """The ladder as a table, and the outcome in a sentence."""
    from rich.table import Table

    table = Table()
    for header in ("prompt", "stage"):
        table.add_column(header, no_wrap=True)
    table.add_column("figure")
    for header in ("value", "tolerance"):
        table.add_column(header, no_wrap=True, justify="right")
    table.add_column("", no_wrap=True)
    verdicts = {True: "ok", False: "[red]diverges[/red]", None: ""}
    for rung in report.rungs:
        stage = f"{rung.name}, {rung.layer}" if rung.layer else rung.name
        tolerance = "" if rung.tolerance is None else f"{rung.tolerance:.3g}"
        figure = f"{rung.metric} ({rung.detail})" if rung.detail else rung.metric
        table.add_row(rung.probe, stage, figure, f"{rung.value:.4g}", tolerance, verdicts[rung.ok])
    console = options.console()
    console.print(table)
    console.print(report.sentence(), markup=False, highlight=False, soft_wrap=True)
