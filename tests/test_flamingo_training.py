"""The demo Flamingo's recipe: packed rows of text and pictures, its start, steps, the whole script on tiny parts."""

from __future__ import annotations

import json
import random
from argparse import Namespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import IdeficsConfig, IdeficsForVisionText2Text, LlamaConfig, LlamaModel

from vlm_edge.export import demo_flamingo
from vlm_edge.export.demo_parts import find_parts
from vlm_edge.training import contrast as stage_one
from vlm_edge.training import flamingo as script
from vlm_edge.training import flamingo_model, recipe
from vlm_edge.training.data import drawn, easy_vqa
from vlm_edge.training.flamingo import hits, train, validate
from vlm_edge.training.flamingo_model import Flamingo, load_tower, shift_of
from vlm_edge.training.frozen import Frozen, load_vision
from vlm_edge.training.interleaved import FLAMINGO, Row, pack_rows, seen_picture
from vlm_edge.training.packing import ANSWER, IGNORE
from vlm_edge.training.recipe import Album, Log

WIDTH, FEATURES, TOKENS, HEADS, VOCAB = 64, 24, 7, 4, 256


def encode(text: str) -> list[int]:
    """One token a byte, but for the two tokens that IDEFICS adds."""
    around, image = demo_flamingo.ADDED
    ids: list[int] = []
    while text:
        for token, number in ((around, VOCAB), (image, VOCAB + 1)):
            if text.startswith(token):
                ids.append(number)
                text = text[len(token) :]
                break
        else:
            ids += text[0].encode()
            text = text[1:]
    return ids


@pytest.fixture
def config() -> IdeficsConfig:
    config = IdeficsConfig(
        vocab_size=VOCAB, additional_vocab_size=2, hidden_size=WIDTH, intermediate_size=40,
        num_hidden_layers=4, num_attention_heads=HEADS, cross_layer_interval=2, rms_norm_eps=1e-5,
        qk_layer_norms=True, use_resampler=True, tie_word_embeddings=True, hidden_act="silu",
        rope_parameters={"rope_theta": 10000.0, "rope_type": "default"},
        vision_config={
            "embed_dim": FEATURES, "num_hidden_layers": 1, "num_attention_heads": 2,
            "image_size": 28, "patch_size": 14, "intermediate_size": 32,
        },
        perceiver_config={
            "use_resampler": True, "resampler_n_latents": 3, "resampler_depth": 1,
            "resampler_n_heads": 2, "resampler_head_dim": 8, "qk_layer_norms_perceiver": True,
        },
    )  # fmt: skip
    config._attn_implementation = "eager"
    config.vision_config._attn_implementation = "eager"
    return config


@pytest.fixture
def frozen() -> Frozen:
    torch.manual_seed(0)
    llama = LlamaConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=40, num_hidden_layers=4,
        num_attention_heads=HEADS, num_key_value_heads=HEADS, initializer_range=0.3,
        rms_norm_eps=1e-5, max_position_embeddings=2048,
    )  # fmt: skip
    language = LlamaModel(llama).eval().requires_grad_(False)
    return Frozen(torch.nn.Identity(), language, language.embed_tokens.weight, encode)


@pytest.fixture
def model(config: IdeficsConfig) -> Flamingo:
    torch.manual_seed(1)
    model = Flamingo(config, torch.zeros(FEATURES))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "alpha" in name or "down_proj" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)  # a wrong detail shows
    return model


@pytest.fixture
def album() -> Album:
    """Twelve drawn pictures, each with features of its own."""
    pictures = [drawn(5, i) for i in range(12)]
    features = torch.randn(12, TOKENS, FEATURES, generator=torch.Generator().manual_seed(1)).half()
    return Album((pictures, features), (pictures, features), (pictures, features))


def rows() -> list[Row]:
    """A row without an example and one with two."""
    features = list(torch.randn(4, TOKENS, FEATURES, generator=torch.Generator().manual_seed(2)))
    return [
        Row(features[:1], [], [("what color?", "red"), ("what shape is it?", "circle")]),
        Row(
            features[1:],
            [("what is this?", "a blue square"), ("is it red?", "no")],
            [("what is it?", "one"), ("is it a circle?", "no")],
        ),
    ]


def reference(config: IdeficsConfig, frozen: Frozen, model: Flamingo) -> IdeficsForVisionText2Text:
    """A whole checkpoint of the same weights, named and multiplied out as the demo's are."""
    whole = IdeficsForVisionText2Text(config).eval()
    trained = {n: t.numpy() for n, t in model.state_dict().items() if n != demo_flamingo.SHIFT}
    arrays = demo_flamingo.multiplied(trained)
    found = {f"model.{n}": torch.from_numpy(a) for n, a in arrays.items()}
    found |= {f"model.{n}": t for n, t in frozen.language.state_dict().items()}
    missing, unexpected = whole.load_state_dict(found, strict=False)
    assert not unexpected
    assert all("vision_model" in name or "lm_head" in name for name in missing)
    whole.tie_weights()
    return whole


def test_packed_rows_give_the_logits_of_the_whole_model_asked_alone(config, frozen, model):
    whole = reference(config, frozen, model)
    with torch.no_grad():
        packed = pack_rows(rows(), encode)
        logits, labels = model.answer_logits(frozen, packed, [row.features for row in rows()])
        expected, truths = [], []
        for row in rows():
            for question, answer in row.pairs:
                answered = encode(ANSWER.format(answer=answer))
                ids = encode(row.before() + FLAMINGO.ask.format(question=question)) + answered
                seen = seen_picture(torch.tensor([ids]), VOCAB + 1)
                each = torch.nn.functional.one_hot(seen + 1, len(row.features) + 1)[..., 1:]
                found = whole(
                    input_ids=torch.tensor([ids]),
                    image_encoder_embeddings=torch.stack(list(row.features))[None],
                    image_attention_mask=each,
                ).logits[0]
                expected.append(found[-len(answered) - 1 : -1])
                truths += answered
    assert labels.tolist() == truths
    torch.testing.assert_close(logits, torch.cat(expected), atol=1e-4, rtol=1e-4)


def test_a_place_sees_the_last_picture_before_it_and_its_own_question():
    packed = pack_rows(rows(), encode)
    seen = seen_picture(packed.ids, VOCAB + 1)
    for row, pictures in enumerate((1, 3)):
        first = packed.ids[row].tolist().index(VOCAB + 1)
        assert seen[row, :first].unique().tolist() == [-1]
        asked = packed.segments[row] > 0
        assert seen[row][asked].unique().tolist() == [pictures - 1]
    visible = packed.mask(torch.float32)[:, 0] == 0
    last = int(torch.where(packed.segments[1] == 2)[0].max())
    assert set(packed.segments[1][visible[1, last]].tolist()) == {0, 2}
    told = packed.ids[packed.labels != IGNORE]
    assert len(told) == sum(
        len(encode(ANSWER.format(answer=a))) for r in rows() for _, a in r.pairs
    )


def test_another_pictures_features_do_not_matter_to_text_that_does_not_see_them(frozen, model):
    few = rows()[1]
    packed = pack_rows([few], encode)
    with torch.no_grad():
        logits, _ = model.answer_logits(frozen, packed, [few.features])
        swapped, _ = model.answer_logits(
            frozen, packed, [[*few.features[:2], torch.randn(TOKENS, FEATURES)]]
        )
    assert float((logits - swapped).abs().max()) > 1e-3
    for gated in model.gated_cross_attn_layers:
        torch.nn.init.zeros_(gated.alpha_cross_attn)
    with torch.no_grad():
        blind, _ = model.answer_logits(frozen, packed, [few.features])
        other, _ = model.answer_logits(frozen, packed, [torch.randn(3, TOKENS, FEATURES)])
    assert torch.equal(blind, other)


def test_the_start_sees_the_tower_and_speaks_words(frozen, model):
    scales = torch.logspace(-2, 2, FEATURES)  # channels of very different size
    features = torch.randn(50, TOKENS, FEATURES) * scales + 3 * scales
    model.fit(features.flatten(0, 1))
    normal = model.perceiver_resampler.blocks[0][0].context_layer_norm(features).detach()
    normal = normal.flatten(0, 1)
    torch.testing.assert_close(normal.mean(0), torch.zeros(FEATURES), atol=1e-4, rtol=0)
    assert float(normal.std(0).max()) < 1.01
    to_words = torch.nn.Linear(FEATURES, WIDTH, bias=False)
    model.begin(frozen, to_words, features, "what is it?")
    latents = model.perceiver_resampler(features)
    deviations = []
    for gated in model.gated_cross_attn_layers:
        values = gated.cross_attn.v_proj(latents)
        assert float(values.detach().std()) == pytest.approx(1, rel=1e-3)
        deviations.append(float(gated.cross_attn.o_proj(values).detach().std()))
    assert deviations[0] == pytest.approx(0.3, rel=0.3), "as words are"
    assert deviations[1] > deviations[0], "hidden states grow"


def test_steps_lower_the_loss_and_leave_the_frozen_parts_alone(frozen, model, album, tmp_path):
    before = {name: tensor.clone() for name, tensor in frozen.language.state_dict().items()}
    args = Namespace(steps=80, minutes=10, rows=4, rate=1e-2, every=80, out=tmp_path / "f")
    about = train(frozen, model, album, random.Random(0), args, Log(args.out))
    lines = [json.loads(line) for line in (tmp_path / "f.log").read_text().splitlines()]
    assert [line["step"] for line in lines] == [10, 30, 80]
    assert lines[-1]["loss"] < 0.6 * lines[0]["loss"]
    assert lines[-1]["kept"] is True
    assert about["steps"] == 80
    for name, tensor in frozen.language.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    kept = load_file(tmp_path / "f.safetensors")
    assert {tensor.dtype for tensor in kept.values()} == {torch.float16}
    assert set(kept) == set(model.state_dict())


def test_validation_counts_every_question(frozen, model, album, monkeypatch):
    monkeypatch.setattr(script, "hits", lambda f, m, rows: [[True] * len(r.pairs) for r in rows])
    assert validate(frozen, model, album, 2) == {"open": 1.0, "yes_no": 1.0}


def test_hits_are_exact_answers(frozen, model):
    row = rows()[1]
    found = hits(frozen, model, [row])
    packed = pack_rows([row], encode)
    with torch.no_grad():
        logits, labels = model.answer_logits(frozen, packed, [row.features])
    right = (logits.argmax(-1) == labels).tolist()
    lengths = [len(encode(ANSWER.format(answer=a))) for _, a in row.pairs]
    assert found == [[all(right[: lengths[0]]), all(right[lengths[0] :])]]


def test_the_shift_leaves_the_tower_as_it_was(monkeypatch):
    vision = load_vision(find_parts()["vision"])
    images = script.as_pixels([drawn(6, i).load() for i in range(12)])
    with torch.no_grad():
        states = vision(images, output_hidden_states=True).hidden_states
    expected = states[demo_flamingo.VISION_LAYERS]
    expected = expected - expected.mean(-1, keepdim=True)

    def error(shift: torch.Tensor) -> float:
        found = load_tower(shift)(images)
        found = found - found.mean(-1, keepdim=True)
        return float(((found - expected).norm(dim=-1) / expected.norm(dim=-1)).mean())

    shift = shift_of(vision, images)
    assert error(shift) < 0.1
    monkeypatch.setattr(flamingo_model, "SHIFT", 8.0)
    assert error(shift_of(vision, images)) > 2 * error(shift), "the longer, the nearer"


def test_the_script_trains_and_writes_what_ships(config, frozen, tmp_path, monkeypatch):
    easy = easy_vqa("train")[:30]
    monkeypatch.setattr(recipe, "easy_vqa", lambda split: {"train": easy}[split])
    monkeypatch.setattr(recipe, "VALIDATION", 10)
    monkeypatch.setattr(stage_one, "ROWS", 4)
    monkeypatch.setattr(script, "SAMPLE", 2)
    for name, value in {
        "load_frozen": lambda: frozen,
        "with_added_tokens": lambda frozen: frozen,
        "shift_of": lambda vision, pixels: torch.randn(FEATURES),
        "configuration": lambda: config,
        "load_tower": lambda shift: lambda p: torch.randn(len(p), TOKENS, FEATURES),
    }.items():
        monkeypatch.setattr(script, name, value)
    out = tmp_path / "f"
    script.main(f"--drawn 70 --contrast-steps 2 --steps 2 --rows 2 --every 2 --out {out}".split())
    made = load_file(out.with_suffix(".safetensors"))
    shipped = load_file(demo_flamingo.DATA / demo_flamingo.WEIGHTS)
    layers = {"gated_cross_attn_layers.2.": "gated_cross_attn_layers.1."}  # the tiny one has two
    assert {n for n in shipped if not n.startswith(tuple(layers))} == set(made)
    about = json.loads(out.with_suffix(".json").read_text())
    assert (about["contrast"]["steps"], about["steps"], about["seed"]) == (2, 2, 1)

    script.main(
        f"--drawn 70 --start {out}.safetensors --steps 1 --rows 2 --out {tmp_path / 'g'}".split()
    )
    assert "contrast" not in json.loads((tmp_path / "g.json").read_text())
