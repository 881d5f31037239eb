"""The interactive chat of `vlm run`: a line is a question, a line with a slash is an order."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from vlm_edge.cli import tiling
from vlm_edge.errors import VlmEdgeError

if TYPE_CHECKING:
    from vlm_edge.runtime.vlm import VLM

HELP = "/image PATH adds a picture to the next question, /reset starts afresh, /exit ends."


def converse(vlm: VLM, images: Sequence[str], system: str | None, settings: dict[str, Any]) -> None:
    """Answer lines until the end of input; a question that fails leaves the conversation going.

    Exits with 1 at the end where a line of a script (stdin is no terminal) failed.
    """
    chat, waiting, failed = vlm.chat(system=system), list(images), False
    if _typed():
        click.echo(HELP, err=True)
    while (line := _read()) is not None:
        order, _, rest = line.partition(" ")
        if not line:
            continue
        if order in ("/exit", "/quit"):
            break
        if order == "/reset":
            chat, waiting = vlm.chat(system=system), []
        elif order == "/image":
            waiting += [rest.strip()] if rest.strip() else []
            click.echo(f"pictures for the next question: {', '.join(waiting) or 'none'}", err=True)
        elif order.startswith("/") and order[1:].isalpha():
            click.echo(f"no such order: {order}. {HELP}", err=True)
            failed = True
        else:
            try:
                stream = chat.stream(line, images=tuple(waiting), **settings)
                tiling.report(vlm, stream.pictures[len(stream.pictures) - len(waiting) :])
                for piece in stream:
                    click.echo(piece, nl=False)
                click.echo()
            except VlmEdgeError as error:
                click.echo(f"error: {error}", err=True)
                failed = True
            except KeyboardInterrupt:
                if not _typed():
                    raise
                click.echo("\n(interrupted; the question is forgotten)", err=True)
            waiting = []
    if failed and not _typed():
        sys.exit(1)


def _typed() -> bool:
    """Whether a person types: a script's input may be a pipe, a file, or closed."""
    return sys.stdin is not None and sys.stdin.isatty()


def _read() -> str | None:
    """The next line without its surrounding blanks; None at the end of input."""
    if not _typed():
        line = sys.stdin.readline() if sys.stdin is not None else ""
        # Bytes that are not UTF-8 come as lone surrogates, which no tokenizer takes.
        return line.encode("utf-8", "replace").decode().strip() if line else None
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # gives input() editing and history, where it exists
    try:
        return input("> ").strip()
    except EOFError:
        click.echo()
        return None
