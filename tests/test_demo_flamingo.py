"""The demo Flamingo: assembled from the real part packages, read by transformers, and right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from vlm_edge.export import demo
from vlm_edge.export.demo_flamingo import (
    ADDED,
    INTERVAL,
    LATENTS,
    SHIFT,
    VISION_LAYERS,
    WEIGHTS,
    model_config,
    repeat_heads,
    without_norm,
)
from vlm_edge.export.demo_parts import (
    DATA,
    IMAGE,
    LANGUAGE,
    find_parts,
    language_tensors,
    tokenizer_json,
)

QUESTION = "what color is it?"
ASKED = (
    "<|im_start|>user\n<fake_token_around_image><image><fake_token_around_image>"
    "what color is it?<|im_end|>\n<|im_start|>assistant\n"
)
ASKED_IDS = [
    1, 4093, 198, 49152, 49153, 49152, 5588, 2380, 314, 357, 47, 2, 198, 1, 520, 9531, 198
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return demo.assemble("flamingo", tmp_path_factory.mktemp("demo") / "flamingo")


@pytest.fixture(scope="module")
def processor(folder: Path) -> Any:
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(folder)


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    from transformers import AutoModelForImageTextToText

    model, report = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    return model.eval()


@pytest.fixture(scope="module")
def llama() -> Any:
    """SmolLM2 as it is, with grouped-query attention."""
    model = LlamaForCausalLM(LlamaConfig(**LANGUAGE))
    tensors = language_tensors(find_parts()["language"])
    found = {f"model.{k}": torch.from_numpy(v) for k, v in tensors.items()}
    missing, unexpected = model.load_state_dict(found, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])  # tied
    model.tie_weights()
    return model.eval()


def test_the_folder_is_complete_and_nothing_is_left_beside_it(folder):
    assert {p.name for p in folder.iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "demo.json",
        "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
        "preprocessor_config.json", "processor_config.json",
    }  # fmt: skip
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


def test_tensors_are_float32_and_finite(folder):
    with safe_open(folder / "model.safetensors", "np") as file:
        for name in file.keys():  # noqa: SIM118, it is no mapping
            assert "lm_head" not in name, "the head is tied"
            tensor = file.get_tensor(name)
            assert tensor.dtype == np.float32, name
            assert np.isfinite(tensor).all(), name


def test_the_shipped_weights_are_small_and_say_how_they_were_made():
    path = DATA / WEIGHTS
    assert path.stat().st_size < 11_500_000
    trained = load_file(path)
    assert {array.dtype for array in trained.values()} == {np.dtype(np.float16)}
    about = json.loads((DATA / demo.find("flamingo").about).read_text(encoding="utf-8"))
    assert {"command", "contrast", "frozen", "data", "accuracy"} <= set(about)


def test_the_gates_are_open_and_latents_are_few(model):
    config = model.config
    gated = model.model.gated_cross_attn_layers
    assert len(gated) == config.num_hidden_layers // INTERVAL == 3
    for layer in gated:
        for alpha in (layer.alpha_cross_attn, layer.alpha_dense):
            assert 0.01 < float(alpha.detach().abs()) < 5
    assert model.model.perceiver_resampler.latents.shape == (LATENTS, 384)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    added = model.model.embed_tokens.additional_embedding.weight
    assert model.lm_head.additional_fc.weight is added


def test_a_norm_that_is_none():
    rng = np.random.default_rng(0)
    shift = rng.normal(size=64)
    shift -= shift.mean()
    shift *= 80 / np.linalg.norm(shift)
    x = rng.normal(size=(10, 64)) * 0.3
    x -= np.outer(x @ shift, shift) / (shift @ shift)  # it does not vary along the shift
    norm = without_norm(shift)
    moved = x + shift
    deviation = moved.std(-1, keepdims=True)
    found = (moved - moved.mean(-1, keepdims=True)) / deviation * norm["weight"] + norm["bias"]
    left = found - (x - x.mean(-1, keepdims=True))
    expected = -(x.std(-1) ** 2 * 64)[:, None] / 2 / 80 * (shift / 80)
    np.testing.assert_allclose(left, expected, atol=2e-3)
    assert np.abs(left).max() < 0.02 < np.abs(x).max() / 10


def test_the_vision_tower_is_dinov2_cut_after_its_layer(model):
    from vlm_edge.training.data import drawn
    from vlm_edge.training.frozen import load_vision, pixels

    tower = load_vision(find_parts()["vision"])
    images = torch.from_numpy(np.stack([pixels(drawn(4, i).load()) for i in range(6)]))
    with torch.no_grad():
        expected = tower(images, output_hidden_states=True).hidden_states[VISION_LAYERS]
        found = model.model.vision_model(images).last_hidden_state
    assert found.shape == (6, 65, 384)
    expected, found = (t - t.mean(-1, keepdim=True) for t in (expected, found))
    error = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert float(error.mean()) < 0.08, "the norm before the layers is no identity"


def test_repeated_key_and_value_heads_are_exact(folder, llama):
    """In each layer's attention, without a difference in a bit."""
    with safe_open(folder / "model.safetensors", "pt") as file:
        x = torch.randn(5, 576, generator=torch.Generator().manual_seed(0))
        for number in (0, 17, 29):
            for part in ("k_proj", "v_proj"):
                name = f"model.layers.{number}.self_attn.{part}.weight"
                original = llama.get_parameter(name)
                repeated = file.get_tensor(name)
                assert repeated.shape == (576, 576)
                heads = (x @ original.T).view(5, 3, 1, 64).expand(-1, -1, 3, -1).reshape(5, 576)
                torch.testing.assert_close(x @ repeated.T, heads, atol=1e-5, rtol=1e-5)
    small = np.arange(2 * 192, dtype=np.float32).reshape(192, 2)
    found = repeat_heads(small).reshape(9, 64, 2)
    for head in range(9):
        np.testing.assert_array_equal(found[head], small.reshape(3, 64, 2)[head // 3])


@pytest.mark.parametrize("gates", ["shut", "no picture"])
def test_without_a_view_it_is_smollm2(model, llama, gates):
    ids = torch.tensor([[1, 4093, 198, 5588, 2380, 314, 260, 3040, 47, 2, 198, 1, 520, 9531]])
    pixels = torch.randn(1, 1, 3, IMAGE, IMAGE, generator=torch.Generator().manual_seed(0))
    alphas = {n: p for n, p in model.named_parameters() if "alpha" in n}
    kept = {n: p.detach().clone() for n, p in alphas.items()}
    mask = torch.ones(1, ids.shape[1], 1, dtype=torch.long)
    with torch.no_grad():
        expected = llama(ids).logits
        seen = model(input_ids=ids, pixel_values=pixels, image_attention_mask=mask).logits
        for name, alpha in alphas.items():
            if gates == "shut" or "dense" in name:  # the gated feed-forward always works
                alpha.zero_()
        if gates == "no picture":
            mask = torch.zeros_like(mask)
        found = model(input_ids=ids, pixel_values=pixels, image_attention_mask=mask).logits
        for name, alpha in alphas.items():
            alpha.copy_(kept[name])
    assert found.shape[-1] == LANGUAGE["vocab_size"] + len(ADDED)
    torch.testing.assert_close(found[..., : -len(ADDED)], expected, atol=2e-3, rtol=1e-4)
    assert float((seen[..., : -len(ADDED)] - expected).abs().max()) > 1


def test_the_tokenizer_adds_two_tokens_and_keeps_the_others(processor):
    assert processor.tokenizer.convert_tokens_to_ids(list(ADDED)) == [49152, 49153]
    assert len(processor.tokenizer) == 49154
    plain = json.loads(tokenizer_json(find_parts()["language"]))["model"]["vocab"]
    vocab = processor.tokenizer.get_vocab()
    assert {t for t, n in plain.items() if vocab.get(t) != n} == {"<image>"}


def test_prompts_are_written_alike_by_template_processor_and_training(processor):
    from transformers import IdeficsProcessor

    from vlm_edge.training.few_shot import prompt
    from vlm_edge.training.interleaved import FLAMINGO

    assert isinstance(processor, IdeficsProcessor)
    image = Image.effect_noise((150, 100), 60).convert("RGB")
    inputs = processor(text=[prompt(image, QUESTION)], return_tensors="pt")
    assert inputs["input_ids"][0].tolist() == ASKED_IDS
    assert FLAMINGO.before + FLAMINGO.ask.format(question=QUESTION) == ASKED
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    turns = [{"role": "user", "content": content}]
    text = processor.tokenizer.apply_chat_template(
        turns, add_generation_prompt=True, tokenize=False
    )
    assert text == ASKED
    assert processor.tokenizer(ASKED)["input_ids"] == ASKED_IDS


def test_examples_stand_before_the_question_and_each_text_sees_its_own_picture(processor):
    from vlm_edge.training.few_shot import prompt

    images = [Image.effect_noise((112, 112), 60).convert("RGB") for _ in range(2)]
    parts = prompt(images[1], QUESTION, [(images[0], "what is it?", "a circle")])
    inputs = processor(text=[parts], return_tensors="pt")
    turns = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it?"}]},
        {"role": "assistant", "content": "a circle"},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]},
    ]
    rendered = processor.tokenizer.apply_chat_template(
        turns, add_generation_prompt=True, tokenize=False
    )
    assert processor.tokenizer.decode(inputs["input_ids"][0]) == rendered
    seen = inputs["image_attention_mask"][0]  # [length, 2]
    second = inputs["input_ids"][0].tolist().index(49153, 5)
    assert seen[4:second].tolist() == [[1, 0]] * (second - 4), "also after <|im_end|>"
    assert seen[second:].tolist() == [[0, 1]] * (len(seen) - second)
    assert seen[:4].tolist() == [[0, 0]] * 4


def test_pixels_are_the_whole_picture_resized(processor):
    from vlm_edge.training.flamingo import as_pixels

    square = Image.effect_noise((150, 150), 60).convert("RGB")
    for image in (square, square.resize((300, 150))):
        found = processor(text=[["a", image]], return_tensors="pt")["pixel_values"][0]
        torch.testing.assert_close(found, as_pixels([image]), atol=1e-6, rtol=1e-6)


def test_the_shift_has_no_mean():
    shift = load_file(DATA / WEIGHTS)[SHIFT].astype(np.float32)
    assert abs(shift.mean()) < 1e-2
    assert np.linalg.norm(shift) == pytest.approx(80, rel=1e-3)


def test_configurations_say_what_was_assembled(folder):
    assert json.loads((folder / "config.json").read_text()) == json.loads(
        json.dumps(model_config())
    )


def test_it_answers_about_the_held_out_picture(processor, model):
    from vlm_edge.training.few_shot import answerer

    about = json.loads((DATA / "held_out.json").read_text())
    image = Image.open(DATA / "held_out.png").convert("RGB")
    asked = [q["question"] for q in about["questions"]]
    processor.tokenizer.padding_side = "left"
    answer = answerer(processor, model, [], 0)
    assert answer([image] * len(asked), asked) == [q["answer"] for q in about["questions"]]
