"""The demo BLIP-2's recipe: the Q-Former's start, the contrast of stage 1, and the whole script on tiny parts."""

from __future__ import annotations

import json
import random
from argparse import Namespace
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import Blip2QFormerConfig, LlamaConfig, LlamaModel

from vlm_edge.export import demo_blip2
from vlm_edge.export.demo_parts import DATA, find_parts
from vlm_edge.training import contrast as stage_one
from vlm_edge.training import qformer as script
from vlm_edge.training import recipe
from vlm_edge.training.data import drawn, easy_vqa
from vlm_edge.training.frozen import Frozen, hidden_state, load_vision
from vlm_edge.training.qformer import QFormer
from vlm_edge.training.recipe import VALIDATION, Album, Log, learning_rate

WIDTH, FEATURES, TOKENS, QUERIES = 64, 20, 7, 6


@pytest.fixture
def frozen() -> Frozen:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3,
    )  # fmt: skip
    language = LlamaModel(config).eval().requires_grad_(False)
    table = language.embed_tokens.weight
    return Frozen(torch.nn.Identity(), language, table, lambda text: list(text.encode()))


@pytest.fixture
def qformer() -> QFormer:
    torch.manual_seed(0)
    config = Blip2QFormerConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        encoder_hidden_size=FEATURES, hidden_dropout_prob=0, attention_probs_dropout_prob=0,
    )  # fmt: skip
    return QFormer(config, QUERIES, WIDTH)


@pytest.fixture
def album() -> Album:
    """Twelve drawn pictures, each with features of its own."""
    pictures = [drawn(5, i) for i in range(12)]
    features = torch.randn(12, TOKENS, FEATURES, generator=torch.Generator().manual_seed(1)).half()
    return Album((pictures, features), (pictures, features), (pictures, features))


def test_the_start_suits_both_sides(qformer):
    scales = torch.logspace(-2, 2, FEATURES)  # channels of very different size
    features = torch.randn(50, TOKENS, FEATURES) * scales + 3 * scales
    qformer.fit(features.flatten(0, 1))
    seen = qformer.vision_model["post_layernorm"](features).flatten(0, 1)
    torch.testing.assert_close(seen.mean(0), torch.zeros(FEATURES), atol=1e-4, rtol=0)
    assert float(seen.std(0).max()) < 1.01
    qformer.scale_to(2.5, features)
    tokens = qformer(features)
    assert tokens.shape == (50, QUERIES, WIDTH)
    assert tokens.norm(dim=-1).mean().item() == pytest.approx(2.5, rel=1e-3)
    apart = (tokens[:, 0] - tokens[:, 1]).norm(dim=-1).mean().item()
    assert apart > 0.1, "queries that start alike stay alike"


def test_the_contrast_teaches_the_answers_without_the_language_model(
    frozen, qformer, album, tmp_path, monkeypatch
):
    monkeypatch.setattr(stage_one, "ROWS", 12)
    frozen.language.forward = None  # would fail if it were called
    untrained = stage_one.Reader(frozen, stage_one.open_answers(album))
    before = stage_one.accuracy(untrained, qformer, *album.checked)
    norm = {k: v.clone() for k, v in qformer.vision_model.state_dict().items()}
    args = Namespace(contrast_steps=400, contrast_minutes=10, every=400)
    log = Log(tmp_path / "q")
    about = stage_one.contrast(frozen, qformer, album, random.Random(0), args, log)
    assert before < 0.3
    assert about["validation_open"] > 0.7, about
    assert about["steps"] == 400
    lines = [json.loads(line) for line in (tmp_path / "q.log").read_text().splitlines()]
    assert [line["step"] for line in lines] == [10, 30, 400]
    assert lines[-1]["loss"] < 0.5 * lines[0]["loss"]
    for name, tensor in qformer.vision_model.state_dict().items():
        assert torch.equal(tensor, norm[name]), "the tower is frozen, its norm too"


def test_the_reader_finds_the_token_that_says_the_answer(frozen):
    reader = stage_one.Reader(frozen, ["red", "circle"])
    words = torch.stack([stage_one.phrase(frozen, word) for word in ("red", "circle")])
    for answer, word in enumerate(words):
        tokens = word.expand(1, QUERIES, WIDTH)  # whatever is asked, that word is there
        assert reader(tokens, [["which?"]]).argmax().item() == answer


def test_the_album_keeps_pictures_out_and_reads_its_cache(tmp_path, monkeypatch):
    easy = easy_vqa("train")[: VALIDATION + 30]
    monkeypatch.setattr(recipe, "easy_vqa", lambda split: {"train": easy}[split])
    made: list[int] = []

    def compute(images: list) -> torch.Tensor:
        made.append(len(images))
        return torch.arange(len(images))[:, None, None].float()

    album = Album.gather(compute, 3, 40, tmp_path)
    assert sum(made) == VALIDATION + 30 + 40
    assert album.sizes() == {"easy-VQA train": 30, "drawn": 40}
    assert [p.image for p in album.checked[0]] == [p.image for p in easy[30:]]
    assert [len(features) for _, features in (album.real, album.made, album.checked)] == [
        30, 40, VALIDATION
    ]  # fmt: skip
    again = Album.gather(lambda images: pytest.fail("not cached"), 3, 40, tmp_path)
    assert torch.equal(again.checked[1], album.checked[1])
    rng = random.Random(0)
    kept_out = [p.image for p in album.checked[0]]
    assert not any(album.choose(rng)[0].image in kept_out for _ in range(300))


def test_the_learning_rate_rises_and_falls():
    rates = [learning_rate(1.0, step, step / 1000) for step in (1, 30, 60, 500, 1000, 1100)]
    assert rates[0] < rates[1] < rates[2]
    assert rates[2] > rates[3] > rates[4] == rates[5] == pytest.approx(0.02)


def test_the_script_trains_both_stages_and_writes_what_ships(frozen, tmp_path, monkeypatch):
    easy = easy_vqa("train")[:30]
    monkeypatch.setattr(recipe, "easy_vqa", lambda split: {"train": easy}[split])
    monkeypatch.setattr(recipe, "VALIDATION", 10)
    monkeypatch.setattr(script, "load_frozen", lambda: frozen)
    width = demo_blip2.QFORMER["encoder_hidden_size"]
    monkeypatch.setattr(
        script, "hidden_state", lambda _, images, layers: torch.randn(len(images), 5, width)
    )
    monkeypatch.setattr(stage_one, "ROWS", 4)
    out = tmp_path / "q"
    script.main(f"--drawn 70 --contrast-steps 3 --steps 2 --rows 2 --every 2 --out {out}".split())
    shipped, made = load_file(DATA / demo_blip2.WEIGHTS), load_file(out.with_suffix(".safetensors"))
    assert {k: v.dtype for k, v in made.items()} == {k: v.dtype for k, v in shipped.items()}
    for name, tensor in made.items():
        expected = list(shipped[name].shape)
        if name.startswith("language_projection"):
            expected[0] = WIDTH
        assert list(tensor.shape) == expected, name
    about = json.loads(out.with_suffix(".json").read_text())
    assert (about["stage_1"]["steps"], about["stage_2"]["steps"]) == (3, 2)
    stages = [
        json.loads(line).get("stage") for line in out.with_suffix(".log").read_text().splitlines()
    ]
    assert stages == [1, 1, None]

    first = out.with_suffix(".stage1.safetensors")
    script.main(f"--drawn 70 --start {first} --steps 1 --rows 2 --out {tmp_path / 'r'}".split())
    assert "stage_1" not in json.loads((tmp_path / "r.json").read_text())


def test_a_hidden_state_is_what_transformers_calls_it(frozen):
    vision = load_vision(find_parts()["vision"])
    frozen = replace(frozen, vision=vision)
    pixels = torch.randn(2, 3, 112, 112)
    expected = vision(pixels, output_hidden_states=True).hidden_states[3]
    torch.testing.assert_close(hidden_state(frozen, pixels, 3), expected, atol=1e-6, rtol=1e-5)
