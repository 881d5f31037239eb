"""The command: set the peers up, prepare their weights, measure them beside ours."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import click
from rich.console import Console

from vlm_edge.benchmarks.latency import WorkerFailed
from vlm_edge.benchmarks.machine import usable_cores
from vlm_edge.benchmarks.peers import environments, measure, report
from vlm_edge.benchmarks.peers.environments import NAMES, OURS
from vlm_edge.benchmarks.peers.limits import best
from vlm_edge.benchmarks.peers.measure import Settings
from vlm_edge.benchmarks.peers.models import MODELS
from vlm_edge.errors import VlmEdgeError

LOG_WIDTH = 120  # where stdout is no terminal

FOLDER = click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
MODEL = click.option(
    "--model",
    "models",
    type=click.Choice([*MODELS]),
    multiple=True,
    help="May repeat.  [default: all]",
)


def _names(ctx: click.Context, option: click.Parameter, value: str | None) -> list[str]:
    names = [*NAMES] if value is None else [name.strip() for name in value.split(",")]
    for name in names:
        if name not in NAMES:
            raise click.BadParameter(f"{name!r} is no peer; known are {', '.join(NAMES)}")
    return [name for name in NAMES if name in names]


PEERS = click.option(
    "--peers", metavar="NAME,...", callback=_names, help="Of these only.  [default: all]"
)


def progress(step: str, done: int, total: int) -> None:
    """A line a step; nothing is drawn while peers are measured."""
    if done < total:
        click.echo(f"{step}: {done + 1} of {total}", err=True)


@contextlib.contextmanager
def known_errors() -> Iterator[None]:
    """An error of ours is one sentence, not a traceback."""
    try:
        yield
    except (VlmEdgeError, OSError) as error:
        raise click.ClickException(str(error)) from error


@click.group()
def cli() -> None:
    """Our runtime beside other engines, on the same weights."""


@cli.command()
@FOLDER
@click.argument("peers", nargs=-1, type=click.Choice([n for n in NAMES if n != OURS]))
def setup(folder: Path, peers: Sequence[str]) -> None:
    """Make one environment a peer below FOLDER (all, or those named), with pinned versions.

    llama.cpp is compiled for this machine, which takes ten minutes on two cores.
    """
    failed = []
    for name in peers or [n for n in NAMES if n != OURS]:
        if environments.python(folder, name):
            click.echo(f"{name}: there already")
            continue
        click.echo(f"{name}: ...")
        begin = time.perf_counter()
        folder.mkdir(parents=True, exist_ok=True)
        try:
            environments.create(folder, name, folder / f"setup-{name}.log")
        except WorkerFailed as error:
            failed.append(name)
            click.echo(f"{name}: {error}", err=True)
        else:
            click.echo(f"{name}: ready in {time.perf_counter() - begin:.0f} s")
    if failed:
        raise click.ClickException(f"could not set up {', '.join(failed)}")


@cli.command()
@FOLDER
@MODEL
@PEERS
def prepare(folder: Path, models: Sequence[str], peers: list[str]) -> None:
    """Write every peer's form of the weights, which `run` otherwise does first."""
    for name in models or MODELS:
        rows = measure.rows(MODELS[name], peers)
        with known_errors():
            measure.prepare(folder, MODELS[name], rows, progress)
        for row in rows:
            if row.problem:
                click.echo(f"{name}, {row.title} {row.variant}: {row.problem}", err=True)


@cli.command()
@FOLDER
@MODEL
@PEERS
@click.option("--rounds", type=click.IntRange(min=1), default=5, show_default=True)
@click.option("--threads", type=click.IntRange(min=1), help="[default: all cores]")
@click.option("--context", type=click.IntRange(min=2), default=600, show_default=True)
@click.option("--steps", type=click.IntRange(min=1), default=64, show_default=True)
@click.option(
    "--json", "json_file", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE",
    help="Also write all figures and samples to FILE.",
)  # fmt: skip
@click.option("--markdown", is_flag=True, help="Print tables for docs/performance.md instead.")
def run(
    folder: Path,
    models: Sequence[str],
    peers: list[str],
    rounds: int,
    threads: int | None,
    context: int,
    steps: int,
    json_file: Path | None,
    markdown: bool,
) -> None:
    """Measure the peers on the models in interleaved rounds."""
    settings = Settings(rounds, threads or usable_cores(), context, steps)
    with known_errors():
        tables = {name: measure.rows(MODELS[name], peers) for name in models or MODELS}
        for name, rows in tables.items():
            measure.prepare(folder, MODELS[name], rows, progress)
        tries = [measure.machine_limits(folder, settings.threads)]
        for name, rows in tables.items():
            measure.measure(folder, MODELS[name], rows, settings, progress)
            tries.append(measure.machine_limits(folder, settings.threads))
    limits = best([one for one in tries if one is not None])
    compared = [
        report.Compared(MODELS[name], rows, limits, settings) for name, rows in tables.items()
    ]
    if json_file is not None:
        text = json.dumps(report.document(compared), indent=1, ensure_ascii=False) + "\n"
        json_file.write_text(text, encoding="utf-8")
    for one in compared:
        if markdown:
            click.echo(report.markdown(one))
        else:
            Console(width=None if sys.stdout.isatty() else LOG_WIDTH).print(report.table(one))


if __name__ == "__main__":
    cli(prog_name="python -m vlm_edge.benchmarks.peers")
