"""The demo BLIP-2: assembled from the real part packages, read by transformers, and right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from vlm_edge.export import demo
from vlm_edge.export.demo_blip2 import QUERIES, TEMPLATE, VISION_LAYERS, WEIGHTS, model_config
from vlm_edge.export.demo_parts import DATA, IMAGE, IMAGE_TOKEN_ID, find_parts

ASKED = "<|im_start|>user\nwhat color is it?<|im_end|>\n<|im_start|>assistant\n"
ASKED_IDS = [1, 4093, 198, 5588, 2380, 314, 357, 47, 2, 198, 1, 520, 9531, 198]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return demo.assemble("blip2", tmp_path_factory.mktemp("demo") / "blip2")


@pytest.fixture(scope="module")
def processor(folder: Path) -> Any:
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(folder)


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    from transformers import Blip2ForConditionalGeneration

    model, report = Blip2ForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    return model.eval()


def test_the_folder_is_complete_and_nothing_is_left_beside_it(folder):
    assert {p.name for p in folder.iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "demo.json",
        "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "processor_config.json",
    }  # fmt: skip
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


def test_tensors_are_float32_and_finite(folder):
    with safe_open(folder / "model.safetensors", "np") as file:
        names = set(file.keys())
        assert not [n for n in names if "lm_head" in n], "the head is tied"
        for name in names:
            tensor = file.get_tensor(name)
            assert tensor.dtype == np.float32, name
            assert np.isfinite(tensor).all(), name


def test_the_shipped_weights_are_small_and_say_how_they_were_made():
    path = DATA / WEIGHTS
    assert path.stat().st_size < 8_000_000
    with safe_open(path, "np") as file:
        names = list(file.keys())
        assert {file.get_tensor(name).dtype for name in names} == {np.dtype(np.float16)}
        queries = file.get_tensor("query_tokens")
    settings = model_config()["qformer_config"]
    assert queries.shape == (1, QUERIES, settings["hidden_size"])
    about = json.loads((DATA / demo.find("blip2").about).read_text(encoding="utf-8"))
    assert {"command", "stage_1", "stage_2", "frozen", "data", "accuracy"} <= set(about)


def test_the_vision_tower_is_dinov2_cut_after_its_layer(model):
    from vlm_edge.training.frozen import load_vision

    tower = load_vision(find_parts()["vision"])
    pixels = torch.randn(2, 3, IMAGE, IMAGE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        states = tower(pixels, output_hidden_states=True).hidden_states[VISION_LAYERS]
        expected = model.vision_model.post_layernorm(states)
        found = model.vision_model(pixels).last_hidden_state
    assert found.shape == (2, 65, 384)
    assert float((found - expected).abs().max()) < 1e-4


def test_the_language_model_is_told_where_to_stop_and_ties_its_head(model):
    language = model.language_model
    assert language.lm_head.weight is language.get_input_embeddings().weight
    assert language.generation_config.eos_token_id == 2


def test_visual_tokens_stand_before_everything(processor):
    from transformers import Blip2Processor

    assert isinstance(processor, Blip2Processor)
    assert len(processor.tokenizer) == model_config()["text_config"]["vocab_size"]
    parts = [{"type": "text", "text": "what color is it?"}, {"type": "image"}]
    for content in (parts, "what color is it?"):
        text = processor.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        assert text == ASKED
    image = Image.effect_noise((150, 100), 60).convert("RGB")
    inputs = processor(images=image, text=text, return_tensors="pt")
    assert inputs["input_ids"][0].tolist() == [IMAGE_TOKEN_ID] * QUERIES + ASKED_IDS


def test_the_template_takes_turns_and_system_messages(processor):
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Hello"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "Hi."}]},
        {"role": "user", "content": "Bye"},
    ]
    assert processor.tokenizer.apply_chat_template(chat, tokenize=False) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n"
        "<|im_start|>assistant\nHi.<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n"
    )
    assert "<image>" not in (DATA / TEMPLATE).read_text(encoding="utf-8")


def test_training_asked_in_the_very_same_form(processor):
    from vlm_edge.training.packing import BLIP2

    assert BLIP2.before == ""
    assert BLIP2.ask.format(question="what color is it?") == ASKED
    assert processor.tokenizer(ASKED)["input_ids"] == ASKED_IDS


def test_pixels_are_the_whole_picture_resized(processor):
    from vlm_edge.training.frozen import pixels

    square = Image.effect_noise((150, 150), 60).convert("RGB")
    wide = square.resize((300, 150))
    for image in (square, wide):
        found = processor(images=image, return_tensors="np")["pixel_values"][0]
        stretched = image.resize((IMAGE, IMAGE), Image.Resampling.BICUBIC)
        np.testing.assert_array_equal(found, pixels(stretched))


def test_it_answers_about_the_held_out_picture(folder):
    from vlm_edge.training.accuracy import answerer

    about = json.loads((DATA / "held_out.json").read_text())
    image = Image.open(DATA / "held_out.png").convert("RGB")
    asked = [q["question"] for q in about["questions"]]
    assert answerer(folder)([image] * len(asked), asked) == [
        q["answer"] for q in about["questions"]
    ]
