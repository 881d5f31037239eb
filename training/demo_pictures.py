"""Write the pictures that ship with the demo model: calibration images and one held-out picture.

python -m vlm_edge.training.demo_pictures FOLDER [--held-out NUMBER]

Calibration images are easy-VQA train pictures (MIT), drawn ones, and textures made here: noise
with the 1/f spectrum of photographs, so that no photograph's licence comes along.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import numpy as np
from PIL import Image

from vlm_edge.training.data import SHAPES, Picture, drawn, easy_vqa

SIZES = ((112, 168), (168, 112), (96, 160), (200, 120), (128, 128), (90, 60), (60, 120), (224, 150))
DESCRIBE = ("What is in the image?", "Describe the image.", "What do you see?", "What is this?")


def texture(seed: int, width: int, height: int) -> Image.Image:
    """Coloured 1/f noise: random phases, amplitudes that fall with frequency as in photographs."""
    rng = np.random.default_rng(seed)
    fy, fx = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
    fall = 1 / np.maximum(np.hypot(fy, fx), 1 / max(width, height)) ** 1.3
    shared = rng.standard_normal((height, width))  # channels of a photograph go together
    channels = []
    for _ in range(3):
        noise = np.fft.rfft2(shared + 0.5 * rng.standard_normal((height, width)))
        channel = np.fft.irfft2(noise * fall, s=(height, width))
        channel = (channel - channel.mean()) / channel.std()
        channels.append(channel * rng.uniform(25, 60) + rng.uniform(70, 180))
    return Image.fromarray(np.clip(np.stack(channels, -1), 0, 255).astype(np.uint8))


def on_canvas(picture: Image.Image, width: int, height: int) -> Image.Image:
    """The picture in the middle of a larger canvas of its corner's colour."""
    canvas = Image.new("RGB", (width, height), picture.getpixel((0, 0)))
    side = min(width, height)
    canvas.paste(picture.resize((side, side)), ((width - side) // 2, (height - side) // 2))
    return canvas


def calibration(folder: Path, seed: int = 7, each: int = 10) -> None:
    """Write `each` real, `each` drawn and eight texture pictures with their prompts."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    lines: list[str] = []

    def keep(name: str, image: Image.Image, prompts: list[str]) -> None:
        image.save(folder / name, optimize=True)
        lines.extend(json.dumps({"image": name, "prompt": prompt}) for prompt in prompts)

    for number, picture in enumerate(rng.sample(easy_vqa("train"), each)):
        pairs = rng.sample(picture.open, min(2, len(picture.open))) or list(picture.yes_no[:2])
        keep(f"easy-vqa-{number:02}.png", picture.load(), [q for q, _ in pairs])
    for number in range(each):
        picture = drawn(seed, number)
        image = picture.load()
        if number % 2:
            image = on_canvas(image, *SIZES[number // 2])
        prompts = [q.capitalize() for q, _ in rng.sample(picture.open, 2)]
        keep(f"drawn-{number:02}.png", image, prompts)
    for number, size in enumerate(SIZES):
        keep(f"texture-{number:02}.png", texture(seed + number, *size), [rng.choice(DESCRIBE)])
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def held_out(folder: Path, number: int) -> Picture:
    """Copy one picture of easy-VQA's test split, which training never saw, with its questions."""
    picture = easy_vqa("test")[number]
    assert isinstance(picture.image, Path)
    (folder / "held_out.png").write_bytes(picture.image.read_bytes())
    answers = [answer for _, answer in picture.open]
    shape = next((answer for answer in answers if answer in SHAPES), None)
    colour = next((answer for answer in answers if answer not in SHAPES), None)
    if shape is None or colour is None:
        raise ValueError(f"test picture {number} is not asked for both its colour and its shape")
    about = {
        "origin": f"easy-vqa==1.0, data/test/images/{picture.image.name}, MIT licence",
        "note": "held out: the connector was trained on the train split only",
        "questions": [
            {"question": "what color is the shape?", "answer": colour},
            {"question": "what shape is in the image?", "answer": shape},
        ],
    }
    (folder / "held_out.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    return picture


def main(argv: list[str] | None = None) -> None:
    """Write both."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--held-out", type=int, default=0, help="number of the test picture")
    args = parser.parse_args(argv)
    calibration(args.folder / "calibration")
    held_out(args.folder, args.held_out)


if __name__ == "__main__":
    main()
