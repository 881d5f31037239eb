"""Llama 3.2 Vision: prompts, pixels, logits of every step and greedy tokens are those of transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from answers import counted
from conftest import Cache
from tiny_mllama import MLLAMA_CASES, build_mllama

from vlm_edge import VLM
from vlm_edge.errors import ImageCountMismatch
from vlm_edge.export.pipeline import export
from vlm_edge.export.precision import PrecisionPlan

MARGIN, LOGIT_TOLERANCE, NEW_TOKENS = 5e-4, 1e-4, 12  # the margin in deviations of the logits
QUESTION = "what is the color?"
IMAGE = "<|image|>"
# name -> text, its pictures, whether it goes through the chat template
PROMPTS: dict[str, tuple[str, list[str], bool]] = {
    "wide": (QUESTION, ["wide.png"], True),
    "tall": (QUESTION, ["tall.png"], True),
    "tiny": (QUESTION, ["pixel.png"], True),
    "two in a row": (QUESTION, ["small.png", "tall.png"], True),
    "no image": (QUESTION, [], True),
    "image first": (f"{IMAGE}what is", ["photo.jpg"], False),
    "text first": (f"what is this: {IMAGE}what", ["wide.png"], False),
    "in turn": (f"{IMAGE}a thing {IMAGE}{IMAGE}the color {IMAGE}what",
                ["small.png", "wide.png", "tall.png", "rotated.jpg"], False),
    "bos within": (f"{IMAGE}<|begin_of_text|>what is", ["grey.png"], False),
    "image last": (f"a {IMAGE}what is {IMAGE}", ["cmyk.jpg", "alpha.png"], False),
    "no image, verbatim": ("what is this", [], False),
}  # fmt: skip


class MllamaReference:
    def __init__(self, folder: Path) -> None:
        import torch
        from transformers import AutoProcessor, MllamaForConditionalGeneration
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        self.processor = AutoProcessor.from_pretrained(folder)
        model = MllamaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
        self.model = model.eval()

    def inputs(self, text: str, images: list[Path], template: bool) -> Any:
        from transformers.image_utils import load_image

        opened = [load_image(str(path)) for path in images]
        special = True
        if template:
            content = [{"type": "image"} for _ in images] + [{"type": "text", "text": text}]
            messages = [{"role": "user", "content": content}]
            text = self.processor.apply_chat_template(messages, add_generation_prompt=True)
            special = False
        return self.processor(
            images=opened or None, text=text, add_special_tokens=special, return_tensors="pt"
        )

    def answer(self, inputs: Any) -> tuple[list[int], np.ndarray]:
        import torch

        with torch.inference_mode():
            output = self.model.generate(
                **inputs, do_sample=False, max_new_tokens=NEW_TOKENS, output_logits=True,
                return_dict_in_generate=True,
            )  # fmt: skip
        count = len(output.logits)
        return output.sequences[0, -count:].tolist(), torch.cat(output.logits).numpy()


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("mllama")
    return Cache(lambda case: build_mllama(case, root / case))


@pytest.fixture(scope="module")
def loaded(
    tmp_path_factory: pytest.TempPathFactory, checkpoints: Callable[[str], Path]
) -> Callable[[str], VLM]:
    root = tmp_path_factory.mktemp("mllama-bundles")

    def make(case: str) -> VLM:
        export(checkpoints(case), root / case)
        return VLM.load(root / case, threads=1)

    return Cache(make)


@pytest.fixture(scope="module")
def truth(checkpoints: Callable[[str], Path]) -> Callable[[str], MllamaReference]:
    import torch

    torch.set_num_threads(1)
    return Cache(lambda case: MllamaReference(checkpoints(case)))


@pytest.mark.verifies("mllama", "token ids, pixels, logits of every step, greedy tokens")
@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("case", MLLAMA_CASES)
def test_answers_are_those_of_transformers(
    case: str,
    prompt: str,
    loaded: Callable[[str], VLM],
    truth: Callable[[str], MllamaReference],
    pictures: dict[str, Path],
) -> None:
    vlm, reference = loaded(case), truth(case)
    text, names, template = PROMPTS[prompt]
    images = [pictures[name] for name in names]
    built = vlm.build_prompt(text, images, template)
    inputs = reference.inputs(text, images, template)
    assert built.token_ids == inputs["input_ids"][0].tolist()
    for index, picture in enumerate(built.pictures):
        theirs = inputs["pixel_values"][0, index].numpy()
        pixels = vlm.pixels(picture)
        np.testing.assert_array_equal(pixels, theirs[: len(pixels)])
        assert not theirs[len(pixels) :].any()
        assert picture.plan.arrangement == inputs["aspect_ratio_ids"][0, index]
        assert picture.plan.tiles == inputs["aspect_ratio_mask"][0, index].sum()
    tokens, logits = reference.answer(inputs)
    read = vlm.inputs(built)
    vlm.decoder.length = 0
    assert read.media is not None
    vlm.decoder.attend(read.media)
    found = [vlm.decoder.prefill(read.embeds).copy()]
    rows = vlm.embeddings.rows(np.array(tokens[:-1], np.int64))
    found += [vlm.decoder.decode(row).copy() for row in rows]
    for step, (ours, theirs) in enumerate(zip(found, logits, strict=True)):
        error = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
        assert error < LOGIT_TOLERANCE, f"step {step}"
    best = np.sort(logits, axis=1)
    margins = (best[:, -1] - best[:, -2]) / logits.std(axis=1)
    assert margins.min() > MARGIN, "near a tie: choose another salt"
    assert vlm.generate(text, images, template, max_new_tokens=NEW_TOKENS).token_ids == tokens


@pytest.mark.verifies("mllama", "`vlm verify` ladder")
@pytest.mark.parametrize("case", MLLAMA_CASES)
def test_the_ladder_is_climbed(
    case: str,
    loaded: Callable[[str], VLM],
    checkpoints: Callable[[str], Path],
    pictures: dict[str, Path],
) -> None:
    from vlm_edge.export.verify import verify

    images = [pictures["wide.png"], pictures["rotated.jpg"]]
    report = verify(loaded(case).bundle.path, checkpoints(case), images, "what is it?", 6)
    assert report.ok, report
    names = {rung.name for rung in report.rungs if rung.probe == "picture"}
    assert {"vision", "connector", "media_kv", "prefill logits", "greedy tokens"} <= names


def test_a_picture_costs_once(loaded: Callable[[str], VLM], pictures: dict[str, Path]) -> None:
    """All tiles of a picture go through the encoder in one run."""
    vlm = loaded("mllama")
    vlm.clear_image_cache()
    runs = [counted(vlm, name) for name in ("vision", "connector", "media_kv")]
    image = pictures["wide.png"]
    for question in (QUESTION, "what is this"):
        answer = vlm.generate(question, [image], max_new_tokens=5, ignore_eos=True)
    tiles = answer.plans[0].tiles
    assert tiles > 1
    assert runs == [[tiles], [1] * 4, [1]]


def test_long_prompts_are_prefilled_in_chunks(
    loaded: Callable[[str], VLM], pictures: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from vlm_edge.runtime import ort_decoder

    vlm = loaded("mllama")
    text, names, template = PROMPTS["in turn"]
    images = [pictures[name] for name in names]
    whole = vlm.generate(text, images, template, max_new_tokens=NEW_TOKENS).token_ids
    monkeypatch.setattr(ort_decoder, "CHUNK", 7)
    assert vlm.generate(text, images, template, max_new_tokens=NEW_TOKENS).token_ids == whole


def test_a_chat_answers_as_its_whole_conversation(
    loaded: Callable[[str], VLM], pictures: dict[str, Path]
) -> None:
    """What a turn keeps of the turns before is what the whole prompt gives."""
    vlm = loaded("mllama")
    chat = vlm.chat()
    messages: list[dict[str, Any]] = []
    for images in ([], ["wide.png"], [], ["tall.png"]):
        given = [pictures[name] for name in images]
        parts = [{"type": "image", "image": image} for image in given]
        messages.append({"role": "user", "content": [*parts, {"type": "text", "text": QUESTION}]})
        answer = chat.ask(QUESTION, given, max_new_tokens=4, ignore_eos=True)
        alone = vlm.generate(messages, max_new_tokens=4, ignore_eos=True)
        assert answer.token_ids == alone.token_ids
        messages.append({"role": "assistant", "content": answer.text})


def test_fewer_tiles_are_an_arrangement_too(
    loaded: Callable[[str], VLM], pictures: dict[str, Path]
) -> None:
    vlm = loaded("mllama")
    own = vlm.build_prompt(QUESTION, [pictures["wide.png"]])
    from vlm_edge.runtime.tiling import TileLimits

    most = TileLimits(max_tiles=1)
    one = vlm.build_prompt(QUESTION, [pictures["wide.png"]], limits=most)
    assert own.token_ids == one.token_ids
    (plan,) = (picture.plan for picture in one.pictures)
    assert (plan.name, plan.arrangement, plan.tiles) == ("1x1", 1, 1)
    assert own.pictures[0].plan.tiles > 1
    vlm.generate(QUESTION, [pictures["wide.png"]], max_new_tokens=2, max_tiles=1)


def test_prompts_have_one_place_a_picture(
    loaded: Callable[[str], VLM], pictures: dict[str, Path]
) -> None:
    vlm, image = loaded("mllama"), pictures["wide.png"]
    built = vlm.build_prompt(QUESTION, [image])
    assert built.token_ids.count(vlm.manifest.prompt.image_token_id) == 1
    with pytest.raises(ImageCountMismatch):
        vlm.build_prompt(f"{IMAGE}{IMAGE}", [image], template=False)


@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize("case", ["mllama", "mllama-native"])
def test_quantized_bundles_stay_near(
    case: str,
    precision: str,
    loaded: Callable[[str], VLM],
    checkpoints: Callable[[str], Path],
    pictures: dict[str, Path],
    tmp_path: Path,
) -> None:
    """The encoder is calibrated on whole pictures, each with its arrangement."""
    bundle = tmp_path / "bundle"
    report = export(checkpoints(case), bundle, precision=PrecisionPlan.uniform(precision))
    assert report.precisions == {
        "vision": "int8", "connector": "int8", "media_kv": "int8", "llm": precision
    }  # fmt: skip
    for name in ("vision", "connector", "media_kv"):
        assert report.errors[name]["cosine"] > 0.999
    assert report.errors["llm"]["kl"] < (0.02 if precision == "int8" else 0.2)
    text, names, template = PROMPTS["in turn"]
    found = []
    for vlm in (loaded(case), VLM.load(bundle, threads=1)):
        read = vlm.inputs(vlm.build_prompt(text, [pictures[name] for name in names], template))
        assert read.media is not None
        vlm.decoder.length = 0
        vlm.decoder.attend(read.media)
        found.append(vlm.decoder.prefill(read.embeds).copy())
    cosine = float(found[0] @ found[1] / np.linalg.norm(found[0]) / np.linalg.norm(found[1]))
    assert cosine > (0.97 if precision == "int8" else 0.85)
