"""Options that several commands share, and how a progress callback reaches the terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from rich.console import Console

F = TypeVar("F", bound=Callable[..., Any])

LOG_WIDTH = 120
DEVICES = ("cpu", "cuda", "tensorrt", "tensorrt-rtx")
FLOATS = ("float16", "float32")  # as runtime/plans.py has them (a test says so)
Progress = Callable[[str, int, int], None]  # what is done, steps done, steps in all


def device(command: F) -> F:
    plans = click.option(
        "--plans",
        type=click.Path(path_type=Path),
        metavar="FOLDER",
        help="Where `vlm build` put TensorRT's engines.  [default: beside the bundle]",
    )
    where = click.option(
        "--device",
        type=click.Choice(DEVICES),
        default="cpu",
        show_default=True,
        help="Where the engines run; one that is absent is an error, never a fallback.",
    )
    return where(plans(command))


def threads(command: F) -> F:
    return click.option(
        "--threads",
        type=click.IntRange(min=1),
        default=None,
        help="CPU threads of each engine.  [default: all that the process may use]",
    )(command)


def compute_capability(command: F) -> F:
    return click.option(
        "--compute-capability",
        metavar="X.Y",
        help="Of the GPU to build for, such as 8.6.  [default: this machine's]",
    )(command)


def tile_limits(command: F) -> F:
    tokens = click.option(
        "--max-visual-tokens",
        type=click.IntRange(min=1),
        metavar="N",
        help="Tokens of each picture at most: fewer tiles are made of it where that takes it.",
    )
    tiles = click.option(
        "--max-tiles",
        type=click.IntRange(min=1),
        metavar="N",
        help="Tiles of each picture at most, its overview among them; a limit that the model cannot "
        "keep is an error.",
    )
    return tiles(tokens(command))


def room(command: F) -> F:
    """What TensorRT's engines have room for, and compute in."""
    counts = {
        "--capacity": "Positions a conversation has room for.  [default: the model's, at most 4096]",
        "--chunk": "Positions of one prefill call.  [default: 256]",
        "--tiles": "Tiles of one call of the vision encoder.  [default: as the runtime calls it]",
        "--images": "Pictures of a prompt, for models that attend to pictures.  [default: 1024 positions "
        "of them]",
    }
    kind = click.option(
        "--float",
        "float_type",
        type=click.Choice(FLOATS),
        default="float16",
        show_default=True,
        help="What is not quantized computes in.",
    )
    command = kind(command)
    for name, text in reversed(counts.items()):
        command = click.option(name, type=click.IntRange(min=1), metavar="N", help=text)(command)
    return command


def console() -> Console:
    """For tables on stdout; wide where that is no terminal, so that a log's lines do not wrap."""
    from rich.console import Console

    made = Console()
    return made if made.is_terminal else Console(width=LOG_WIDTH)


@contextmanager
def progress_bars(animated: bool = True) -> Iterator[Progress]:
    """A callback that shows a bar per step on stderr; plain lines where that is not a terminal.

    Not animated, it is drawn when it changes and takes no time from what is measured.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    console = Console(stderr=True)
    if not console.is_terminal:
        started: set[str] = set()

        def line(step: str, done: int, total: int) -> None:
            if step not in started:
                started.add(step)
                click.echo(f"{step} ...", err=True)

        yield line
        return

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Bars(*columns, console=console, auto_refresh=animated) as bars:
        tasks: dict[str, Any] = {}

        def bar(step: str, done: int, total: int) -> None:
            if step not in tasks:
                tasks[step] = bars.add_task(step, total=total)
            bars.update(tasks[step], completed=done, total=total, refresh=not animated)

        yield bar
