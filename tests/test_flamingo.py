"""IDEFICS: prompts, pixels, logits of every step and greedy tokens are those of transformers."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from answers import counted
from conftest import Cache
from steps import NEW_TOKENS, compare, cosine, greedy, load, prefill
from tiny_idefics import IDEFICS_CASES, build_idefics

from vlm_edge import VLM
from vlm_edge.errors import ImageCountMismatch, TemplateError
from vlm_edge.export.pipeline import export
from vlm_edge.export.precision import PrecisionPlan
from vlm_edge.export.verify import verify
from vlm_edge.runtime.bundle import Bundle

QUESTION = "what is the color?"
A, B, C = Path("wide.png"), Path("tall.png"), Path("photo.jpg")  # names of pictures
PROMPTS: dict[str, list[str | Path]] = {
    "image first": [A, QUESTION],
    "text first": ["User: this is ", A, " what is it?"],
    "text last": ["what", A],
    "two in a row": [A, B, QUESTION],
    "few-shot": [A, "what? a color.</s>", B, "what? the thing.</s>", C, "what?"],
    "two texts": ["what is", "the color of", A, "this?"],
    "no image": ["what is this and that"],
}


class IdeficsReference:
    def __init__(self, folder: Path) -> None:
        self.processor, self.model = load(folder, "IdeficsForVisionText2Text")

    def inputs(self, parts: list[str | Path]) -> Any:
        from transformers.image_utils import load_image

        opened = [load_image(str(p)) if isinstance(p, Path) else p for p in parts]
        return self.processor(text=opened, return_tensors="pt")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("idefics")
    return Cache(lambda case: build_idefics(case, root / case))


@pytest.fixture(scope="module")
def loaded(
    tmp_path_factory: pytest.TempPathFactory, checkpoints: Callable[[str], Path]
) -> Callable[[str], VLM]:
    root = tmp_path_factory.mktemp("idefics-bundles")

    def make(case: str) -> VLM:
        export(checkpoints(case), root / case)
        return VLM.load(root / case, threads=1)

    return Cache(make)


@pytest.fixture(scope="module")
def truth(checkpoints: Callable[[str], Path]) -> Callable[[str], IdeficsReference]:
    return Cache(lambda case: IdeficsReference(checkpoints(case)))


def placed(parts: list[str | Path], pictures: dict[str, Path]) -> list[str | Path]:
    return [pictures[part.name] if isinstance(part, Path) else part for part in parts]


@pytest.mark.verifies("flamingo", "token ids, pixels, logits of every step, greedy tokens")
@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("case", IDEFICS_CASES)
def test_answers_are_those_of_transformers(
    case: str,
    prompt: str,
    loaded: Callable[[str], VLM],
    truth: Callable[[str], IdeficsReference],
    pictures: dict[str, Path],
) -> None:
    vlm, reference = loaded(case), truth(case)
    parts = placed(PROMPTS[prompt], pictures)
    built = vlm.build_prompt(parts)
    inputs = reference.inputs(parts)
    assert built.token_ids == inputs["input_ids"][0].tolist()
    if built.pictures:
        pixels = np.concatenate([vlm.pixels(picture) for picture in built.pictures])
        np.testing.assert_array_equal(pixels, inputs["pixel_values"][0].numpy())
    tokens, logits = greedy(reference.model, inputs)
    compare(vlm, built, tokens, logits)
    assert vlm.generate(parts, max_new_tokens=NEW_TOKENS).token_ids == tokens


@pytest.mark.verifies("flamingo", "`vlm verify` ladder")
@pytest.mark.parametrize("case", IDEFICS_CASES)
def test_the_ladder_is_climbed(
    case: str,
    loaded: Callable[[str], VLM],
    checkpoints: Callable[[str], Path],
    pictures: dict[str, Path],
) -> None:
    images = [pictures["wide.png"], pictures["rotated.jpg"]]
    report = verify(loaded(case).bundle.path, checkpoints(case), images, "what is it?", 6)
    assert report.ok, report
    names = {rung.name for rung in report.rungs if rung.probe == "picture"}
    assert {"vision", "media_kv", "prefill logits", "greedy tokens"} <= names
    assert ("connector" in names) == (IDEFICS_CASES[case].perceiver_args is not None)


def test_a_picture_costs_once(loaded: Callable[[str], VLM], pictures: dict[str, Path]) -> None:
    """Vision, resampler, keys and values once a picture, and no engine but the language model a token."""
    vlm = loaded("idefics")
    vlm.clear_image_cache()
    runs = [counted(vlm, name) for name in ("vision", "connector", "media_kv")]
    image = pictures["wide.png"]
    for question in (QUESTION, "what is this"):
        vlm.generate([image, question], max_new_tokens=5, ignore_eos=True)
    vlm.generate([image, "a", image, "b"], max_new_tokens=2)
    assert runs == [[1], [1], [1]]


def test_long_prompts_are_prefilled_in_chunks(
    loaded: Callable[[str], VLM], pictures: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What each position sees goes along with it."""
    from vlm_edge.runtime import ort_decoder

    vlm = loaded("idefics-plain")
    parts = placed(PROMPTS["few-shot"], pictures)
    whole = vlm.generate(parts, max_new_tokens=NEW_TOKENS).token_ids
    monkeypatch.setattr(ort_decoder, "CHUNK", 7)
    assert vlm.generate(parts, max_new_tokens=NEW_TOKENS).token_ids == whole


def test_prompts_have_one_place_a_picture(
    loaded: Callable[[str], VLM], pictures: dict[str, Path]
) -> None:
    vlm, image = loaded("idefics"), pictures["wide.png"]
    plain = vlm.build_prompt(QUESTION, [image])
    assert plain.token_ids == vlm.build_prompt([image, QUESTION]).token_ids
    assert plain.token_ids.count(vlm.manifest.prompt.image_token_id) == 1
    own = vlm.build_prompt("what<fake_token_around_image><image><fake_token_around_image>", [image])
    assert own.token_ids == vlm.build_prompt(["what", image]).token_ids
    with pytest.raises(ImageCountMismatch):
        vlm.build_prompt("<image><image>", [image])
    with pytest.raises(TemplateError, match="single questions"):
        vlm.chat()


@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize("case", ["idefics", "idefics-plain"])
def test_quantized_bundles_stay_near(
    case: str,
    precision: str,
    loaded: Callable[[str], VLM],
    checkpoints: Callable[[str], Path],
    pictures: dict[str, Path],
    tmp_path: Path,
) -> None:
    bundle = tmp_path / "bundle"
    report = export(checkpoints(case), bundle, precision=PrecisionPlan.uniform(precision))
    parts = [name for name in report.errors if name != "llm"]
    assert parts == [
        name for name in ("vision", "connector", "media_kv") if name in report.precisions
    ]
    assert all(report.errors[name]["cosine"] > 0.999 for name in parts)
    assert report.errors["llm"]["kl"] < (0.02 if precision == "int8" else 0.2)
    exact, asked = loaded(case), placed(PROMPTS["few-shot"], pictures)
    with VLM.load(bundle, threads=1) as vlm:
        found = prefill(vlm, vlm.build_prompt(asked))
    expected = prefill(exact, exact.build_prompt(asked))
    assert cosine(found, expected) > (0.97 if precision == "int8" else 0.85)
    assert Bundle(bundle).manifest.decoder.media == exact.manifest.decoder.media


def test_a_conversation_adds_a_picture_later(
    checkpoints: Callable[[str], Path], pictures: dict[str, Path], tmp_path: Path
) -> None:
    """What was prefilled before stays in the cache, and the answer is that of the whole asked anew."""
    folder = shutil.copytree(checkpoints("idefics"), tmp_path / "checkpoint")
    around = "<fake_token_around_image>"
    (folder / "chat_template.jinja").write_text(
        "{{ bos_token }}{% for message in messages %}{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}" + f"{around}<image>{around}"
        "{% else %}{{ part['text'] }}{% endif %}{% endfor %} {% endfor %}"
    )
    export(folder, tmp_path / "bundle")
    with VLM.load(tmp_path / "bundle", threads=1) as vlm:
        chat = vlm.chat()
        chat.ask("what is this", max_new_tokens=3)
        first = chat.ask("and this?", [pictures["wide.png"]], max_new_tokens=3)
        second = chat.ask("what is that?", [pictures["tall.png"]], max_new_tokens=6)
        assert second.timings.prefilled_tokens < second.prompt_tokens - first.prompt_tokens + 4
        fresh = vlm.generate(chat.messages[:-1], max_new_tokens=6)
        assert second.token_ids == fresh.token_ids
