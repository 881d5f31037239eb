"""What the command line says of a picture: its tiles, its visual tokens, and what limits changed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from vlm_edge.runtime.picture import Picture
    from vlm_edge.runtime.tiling import TilePlan
    from vlm_edge.runtime.vlm import VLM


def sentences(plan: TilePlan, unlimited: TilePlan) -> str:
    """The tiles and the terms of the visual tokens: "2144 = 576 overview + 1536 tiles + 32 newlines"."""
    terms = " + ".join(f"{count} {name}" for name, count in plan.terms)
    summed = f" = {terms}" if len(plan.terms) > 1 else ""
    count = f" ({plan.tiles} tiles in all)" if plan.tiles > 1 else ""
    return (
        f"{plan.width}x{plan.height} pixels: {tiles(plan)}{count}{limited(plan, unlimited)}\n"
        f"visual tokens: {plan.tokens}{summed}"
    )


def tiles(plan: TilePlan) -> str:
    """ "2x2 tiles and an overview" (rows x columns)."""
    overview = any(name == "overview" for name, _ in plan.terms)
    if plan.grid == (0, 0):
        return "an overview alone" if overview else "one tile"
    return f"{plan.name} tiles and an overview"


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
    for picture in pictures:
        plan, unlimited = picture.plan, _unlimited(vlm, picture)
        line = f"{_name(picture)}: {tiles(plan)}, {plan.tokens} tokens"
        click.echo(f"{line}{limited(plan, unlimited)}", err=True)


def limited(plan: TilePlan, unlimited: TilePlan) -> str:
    """What limits changed, as the end of a sentence."""
    if plan == unlimited:
        return ""
    return f" (limited: would be {unlimited.name}, {unlimited.tokens} tokens)"


def _unlimited(vlm: VLM, picture: Picture) -> TilePlan:
    return vlm.tiler.plan(picture.plan.width, picture.plan.height)


def _brief(plan: TilePlan) -> dict[str, Any]:
    return {"grid": plan.name, "tiles": plan.tiles, "tokens": plan.tokens}


def _name(picture: Picture) -> str:
    return Path(picture.decoded.name).name
