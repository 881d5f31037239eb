"""Pictures with questions: easy-VQA (real files of a package) and pictures drawn by a seed."""

from __future__ import annotations

import colorsys
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from PIL import Image, ImageDraw

COLOURS = {
    "red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "yellow": (255, 255, 0),
    "black": (0, 0, 0), "gray": (128, 128, 128), "teal": (0, 128, 128), "brown": (165, 42, 42),
    "orange": (255, 140, 0), "purple": (140, 0, 200), "pink": (255, 120, 190),
}  # fmt: skip
SHAPES = ("circle", "rectangle", "triangle")  # the shapes of easy-VQA
BACKGROUNDS = {"white": (255, 255, 255), **COLOURS}

ASK_COLOUR = (
    "what color is the shape?", "what is the color of the shape?", "what color is the {shape}?",
    "what is the color of the {shape}?", "what color is it?", "which color is the {shape}?",
    "what colour is the shape?", "name the color of the {shape}.",
)  # fmt: skip
ASK_SHAPE = (
    "what shape is in the image?", "what shape does the image contain?", "what shape is present?",
    "what is the {colour} shape?", "what shape is it?", "which shape is shown?", "name the shape.",
)  # fmt: skip
ASK_BOTH = (
    "what is in the image?", "describe the image.", "what do you see?",
    "what is shown in the picture?", "describe the picture briefly.",
)  # fmt: skip
ASK_BACKGROUND = ("what color is the background?", "what is the background color?")
ASK_COUNT = ("how many shapes are there?", "how many shapes are in the image?")


@dataclass(frozen=True)
class Picture:
    """One picture and what is asked about it; `image` is a file to open or the picture itself."""

    image: Path | Image.Image
    open: tuple[tuple[str, str], ...]
    yes_no: tuple[tuple[str, str], ...]

    def load(self) -> Image.Image:
        """The picture in RGB."""
        image = Image.open(self.image) if isinstance(self.image, Path) else self.image
        return image.convert("RGB")


def a(noun: str) -> str:
    """The noun with its article."""
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def about_one(shape: str, colour: str) -> list[tuple[str, str]]:
    """Every open question about a picture with one shape."""
    asked = [(q.format(shape=shape), colour) for q in ASK_COLOUR]
    asked += [(q.format(colour=colour), shape) for q in ASK_SHAPE]
    return asked + [(q, a(f"{colour} {shape}")) for q in ASK_BOTH]


def easy_vqa(split: str) -> list[Picture]:
    """easy-VQA's "train" or "test" pictures with the questions of its own files."""
    spec = find_spec("easy_vqa")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("the training data is missing: pip install easy-vqa==1.0")
    folder = Path(spec.submodule_search_locations[0]) / "data" / split
    asked: dict[int, list[tuple[str, str]]] = {}
    for question, answer, image in json.loads((folder / "questions.json").read_text()):
        asked.setdefault(image, []).append((question, answer))
    pictures = []
    for image, pairs in sorted(asked.items()):
        open_pairs = tuple(p for p in pairs if p[1] not in ("yes", "no"))
        yes_no = tuple(p for p in pairs if p[1] in ("yes", "no"))
        pictures.append(Picture(folder / "images" / f"{image}.png", open_pairs, yes_no))
    return pictures


def with_rephrasings(picture: Picture) -> Picture:
    """The picture with all our open questions added, where its own questions tell the answers."""
    answers = {answer for _, answer in picture.open}
    shape = next((s for s in SHAPES if s in answers), None)
    colour = next((c for c in COLOURS if c in answers), None)
    if shape is None or colour is None:
        return picture
    return Picture(picture.image, picture.open + tuple(about_one(shape, colour)), picture.yes_no)


def _draw(draw: ImageDraw.ImageDraw, shape: str, box: tuple[int, ...], colour: str) -> None:
    left, top, right, bottom = box
    fill = COLOURS[colour]
    if shape == "circle":
        draw.ellipse((left, top, right, bottom), fill=fill)
    elif shape == "rectangle":
        draw.rectangle((left, top, right, bottom), fill=fill)
    else:
        draw.polygon([((left + right) // 2, top), (left, bottom), (right, bottom)], fill=fill)


def _background(rng: random.Random, taken: set[str]) -> tuple[str | None, tuple[int, int, int]]:
    """A pale tint (no name), or a named colour that none of the shapes has."""
    if rng.random() < 0.5:
        r, g, b = colorsys.hsv_to_rgb(rng.random(), rng.random() * 0.12, 0.9 + rng.random() * 0.1)
        return None, (int(r * 255), int(g * 255), int(b * 255))
    name = rng.choice([c for c in BACKGROUNDS if c not in taken])
    return name, BACKGROUNDS[name]


def drawn(seed: int, index: int, size: int = 112) -> Picture:
    """The `index`-th drawn picture of a seed: one to three shapes, and questions about them."""
    rng = random.Random(seed * 1_000_003 + index)
    count = rng.choices((1, 2, 3), (0.7, 0.2, 0.1))[0]
    shapes = rng.sample(SHAPES, count)
    colours = rng.sample(sorted(COLOURS), count)
    name, tint = _background(rng, set(colours))
    scale = rng.choice((1, 2))  # also larger pictures, which the processor shrinks
    image = Image.new("RGB", (size * scale, size * scale), tint)
    draw = ImageDraw.Draw(image)
    places = rng.sample([(0, 0), (0, 1), (1, 0), (1, 1)], count)  # quarters, so none overlap
    for shape, colour, (row, column) in zip(shapes, colours, places, strict=True):
        room = size if count == 1 else size // 2
        width = rng.randint(room // 6 + 4, int(room * 0.6))
        height = rng.randint(room // 6 + 4, int(room * 0.6)) if shape != "circle" else width
        left = rng.randint(0, room - width) + (column * size // 2 if count > 1 else 0)
        top = rng.randint(0, room - height) + (row * size // 2 if count > 1 else 0)
        box = tuple(v * scale for v in (left, top, left + width - 1, top + height - 1))
        _draw(draw, shape, box, colour)
    asked: list[tuple[str, str]] = []
    if count == 1:
        asked += about_one(shapes[0], colours[0])
    else:
        for shape, colour in zip(shapes, colours, strict=True):
            asked += [(q.format(shape=shape), colour) for q in ASK_COLOUR if "{shape}" in q]
            asked += [(f"what is the {colour} shape?", shape)] * 3
    asked += [(q, ("one", "two", "three")[count - 1]) for q in ASK_COUNT]
    if name:
        asked += [(q, name) for q in ASK_BACKGROUND] * 2
    yes_no = []
    for thing, present in ((SHAPES, shapes), (tuple(sorted(COLOURS)), colours)):
        there = rng.choice(present)
        absent = [t for t in thing if t not in present and t != name]
        chosen = [(there, "yes")] + [
            (word, "no") for word in rng.sample(absent, min(1, len(absent)))
        ]
        for word, answer in chosen:
            noun = word if thing is SHAPES else f"{word} shape"
            for end in ("?", " in the image?"):
                yes_no.append((f"is there {a(noun)}{end}", answer))
    return Picture(image, tuple(asked), tuple(yes_no))


def varied(question: str, rng: random.Random) -> str:
    """The question as another person would type it: capital letter, image or picture."""
    if rng.random() < 0.3:
        question = question.replace("image", "picture")
    return question[0].upper() + question[1:] if rng.random() < 0.4 else question


def questions(
    picture: Picture, rng: random.Random, n_open: int, n_yes_no: int
) -> Iterator[tuple[str, str]]:
    """A random choice of a picture's questions, varied in wording."""
    for pairs, n in ((picture.open, n_open), (picture.yes_no, n_yes_no)):
        for question, answer in rng.sample(pairs, min(n, len(pairs))):
            yield varied(question, rng), answer
