"""`vlm bench`: what a bundle costs on this machine, by stage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from vlm_edge.cli import options, tiling
from vlm_edge.cli.guard import Command


@click.command(cls=Command, short_help="Measure a bundle on this machine.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--image", metavar="PATH", help="The picture to ask about.  [default: a drawn one]")
@click.option("--no-image", is_flag=True, help="Measure the language model alone.")
@click.option("--prompt", metavar="TEXT", help="The question.  [default: Describe the image.]")
@click.option(
    "--prompt-tokens",
    type=click.IntRange(min=1),
    help="Pad the request to exactly so many tokens, visual ones included.",
)
@click.option(
    "--new-tokens",
    type=click.IntRange(min=2),
    default=64,
    show_default=True,
    help="Tokens generated in each run, whatever they are.",
)
@click.option(
    "--runs", type=click.IntRange(min=1), default=10, show_default=True, help="Runs that count."
)
@click.option(
    "--warmup",
    type=click.IntRange(min=0),
    default=2,
    show_default=True,
    help="Runs before them that do not.",
)
@click.option(
    "--against",
    type=click.Path(path_type=Path),
    metavar="BUNDLE",
    help="A second bundle, run in turn with the first; the table shows their ratio.",
)
@click.option(
    "--json",
    "json_file",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Also write the figures to FILE; - is stdout, without the table.",
)
@options.tile_limits
@options.device
@options.threads
def bench(
    bundle: Path,
    against: Path | None,
    json_file: Path | None,
    image: str | None,
    no_image: bool,
    **settings: Any,
) -> None:
    """Measure BUNDLE: time by stage, tokens per second, memory, size.

    Every run is a whole request with nothing kept from the one before; figures are the median and,
    at the slow end, the 90th and 99th percentile. Peak memory is that of a process of its own.
    """
    if image is not None and no_image:
        raise click.UsageError("--image and --no-image exclude each other")
    if json_file is not None and not json_file.parent.is_dir():
        raise click.UsageError(f"--json {json_file}: there is no folder {json_file.parent}")

    from vlm_edge.benchmarks.latency import Settings, measure

    request = Settings(image=image, no_image=no_image, **settings)
    with options.progress_bars(animated=False) as progress:
        report = measure(bundle, request, against, progress)
    about = report.settings
    if about["grid"] is not None:
        tiling.report_one(
            about["image"],
            about["grid"],
            about["tiles"],
            about["visual_tokens"],
            about["limited"],
        )
    document = json.dumps(report.to_json(), indent=1, ensure_ascii=False) + "\n"
    if json_file == Path("-"):
        click.echo(document, nl=False)
        return
    if json_file is not None:
        json_file.write_text(document, encoding="utf-8")

    from vlm_edge.benchmarks.table import table

    options.console().print(table(report))
