"""What the command line says of a picture: its tiles, its visual tokens, and what limits changed."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from vlm_edge.runtime.picture import Picture
    from vlm_edge.runtime.tiling import TilePlan, Tiling
    from vlm_edge.runtime.vlm import VLM


def sentences(plan: TilePlan, unlimited: TilePlan) -> str:
    """The tiles and the terms of the visual tokens: "2144 = 576 overview + 1536 tiles + 32 newlines"."""
    terms = " + ".join(f"{count} {name}" for name, count in plan.terms)
    summed = f" = {terms}" if len(plan.terms) > 1 else ""
    notes = [f"{plan.tiles} tiles in all"] if plan.tiles > 1 else []
    if plan != unlimited:
        notes.append(limited(_brief(unlimited)))
    noted = f" ({'; '.join(notes)})" if notes else ""
    return (
        f"{plan.width}x{plan.height} pixels: {tiles(plan)}{noted}\n"
        f"visual tokens: {plan.tokens}{summed}"
    )


def tiles(plan: TilePlan) -> str:
    """ "2x2 tiles and an overview" (rows x columns)."""
    if any(name == "overview" for name, _ in plan.terms):
        return _with_overview(plan.name)
    return f"{plan.name} tiles" if plan.tiles > 1 else "one tile"


def every(settings: Tiling, grids: Sequence[str]) -> str:
    """What a model can make of a picture, for `vlm info`: "anyres: 1x2, 2x1, 2x2 tiles and an overview".

    Args:
        grids: `Tiler.grids()`.
    """
    if settings.kind == "single":
        return "single: one tile"
    if settings.kind == "mllama":
        return f"{settings.kind}: {', '.join(grids)} tiles"
    if not grids:
        return f"{settings.kind}: as many tiles as the picture has room for, and an overview"
    many = [name for name in grids if name != "1"]
    if not many:
        return f"{settings.kind}: {_with_overview('1')}"
    words = f"{settings.kind}: {_with_overview(', '.join(many))}"
    if settings.kind == "overlap":
        down, across = settings.overlap
        words += f"; neighbours share {down}x{across} tokens, merge {settings.merge}"
    return words if len(many) == len(grids) else f"{words}, or {_with_overview('1')}"


def facts(plan: TilePlan, unlimited: TilePlan) -> dict[str, Any]:
    """A picture as `--json` has it; sizes in pixels, `grid` rows x columns.

    Args:
        unlimited: what the model makes of the picture without limits; `limited` says what it would be
            where they changed it, and is null where not.
    """
    changed = plan != unlimited
    return {
        "width": plan.width,
        "height": plan.height,
        "tokens": plan.tokens,
        "terms": dict(plan.terms),
        "tiles": plan.tiles,
        "grid": plan.name,
        "limited": _brief(unlimited) if changed else None,
    }


def of_pictures(vlm: VLM, pictures: Sequence[Picture]) -> list[dict[str, Any]]:
    """`facts` of each, with its file's name."""
    return [
        {"name": _name(picture), **facts(picture.plan, _unlimited(vlm, picture))}
        for picture in pictures
    ]


def report(vlm: VLM, pictures: Sequence[Picture]) -> None:
    """A line on stderr for each picture, where the model has a choice of tilings."""
    if not pictures or vlm.tiler.grids() == ("1",):
        return
    for about in of_pictures(vlm, pictures):
        report_one(about["name"], about["grid"], about["tiles"], about["tokens"], about["limited"])


def report_one(
    name: str, grid: str, tiles: int, tokens: int, unlimited: dict[str, Any] | None
) -> None:
    """The line of one picture; `unlimited` is `limited` of its `facts`."""
    end = f" ({limited(unlimited)})" if unlimited else ""
    shown = _with_overview(grid)
    if grid != "1" and tiles == prod(map(int, grid.split("x"))):  # no overview among them
        shown = f"{grid} tiles" if tiles > 1 else "one tile"
    click.echo(f"{name}: {shown}, {tokens} tokens{end}", err=True)


def limited(unlimited: dict[str, Any]) -> str:
    """What limits changed: "limited: would be 2x2, 1948 tokens"."""
    return f"limited: would be {unlimited['grid']}, {unlimited['tokens']} tokens"


def _with_overview(grid: str) -> str:
    return "an overview alone" if grid == "1" else f"{grid} tiles and an overview"


def _unlimited(vlm: VLM, picture: Picture) -> TilePlan:
    return vlm.tiler.plan(picture.plan.width, picture.plan.height)


def _brief(plan: TilePlan) -> dict[str, Any]:
    return {"grid": plan.name, "tiles": plan.tiles, "tokens": plan.tokens}


def _name(picture: Picture) -> str:
    return Path(picture.decoded.name).name
