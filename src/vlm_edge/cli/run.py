"""`vlm run`: a question about pictures, answered as it is generated; a chat without a question."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vlm_edge.cli import options, tiling
from vlm_edge.cli.guard import Command

if TYPE_CHECKING:
    from vlm_edge.runtime.picture import Picture
    from vlm_edge.runtime.vlm import VLM, Result


@click.command(cls=Command, short_help="Ask a bundle about pictures, or chat.")
@click.argument("bundle")
@click.argument("images", nargs=-1, metavar="[IMAGE]...")
@click.option("-p", "--prompt", help="The question; without it an interactive chat starts.")
@click.option("--system", help="A system message that stands before the conversation.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object when done.")
@click.option(
    "--max-new-tokens",
    type=click.IntRange(min=1),
    default=128,
    show_default=True,
    help="Tokens at most in an answer.",
)
@click.option(
    "--temperature",
    type=click.FloatRange(min=0.0),
    default=0.0,
    show_default=True,
    help="0 takes the likeliest token; above it, tokens are drawn.",
)
@click.option(
    "--top-p",
    type=click.FloatRange(min=0.0, max=1.0, min_open=True),
    default=1.0,
    show_default=True,
    help="Draw from the likeliest tokens that hold this share of the probability.",
)
@click.option(
    "--top-k",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Draw from this many of the likeliest tokens; 0 is all.",
)
@click.option(
    "--repetition-penalty",
    type=click.FloatRange(min=0.0, min_open=True),
    help="Above 1, tokens already present are less likely.  [default: the checkpoint's own]",
)
@click.option("--stop", multiple=True, metavar="TEXT", help="End before this text; may repeat.")
@click.option("--seed", type=int, help="Makes drawn tokens repeatable.")
@click.option(
    "--no-template",
    is_flag=True,
    help="Take the prompt verbatim, with its image placeholders, instead of as a chat message.",
)
@click.option("--ignore-eos", is_flag=True, help="Generate --max-new-tokens whatever comes.")
@options.tile_limits
@options.device
@options.threads
def run(
    bundle: str,
    images: tuple[str, ...],
    prompt: str | None,
    system: str | None,
    as_json: bool,
    device: str,
    plans: Path | None,
    threads: int | None,
    no_template: bool,
    **settings: Any,
) -> None:
    """Ask BUNDLE about the IMAGEs, if any.

    The answer streams to stdout; where the model tiles, stderr says what each picture becomes. Without
    -p, a chat: every line is a question, /image PATH adds a picture to the next one, /reset starts
    afresh, /exit or Ctrl-D ends it.
    """
    if prompt is None and (as_json or no_template):
        flag = "--json" if as_json else "--no-template"
        raise click.UsageError(f"{flag} needs a prompt: give -p TEXT")
    if no_template and system is not None:
        raise click.UsageError("--system is part of the chat template: it excludes --no-template")

    from vlm_edge import VLM

    vlm = VLM.load(bundle, device=device, threads=threads, plans=plans)
    try:
        if prompt is None:
            from vlm_edge.cli.chat import converse

            converse(vlm, images, system, settings)
        else:
            answer(vlm, prompt, images, system, as_json, no_template, settings)
    finally:
        vlm.close()


def answer(
    vlm: VLM,
    prompt: str,
    images: tuple[str, ...],
    system: str | None,
    as_json: bool,
    no_template: bool,
    settings: dict[str, Any],
) -> None:
    """One question: the text as it comes, or one JSON object."""
    if system is None:
        stream = vlm.stream(prompt, images=images, template=not no_template, **settings)
    else:
        stream = vlm.chat(system=system).stream(prompt, images=images, **settings)
    tiling.report(vlm, stream.pictures)
    last = ""
    for piece in stream:
        last = piece or last
        if not as_json:
            click.echo(piece, nl=False)
    if as_json:
        click.echo(json.dumps(as_dict(vlm, stream.result, stream.pictures), ensure_ascii=False))
    elif not last.endswith("\n"):
        click.echo()


def as_dict(vlm: VLM, result: Result, pictures: Sequence[Picture]) -> dict[str, Any]:
    """The result as `--json` prints it: times in ms, load_s in seconds."""
    timings = dataclasses.asdict(result.timings)
    timings["prefill_tokens_per_s"] = result.timings.prefill_tokens_per_s
    timings["decode_tokens_per_s"] = result.timings.decode_tokens_per_s
    return {
        "text": result.text,
        "token_ids": list(result.token_ids),
        "finish_reason": result.finish_reason,
        "prompt_tokens": result.prompt_tokens,
        "visual_tokens": result.visual_tokens,
        "images": tiling.of_pictures(vlm, pictures),
        "load_s": vlm.load_s,
        "timings": timings,
    }
