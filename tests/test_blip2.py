"""BLIP-2 and InstructBLIP: prompts, pixels, logits and greedy tokens are those of transformers."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from answers import counted
from conftest import Cache
from steps import NEW_TOKENS, compare, cosine, greedy, load, prefill
from test_verify import disturb
from tiny import edit_json
from tiny_blip2 import BLIP_CASES, build_blip, modern_twin

from vlm_edge import VLM
from vlm_edge.errors import (
    CheckpointMissing,
    ImageCountMismatch,
    PromptError,
    TemplateError,
    UnsupportedConfig,
    VlmEdgeError,
)
from vlm_edge.export.pipeline import export, read_model
from vlm_edge.export.precision import PrecisionPlan
from vlm_edge.export.verification.report import STAGES, TEXT_STAGES
from vlm_edge.export.verify import verify

QUESTION = "what is the color?"
PROMPTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "question": (QUESTION, ("wide.png",)),
    "long": (
        "Question: what is this and that on the thing, and what color is it? Answer:",
        ("tall.png",),
    ),
    "tiny image": ("what", ("pixel.png",)),
    "two images": ("what is in these?", ("photo.jpg", "small.png")),
    "no image": ("what is this and that", ()),
}
PLAIN = [
    name for name, case in BLIP_CASES.items() if case.text_args.get("word_embed_proj_dim") is None
]


class BlipReference:
    """The checkpoint in transformers, prompted as its own processor does."""

    def __init__(self, folder: Path) -> None:
        self.processor, self.model = load(folder, "AutoModelForImageTextToText")

    def inputs(self, text: str, images: Sequence[Path]) -> dict[str, Any]:
        """What the processor makes of one image. Of several it makes places for one: the others' are put
        in front too, as many as the model fills."""
        import torch
        from transformers.image_utils import load_image

        pictures = [load_image(str(image)) for image in images]
        inputs = dict(self.processor(images=pictures or None, text=text, return_tensors="pt"))
        count = max(len(images) - 1, 0)
        if count:
            token = self.model.config.image_token_index
            more = torch.full((1, count * self.model.config.num_query_tokens), token)
            inputs["input_ids"] = torch.cat([more, inputs["input_ids"]], 1)
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
            for name in ("qformer_input_ids", "qformer_attention_mask"):
                if name in inputs:
                    inputs[name] = inputs[name].repeat(count + 1, 1)
        return inputs

    def answer(self, inputs: dict[str, Any], **settings: Any) -> tuple[list[int], np.ndarray]:
        """New tokens and the logits [new, vocab] each was chosen from."""
        if "pixel_values" in inputs:
            return greedy(self.model, inputs, **settings)
        # The whole model wants an image; its language model alone does without.
        kept = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        return greedy(self.model.language_model, kept, **settings)


@pytest.fixture(scope="module")
def blips(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """blips(case) -> folder of the checkpoint."""
    root = tmp_path_factory.mktemp("blips")
    return Cache(lambda case: build_blip(case, root / case))


@pytest.fixture(scope="module")
def loaded(
    tmp_path_factory: pytest.TempPathFactory, blips: Callable[[str], Path]
) -> Callable[[str], VLM]:
    root = tmp_path_factory.mktemp("blip-bundles")

    def make(case: str) -> VLM:
        export(blips(case), root / case)
        return VLM.load(root / case, device="cpu", threads=1)

    return Cache(make)


@pytest.fixture(scope="module")
def truth(
    tmp_path_factory: pytest.TempPathFactory, blips: Callable[[str], Path]
) -> Callable[[str], BlipReference]:
    root = tmp_path_factory.mktemp("twins")

    def make(case: str) -> BlipReference:
        spec, folder = BLIP_CASES[case], blips(case)
        if spec.layout == "old":
            folder = modern_twin(folder, root / case, spec)
        return BlipReference(folder)

    return Cache(make)


@pytest.mark.parametrize(
    ("case", "prompt"),
    [
        pytest.param(
            name,
            prompt,
            marks=pytest.mark.verifies(
                case.family, "token ids, pixels, logits of every step, greedy tokens"
            ),
        )
        for name, case in BLIP_CASES.items()
        for prompt, (_, images) in PROMPTS.items()
        # The reference fills the second image's places with the first one's values there.
        if len(images) < 2 or name in PLAIN
    ],
)
def test_answers_are_those_of_transformers(
    case: str,
    prompt: str,
    loaded: Callable[[str], VLM],
    truth: Callable[[str], BlipReference],
    pictures: dict[str, Path],
) -> None:
    vlm, reference = loaded(case), truth(case)
    text, names = PROMPTS[prompt]
    images = [pictures[name] for name in names]
    built = vlm.build_prompt(text, images, False)
    inputs = reference.inputs(text, images)
    assert built.token_ids == inputs["input_ids"][0].tolist()
    if images and "qformer_input_ids" in inputs:
        assert list(built.instruction or ()) == inputs["qformer_input_ids"][0].tolist()
    if images:
        pixels = np.concatenate([vlm.pixels(picture) for picture in built.pictures])
        np.testing.assert_array_equal(pixels, inputs["pixel_values"].numpy())
    tokens, logits = reference.answer(inputs)
    compare(vlm, built, tokens, logits)
    answer = vlm.generate(text, images, False, max_new_tokens=NEW_TOKENS)
    assert answer.token_ids == tokens


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(
            name,
            marks=pytest.mark.verifies(BLIP_CASES[name].family, "`vlm verify` ladder"),
        )
        for name in BLIP_CASES
        if BLIP_CASES[name].layout != "old"
    ],
)
def test_the_ladder_is_climbed(
    case: str,
    loaded: Callable[[str], VLM],
    blips: Callable[[str], Path],
    pictures: dict[str, Path],
) -> None:
    images = [pictures[name] for name in ("wide.png", "rotated.jpg")][: 1 + (case in PLAIN)]
    report = verify(loaded(case).bundle.path, blips(case), images, "what is it?", 6)
    assert report.ok, report
    assert {rung.name for rung in report.rungs if rung.probe == "picture"} == set(STAGES)
    assert {rung.name for rung in report.rungs if rung.probe == "text"} == set(TEXT_STAGES)


DAMAGES = {
    "blip2-opt": ("connector", "connector.layers.1.attention.dense.weight", "connector.layers.1"),
    "blip2-opt-post-norm": ("vision", "vision.layers.1.mlp.fc1.weight", "vision.layers.1"),
    "instructblip-vicuna": (
        "connector", "connector.layers.0.feed_forward.dense.weight", "connector.layers.0"),
    "blip2-t5": ("llm_encoder", "llm_encoder.layers.1.feed_forward.wo.weight", "llm_encoder.layers.1"),
    "instructblip-t5": ("llm", "llm.layers.1.feed_forward.wo.weight", "llm.layers.1"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGES)
def test_a_damaged_layer_is_named(
    case: str,
    loaded: Callable[[str], VLM],
    blips: Callable[[str], Path],
    pictures: dict[str, Path],
    tmp_path: Path,
) -> None:
    engine, tensor, layer = DAMAGES[case]
    bundle = shutil.copytree(loaded(case).bundle.path, tmp_path / case)
    disturb(bundle, engine, tensor)
    report = verify(bundle, blips(case), [pictures["wide.png"]], "what is it?", 6)
    assert not report.ok
    assert report.divergence is not None
    assert report.divergence.layer == layer


# -- prompts ------------------------------------------------------------------------------------


def test_places_in_the_text_are_kept(
    loaded: Callable[[str], VLM], pictures: dict[str, Path]
) -> None:
    vlm = loaded("blip2-opt")
    token, image = vlm.manifest.prompt.image_token_id, pictures["wide.png"]
    queries = BLIP_CASES["blip2-opt"].queries
    in_front = vlm.build_prompt(QUESTION, [image]).token_ids  # no template: taken verbatim
    assert in_front[:queries] == [token] * queries
    assert in_front[queries:] == vlm.tokenizer.encode(QUESTION)
    assert vlm.build_prompt([image, QUESTION]).token_ids == in_front
    within = vlm.build_prompt(["what", image, "is"]).token_ids
    assert within == vlm.tokenizer.encode("what" + "<image>" * queries + "is")
    assert vlm.build_prompt("what<image>is", [image], False).token_ids == within
    with pytest.raises(ImageCountMismatch):
        vlm.build_prompt("<image><image>what", [image], False)
    with pytest.raises(TemplateError, match="single questions"):
        vlm.chat()
    with pytest.raises(TemplateError):
        vlm.build_prompt([{"role": "user", "content": "what"}], [image])


def test_a_template_without_places_gets_them_in_front(
    loaded: Callable[[str], VLM], pictures: dict[str, Path]
) -> None:
    vlm, images = loaded("blip2-llama"), [pictures["wide.png"], pictures["tall.png"]]
    queries = BLIP_CASES["blip2-llama"].queries
    built = vlm.build_prompt(QUESTION, images)
    assert built.text == f"USER: \n\n{QUESTION} ASSISTANT:"
    token = vlm.manifest.prompt.image_token_id
    assert built.token_ids == [token] * 2 * queries + vlm.tokenizer.encode(built.text)
    chat = vlm.chat()
    first = chat.ask(QUESTION, [images[0]], max_new_tokens=4)
    second = chat.ask("what is that?", max_new_tokens=4)
    assert second.timings.prefilled_tokens < second.prompt_tokens - first.prompt_tokens + 4
    fresh = vlm.generate(chat.messages[:-1], max_new_tokens=4)
    assert second.token_ids == fresh.token_ids


def test_several_questions_about_an_image_encode_it_once(
    loaded: Callable[[str], VLM], pictures: dict[str, Path]
) -> None:
    image = pictures["wide.png"]
    for case, connected in (("blip2-opt", 1), ("instructblip-vicuna", 3)):
        vlm = loaded(case)
        vlm.clear_image_cache()
        vision, connector = counted(vlm, "vision"), counted(vlm, "connector")
        for question in (QUESTION, "what is this", QUESTION):
            vlm.generate(question, [image], max_new_tokens=2)
        assert (len(vision), len(connector)) == (1, connected)


def test_the_instruction_decides_the_visual_tokens(
    loaded: Callable[[str], VLM], pictures: dict[str, Path]
) -> None:
    vlm, image = loaded("instructblip-vicuna"), pictures["wide.png"]
    one, two = (vlm.build_prompt(text, [image]) for text in (QUESTION, "what is this"))
    first, second = (vlm.encode(b.pictures[0], b.instruction) for b in (one, two))
    assert np.abs(first - second).max() > 1e-2
    assert one.visual_keys != two.visual_keys
    most = BLIP_CASES["instructblip-vicuna"].qformer_args.get("max_position_embeddings", 90)
    with pytest.raises(PromptError, match=f"at most {most}"):
        vlm.generate("what " * most, [image])
    assert vlm.build_prompt("what " * most).instruction is None  # no picture: nobody reads it


@pytest.mark.parametrize("case", ["blip2-t5", "blip2-opt", "instructblip-t5"])
def test_a_repetition_penalty_counts_what_transformers_counts(
    case: str,
    loaded: Callable[[str], VLM],
    truth: Callable[[str], BlipReference],
    pictures: dict[str, Path],
) -> None:
    """The prompt of a decoder-only model, an encoder-decoder's answer alone."""
    inputs = truth(case).inputs(QUESTION, [pictures["wide.png"]])
    tokens, _ = truth(case).answer(inputs, repetition_penalty=1.7)
    answer = loaded(case).generate(
        QUESTION, [pictures["wide.png"]], max_new_tokens=NEW_TOKENS, repetition_penalty=1.7
    )
    assert answer.token_ids == tokens


def test_an_encoder_decoder_reads_the_prompt_once(
    loaded: Callable[[str], VLM], pictures: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    vlm: Any = loaded("blip2-t5")
    encoder, runs = vlm.decoder.encoder, []
    original = encoder.run

    def run(feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        runs.append(feeds["inputs_embeds"].shape[1])
        return original(feeds)

    monkeypatch.setattr(encoder, "run", run)
    long = vlm.generate(
        "what is this and that " * 9, [pictures["wide.png"]], max_new_tokens=70, ignore_eos=True
    )
    assert runs == [long.prompt_tokens]
    assert len(long.token_ids) == 70  # beyond what the cache was made for, and the distances' bound
    again = vlm.generate(QUESTION, [pictures["wide.png"]], max_new_tokens=NEW_TOKENS)
    vlm.decoder.clear()
    fresh = vlm.generate(QUESTION, [pictures["wide.png"]], max_new_tokens=NEW_TOKENS)
    assert again.token_ids == fresh.token_ids


# -- quantized ----------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize(
    "case", ["blip2-opt", "instructblip-vicuna", "blip2-t5", "instructblip-t5"]
)
def test_quantized_bundles_stay_near(
    case: str,
    precision: str,
    loaded: Callable[[str], VLM],
    blips: Callable[[str], Path],
    pictures: dict[str, Path],
    tmp_path: Path,
) -> None:
    bundle = tmp_path / "bundle"
    report = export(blips(case), bundle, precision=PrecisionPlan.uniform(precision))
    assert set(report.precisions.values()) <= {"int8", precision}
    assert report.errors["vision"]["cosine"] > 0.999
    assert report.errors["connector"]["cosine"] > 0.999
    assert report.errors["llm"]["kl"] < (0.02 if precision == "int8" else 0.2)
    if precision == "int8":
        assert all(entry["layers"] for entry in report.errors.values())
    asked = QUESTION, [pictures["wide.png"]]
    with VLM.load(bundle, threads=1) as vlm:
        found = prefill(vlm, vlm.build_prompt(*asked))
    exact = loaded(case)
    expected = prefill(exact, exact.build_prompt(*asked))
    assert cosine(found, expected) > (0.97 if precision == "int8" else 0.85)


# -- refusals -----------------------------------------------------------------------------------

REFUSED: dict[str, tuple[str, Callable[[Path], None], type[VlmEdgeError], str]] = {
    "queries": (
        "blip2-opt", lambda f: edit_json(f / "processor_config.json", "num_query_tokens", 9),
        UnsupportedConfig, "the Q-Former has 7 queries"),
    "tile size": (
        "blip2-opt",
        lambda f: edit_json(
            f / "processor_config.json", "image_processor.size", {"height": 40, "width": 40}),
        UnsupportedConfig, "40x40"),
    "image token": (
        "blip2-opt", lambda f: edit_json(f / "config.json", "image_token_index", 5),
        UnsupportedConfig, "image_token"),
    "language model": (
        "blip2-opt", lambda f: edit_json(f / "config.json", "text_config.model_type", "bloom"),
        UnsupportedConfig, "llama"),
    "kind of language model": (
        "blip2-t5",
        lambda f: edit_json(f / "config.json", "use_decoder_only_language_model", True),
        UnsupportedConfig, "use_decoder_only_language_model"),
    "start token": (
        "blip2-t5", lambda f: edit_json(f / "config.json", "text_config.decoder_start_token_id", ...),
        UnsupportedConfig, "decoder_start_token_id"),
    "tokenizer of the instruction": (
        "instructblip-t5", lambda f: shutil.rmtree(f / "qformer_tokenizer"),
        CheckpointMissing, "qformer_tokenizer"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_a_checkpoint_is_refused_by_name(
    what: str, blips: Callable[[str], Path], tmp_path: Path
) -> None:
    case, damage, error, named = REFUSED[what]
    folder = shutil.copytree(blips(case), tmp_path / "checkpoint")
    damage(folder)
    with pytest.raises(error, match=named):
        read_model(folder)
