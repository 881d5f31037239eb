"""Write the large calibration pictures, for models that cut a picture into tiles.

python -m vlm_edge.training.large_pictures FOLDER

A page of text, a chart, a floor plan and a field of shapes in the shapes that tilings tell apart: square,
3:2, 2:1 and 21:5, upright and lying. All are drawn, in few colours, so that thousands of pixels are a
small file and no licence comes along.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from vlm_edge.training.data import COLOURS

SIZES = (
    (2048, 2048), (2400, 1600), (1600, 2400), (2400, 1200), (1200, 2400), (3360, 800), (800, 3360),
)  # fmt: skip
PALETTE = 16  # colours of a file
WORDS = (
    "river stone market seven lamp window early bridge paper silver garden train number wheel north "
    "bread signal copper island winter ladder orange table engine quiet letter harbour field"
).split()
Drawer = Callable[[Image.Image, random.Random], str]  # returns a question about the picture


def text_of(rng: random.Random, count: int) -> str:
    """So many words as a sentence."""
    return " ".join(rng.choices(WORDS, k=count)).capitalize() + "."


def page(image: Image.Image, rng: random.Random) -> str:
    """A printed page: a heading and lines of text that fill it."""
    draw = ImageDraw.Draw(image)
    margin, line = min(image.size) // 12, 34
    heading = text_of(rng, 3)
    draw.text((margin, margin), heading, "black", ImageFont.load_default(72))
    font = ImageFont.load_default(26)
    for top in range(margin + 130, image.height - margin, line):
        text = text_of(rng, 40)
        while draw.textlength(text, font) > image.width - 2 * margin:
            text = text.rpartition(" ")[0]
        if rng.random() < 0.85:  # else the end of a paragraph
            draw.text((margin, top), text, (40, 40, 60), font)
    return "What is the heading of the page?"


def chart(image: Image.Image, rng: random.Random) -> str:
    """Bars with names and values on a grid of thin lines."""
    draw = ImageDraw.Draw(image)
    wide, high = image.size
    for step in range(1, 20):
        draw.line((0, high * step // 20, wide, high * step // 20), (210, 210, 210), 2)
    count = max(4, wide // 180)
    font = ImageFont.load_default(30)
    for index, colour in enumerate(rng.choices(list(COLOURS.values()), k=count)):
        left, right = wide * index // count + 20, wide * (index + 1) // count - 20
        value = rng.randint(5, 90)
        top = high - 60 - (high - 120) * value // 100
        draw.rectangle((left, top, right, high - 60), colour, "black", 3)
        draw.text((left, top - 40), str(value), "black", font)
        draw.text((left, high - 50), rng.choice(WORDS), "black", font)
    return "Which bar is the highest?"


def plan(image: Image.Image, rng: random.Random) -> str:
    """A floor plan: a box halved again and again, a name in each room."""
    draw = ImageDraw.Draw(image)

    def rooms(left: int, top: int, right: int, bottom: int) -> Iterator[tuple[int, int, int, int]]:
        wide, high = right - left, bottom - top
        if max(wide, high) < 420:
            yield left, top, right, bottom
        elif wide > high:
            middle = left + round(wide * rng.uniform(0.35, 0.65))
            yield from (*rooms(left, top, middle, bottom), *rooms(middle, top, right, bottom))
        else:
            middle = top + round(high * rng.uniform(0.35, 0.65))
            yield from (*rooms(left, top, right, middle), *rooms(left, middle, right, bottom))

    font = ImageFont.load_default(28)
    for box in rooms(30, 30, image.width - 30, image.height - 30):
        tint = rng.choice(((250, 244, 230), (232, 242, 250), (236, 250, 236), (250, 250, 250)))
        draw.rectangle(box, tint, (30, 30, 30), 8)
        draw.text((box[0] + 24, box[1] + 24), rng.choice(WORDS), "black", font)
        door = rng.randint(box[0] + 20, max(box[0] + 21, box[2] - 90))
        draw.rectangle((door, box[3] - 6, door + 70, box[3] + 2), tint)
    return "How many rooms does the plan show?"


def shapes(image: Image.Image, rng: random.Random) -> str:
    """Hundreds of shapes, from a few pixels to half of the picture, over a striped ground."""
    draw = ImageDraw.Draw(image)
    stripe = image.height // 12
    for index in range(12):
        shade = 150 + 8 * index
        draw.rectangle((0, index * stripe, image.width, (index + 1) * stripe), (shade, shade, 235))
    for index in range(300):
        size = max(6, round(min(image.size) / 2 * 0.98**index))
        x, y = rng.randrange(image.width), rng.randrange(image.height)
        box = (x - size // 2, y - size // 2, x + size // 2, y + size // 2)
        fill = rng.choice(list(COLOURS.values()))
        rng.choice((draw.ellipse, draw.rectangle))(box, fill, "black")
    return "Describe the picture in detail."


DRAWERS: tuple[Drawer, ...] = (page, chart, plan, shapes)


def write(folder: Path, seed: int = 11) -> None:
    """The pictures and their prompts."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    names: list[str] = []
    lines: list[str] = []
    for number, size in enumerate(SIZES):
        drawer = DRAWERS[number % len(DRAWERS)]
        image = Image.new("RGB", size, "white")
        question = drawer(image, rng)
        name = f"{drawer.__name__}-{size[0]}x{size[1]}.png"
        image.quantize(PALETTE, dither=Image.Dither.NONE).save(folder / name, optimize=True)
        names.append(name)
        lines.append(json.dumps({"image": name, "prompt": question}))
    # The last two make few tiles: many models have room for both in a prompt.
    lines.append(json.dumps({"images": names[-2:], "prompt": "What do the two pictures show?"}))
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    write(parser.parse_args(argv).folder)


if __name__ == "__main__":
    main()
