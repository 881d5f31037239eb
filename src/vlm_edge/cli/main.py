"""The entry of `vlm` and `vlm-export`; imports no engine, so that `vlm --help` is quick."""

from __future__ import annotations

import io
import signal
import sys

import click

from vlm_edge import __version__
from vlm_edge.cli.bench import bench
from vlm_edge.cli.build import build
from vlm_edge.cli.export import export
from vlm_edge.cli.guard import INTERRUPTED, Command, Group
from vlm_edge.cli.info import info
from vlm_edge.cli.plan import plan
from vlm_edge.cli.run import run
from vlm_edge.cli.verify import verify

COMMANDS: tuple[Command, ...] = (export, plan, build, run, bench, verify, info)


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="vlm")
def cli() -> None:
    """Vision-language models from their checkpoint to the device.

    A checkpoint is exported to a bundle; a bundle is run, measured and verified, and built for TensorRT.
    """


for _command in COMMANDS:
    cli.add_command(_command)


def main() -> None:
    """The `vlm` script."""
    _start(cli, "vlm")


def main_export() -> None:
    """The `vlm-export` script: the same as `vlm export`."""
    _start(export, "vlm-export")


def _leave(number: int, _: object) -> None:
    sys.exit(128 + number)


def _start(command: click.Command, name: str) -> None:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # an answer may hold what the terminal cannot show
    for number in (signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
        signal.signal(number, _leave)  # as an exception, so that nothing half-written stays behind
    try:
        command.main(prog_name=name)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
