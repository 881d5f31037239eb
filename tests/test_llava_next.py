"""LLaVA-NeXT says what transformers says, whatever a picture's shape and however many there are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from answers import counted
from pictures import scene
from reference import Reference
from tiny_next import CASES

from vlm_edge import VLM
from vlm_edge.runtime import ort_decoder

NEW_TOKENS = 12
MARGIN = 2e-3  # a winner that leads by less could change by rounding; logits are of order 3
LOGIT_TOLERANCE = 1e-4

SIZES = {
    "square": (48, 48), "1 to 4": (20, 80), "4 to 1": (200, 50), "odd": (37, 53), "minute": (5, 3),
    "large": (4000, 3000),
}  # fmt: skip
QUESTION = "what is the color?"
PROMPTS: dict[str, tuple[str, tuple[str, ...]]] = {
    **{name: (f"<image>\n{QUESTION}", (name,)) for name in SIZES},
    "two unequal": (f"<image> and <image>: {QUESTION}", ("square", "1 to 4")),
    "three, one twice": (f"<image><image>{QUESTION}<image>", ("odd", "4 to 1", "odd")),
    "none": ("what is this and that", ()),
    "long": ("<image>" + "the cat and what is this? " * 24, ("odd",)),
}


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Image files by name; see SIZES."""
    folder = tmp_path_factory.mktemp("shapes")
    paths = {name: folder / f"{name}.{'jpg' if name == 'large' else 'png'}" for name in SIZES}
    for seed, (name, size) in enumerate(SIZES.items()):
        scene(*size, seed).save(paths[name])
    return paths


def logits(vlm: VLM, prompt: str, images: Sequence[Path]) -> np.ndarray:
    """Of the position after the prompt, float32 [vocab]."""
    vlm.decoder.length = 0
    return vlm.decoder.prefill(vlm.embed(vlm.build_prompt(prompt, images, False))).copy()


@pytest.mark.verifies("llava_next", "token ids, prefill logits and greedy tokens")
@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("case", CASES)
def test_prompt_logits_and_tokens_are_those_of_transformers(
    case: str,
    prompt: str,
    vlm: Callable[..., VLM],
    reference: Callable[[str], Reference],
    shapes: dict[str, Path],
) -> None:
    text, names = PROMPTS[prompt]
    images, model, truth = [shapes[name] for name in names], vlm(case), reference(case)
    expected = truth.answer(text, images, NEW_TOKENS)
    assert min(expected.margins) > MARGIN, "a near-tie: choose another salt in tiny_next.py"
    built = model.build_prompt(text, images, False)
    assert list(built.token_ids) == expected.prompt_ids
    np.testing.assert_allclose(
        logits(model, text, images), truth.logits(text, images), rtol=0, atol=LOGIT_TOLERANCE
    )
    result = model.generate(text, images, False, max_new_tokens=NEW_TOKENS, temperature=0)
    assert result.token_ids == expected.token_ids
    assert result.visual_tokens == sum(plan.tokens for plan in result.plans)


def test_answers_are_not_all_alike(
    reference: Callable[[str], Reference], shapes: dict[str, Path]
) -> None:
    """Tokens that every prompt gets would be equal whatever the pictures were made into."""
    for case in CASES:
        text = f"<image>\n{QUESTION}"
        answers = {tuple(reference(case).answer(text, [p], 8).token_ids) for p in shapes.values()}
        assert len(answers) >= 5, case


@pytest.mark.verifies("llava_next", "pixels")
@pytest.mark.parametrize("case", ["next-clip-mistral", "next-siglip-qwen2"])
def test_pixels_are_the_processors_without_its_padding_tiles(
    case: str,
    vlm: Callable[..., VLM],
    reference: Callable[[str], Reference],
    shapes: dict[str, Path],
) -> None:
    inputs = reference(case).inputs("<image>" * len(shapes), list(shapes.values()))
    model = vlm(case)
    built = model.build_prompt("<image>" * len(shapes), list(shapes.values()), False)
    counts = {picture.plan.tiles for picture in built.pictures}
    assert len(counts) > 1, "all have as many tiles: nothing is padded"
    for picture, expected in zip(built.pictures, inputs["pixel_values"].numpy(), strict=True):
        found = model.pixels(picture)
        np.testing.assert_array_equal(found, expected[: len(found)])
        assert not expected[len(found) :].any()


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_prefill_in_chunks_is_prefill_at_once(
    chunk: int,
    vlm: Callable[..., VLM],
    reference: Callable[[str], Reference],
    shapes: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Chunks that end anywhere: within a picture's overview, in its rows, between pictures."""
    text, names = PROMPTS["two unequal"]
    images, model = [shapes[name] for name in names], vlm("next-clip-mistral")
    monkeypatch.setattr(ort_decoder, "CHUNK", chunk)
    expected = reference("next-clip-mistral").logits(text, images)
    np.testing.assert_allclose(logits(model, text, images), expected, rtol=0, atol=LOGIT_TOLERANCE)


def test_the_finest_case_takes_several_chunks_by_itself(
    vlm: Callable[..., VLM], shapes: dict[str, Path]
) -> None:
    """What the comparison above covers: a picture of more tokens than one chunk has positions."""
    assert vlm("next-fine-native").count_tokens(*SIZES["large"]) > 3 * ort_decoder.CHUNK


@pytest.fixture
def pair(bundle: Callable[..., Path]) -> Iterator[tuple[VLM, VLM]]:
    """A model with nothing in its caches, and one that answers each time anew."""
    with (
        VLM.load(bundle("next-clip-mistral"), threads=1) as model,
        VLM.load(bundle("next-clip-mistral"), threads=1) as fresh,
    ):
        yield model, fresh


def test_a_chat_that_adds_pictures(pair: tuple[VLM, VLM], shapes: dict[str, Path]) -> None:
    model, fresh = pair
    chat, before = model.chat(), 0
    turns: list[tuple[str, list[str]]] = [
        ("what is this?", ["1 to 4"]), ("and this?", ["4 to 1", "minute"]), ("the color?", []),
    ]  # fmt: skip
    settings: dict[str, Any] = {"max_new_tokens": 6, "ignore_eos": True}
    for text, names in turns:
        result = chat.ask(text, [shapes[name] for name in names], **settings)
        expected = fresh.generate(chat.messages[:-1], **settings)
        assert result.token_ids == expected.token_ids
        assert result.timings.prefilled_tokens <= result.timings.prompt_tokens - before + 6
        assert (result.timings.vision_ms > 0) == bool(names)
        before = result.timings.prompt_tokens


def test_a_question_about_the_same_picture_encodes_it_once(
    pair: tuple[VLM, VLM], shapes: dict[str, Path]
) -> None:
    model, _ = pair
    runs = counted(model, "vision")
    for text in (QUESTION, "what is this?"):
        model.generate(text, [shapes["square"], shapes["square"]], max_new_tokens=2)
    assert runs == [1] * 5  # an overview and 2x2 tiles, one at a time
    model.generate(QUESTION, [shapes["square"]], max_new_tokens=2, max_tiles=3)
    assert runs == [1] * 8  # with other tiles it is another picture


def test_fewer_tiles_by_the_models_own_rule(
    vlm: Callable[..., VLM], shapes: dict[str, Path]
) -> None:
    """What the model would make of the picture if it had only the resolutions that are within bounds."""
    model = vlm("next-clip-mistral")
    plan = model.build_prompt("<image>", [shapes["square"]], False).pictures[0].plan
    assert plan.name == "2x2"
    result = model.generate(QUESTION, [shapes["square"]], max_new_tokens=1, max_tiles=3)
    assert result.plans[0].name == "1x2"
    assert result.visual_tokens == result.plans[0].tokens < plan.tokens
    alone = model.generate(QUESTION, [shapes["square"]], max_new_tokens=1, max_tiles=1)
    assert alone.plans[0].equation == "10 = 9 + 1"


# Measured, nats a token: int8 0.018 and 0.031, int4 0.089 both. Random weights have nothing redundant to lose.
@pytest.mark.parametrize(("precision", "most"), [("int8", 0.06), ("int4", 0.2)])
@pytest.mark.parametrize("case", ["next-clip-mistral", "next-siglip-qwen2"])
def test_quantized_bundles_stay_close(
    case: str,
    precision: str,
    most: float,
    vlm: Callable[..., VLM],
    reference: Callable[[str], Reference],
    shapes: dict[str, Path],
) -> None:
    from vlm_edge.calibration.divergence import divergence

    model, truth = vlm(case, precision), reference(case)
    pairs = []
    for prompt in ("square", "1 to 4", "two unequal", "none"):
        text, names = PROMPTS[prompt]
        images = [shapes[name] for name in names]
        pairs.append((logits(model, text, images), truth.logits(text, images)))
    assert 0 < divergence(pairs).kl < most
    audited = model.manifest.calibration
    assert audited is not None
    assert sum(audited["data"]["tilings"].values()) > 0


def test_the_audit_names_the_tilings_never_seen(
    tmp_path: Path, checkpoint: Callable[[str], Path]
) -> None:
    from vlm_edge.export.pipeline import export
    from vlm_edge.export.precision import PrecisionPlan

    folder = tmp_path / "pictures"
    folder.mkdir()
    for seed in range(5):  # wide ones alone
        scene(120, 30, seed).save(folder / f"{seed}.png")
    report = export(
        checkpoint("next-clip-mistral"),
        tmp_path / "bundle",
        precision=PrecisionPlan.uniform("int8"),
        calibration_images=folder,
    )
    (sentence,) = [warning for warning in report.warnings if "tilings" in warning]
    assert (
        sentence == "calibration had no picture of the tilings 1x2, 2x1, 2x2, 3x1 (rows x columns)"
    )
