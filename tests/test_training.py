"""The training room: drawn data, packed sequences, the connector's start and one real step."""

from __future__ import annotations

import random

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from vlm_edge.training.accuracy import average_image, measure, normalised
from vlm_edge.training.asking import answer_logits, exact
from vlm_edge.training.connector import Connector
from vlm_edge.training.data import COLOURS, SHAPES, drawn, easy_vqa, questions, with_rephrasings
from vlm_edge.training.frozen import Frozen
from vlm_edge.training.packing import ANSWER, BLIP2, IGNORE, LLAVA, Layout, pack

WIDTH, FEATURES, TOKENS = 32, 24, 5
ROWS = [
    [("what color?", "red"), ("what shape is it?", "circle"), ("is it big?", "no")],
    [("what is this?", "a blue triangle")],
]


def encode(text: str) -> list[int]:
    return list(text.encode())  # one token a byte


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        initializer_range=0.3,  # large, so that places differ clearly
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


@pytest.fixture
def frozen(model: LlamaForCausalLM) -> Frozen:
    return Frozen(torch.nn.Identity(), model.model, model.lm_head.weight, encode)


def alone(
    model: LlamaForCausalLM, image: torch.Tensor, text: str, layout: Layout = LLAVA
) -> torch.Tensor:
    """Embeddings [1, length, width] of one prompt, as the checkpoint's own template writes it."""
    table = model.get_input_embeddings()
    before, after = (
        table(torch.tensor([encode(part)], dtype=torch.long)) for part in (layout.before, text)
    )
    return torch.cat([before, image[None], after], 1)


@pytest.mark.parametrize("layout", [LLAVA, BLIP2], ids=["llava", "blip2"])
def test_a_packed_row_gives_the_logits_of_its_questions_asked_alone(model, frozen, layout):
    images = torch.randn(2, TOKENS, WIDTH)
    logits, labels = answer_logits(frozen, pack(ROWS, encode, TOKENS, layout), images)
    expected, truths = [], []
    for image, pairs in zip(images, ROWS, strict=True):
        for question, answer in pairs:
            answered = encode(ANSWER.format(answer=answer))
            text = layout.ask.format(question=question) + ANSWER.format(answer=answer)
            found = model(inputs_embeds=alone(model, image, text, layout)).logits[0]
            expected.append(found[-len(answered) - 1 : -1])
            truths += answered
    assert labels.tolist() == truths
    torch.testing.assert_close(logits, torch.cat(expected), atol=1e-4, rtol=1e-4)


def test_padding_and_other_questions_are_never_seen():
    packed = pack(ROWS, encode, TOKENS)
    seen = packed.mask(torch.float32)[:, 0] == 0  # [rows, query, key]
    for row in range(2):
        segments = packed.segments[row]
        for query in torch.where(segments > 0)[0].tolist():
            keys = torch.where(seen[row, query])[0]
            assert set(segments[keys].tolist()) == {0, int(segments[query])}
            assert int(keys.max()) == query
    assert bool(seen.any(-1).all()), "a row that sees nothing gives NaN"
    assert int((packed.labels != IGNORE).sum()) == sum(
        len(encode(ANSWER.format(answer=a))) for pairs in ROWS for _, a in pairs
    )


def test_exact_agrees_with_free_greedy_decoding(model, frozen):
    image = torch.randn(1, TOKENS, FEATURES)
    connector = Connector(FEATURES, WIDTH)
    prompt = alone(model, connector(image)[0].detach(), LLAVA.ask.format(question="what?"))
    made: list[int] = []
    for _ in range(3):  # what the model says by itself, one token at a time
        made.append(int(model(inputs_embeds=prompt).logits[0, -1].argmax()))
        prompt = torch.cat([prompt, model.get_input_embeddings()(torch.tensor([[made[-1]]]))], 1)
    other = [made[0], made[1], (made[2] + 1) % 256]

    def odd(text: str) -> list[int]:  # an encoder that maps two answers to those very tokens
        return {ANSWER.format(answer="A"): made, ANSWER.format(answer="B"): other}.get(
            text, encode(text)
        )

    spoken = Frozen(frozen.vision, frozen.language, frozen.table, odd)
    assert exact(spoken, connector, image, [[("what?", "A"), ("what?", "B")]]) == [[True, False]]


def test_the_connector_starts_at_the_scale_of_words():
    torch.manual_seed(0)
    scales = torch.logspace(-2, 2, FEATURES)  # channels of very different size
    sample = torch.randn(500, FEATURES) * scales + 3 * scales
    connector = Connector(FEATURES, WIDTH)
    connector.fit(sample, embedding_norm=2.5)
    assert connector(sample).norm(dim=-1).mean().item() == pytest.approx(2.5, rel=1e-3)
    assert float(connector.linear_1(sample).detach().std(0).max()) < 3


def test_training_steps_lower_the_loss_and_leave_the_frozen_parts_alone(frozen):
    torch.manual_seed(0)
    features = torch.randn(2, TOKENS, FEATURES)
    connector = Connector(FEATURES, WIDTH)
    connector.fit(features.flatten(0, 1), float(frozen.table.norm(dim=-1).mean()))
    optimizer = torch.optim.AdamW(connector.parameters(), lr=1e-2)
    packed = pack(ROWS, encode, TOKENS)
    losses = []
    for _ in range(30):
        logits, labels = answer_logits(frozen, packed, connector(features))
        loss = torch.nn.functional.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert all(p.grad is None for p in frozen.language.parameters())


@pytest.mark.parametrize("index", range(40))
def test_drawn_pictures_repeat_and_show_what_they_say(index):
    picture, again = drawn(3, index), drawn(3, index)
    assert picture.load().tobytes() == again.load().tobytes()
    assert (picture.open, picture.yes_no) == (again.open, again.yes_no)
    inside = {colour for _, colour in picture.load().getcolors(1 << 16)}
    for question, answer in picture.open:
        if answer in COLOURS:
            assert COLOURS[answer] in inside, question
    for question, answer in picture.yes_no:
        word = next(w for w in question.rstrip("?").split() if w in COLOURS or w in SHAPES)
        if word in COLOURS:
            assert (COLOURS[word] in inside) == (answer == "yes"), question


def test_other_seeds_draw_other_pictures():
    assert drawn(1, 0).load().tobytes() != drawn(2, 0).load().tobytes()


def test_questions_are_chosen_by_the_seed_and_limited():
    picture = drawn(1, 0)
    chosen = list(questions(picture, random.Random(5), 3, 1))
    assert chosen == list(questions(picture, random.Random(5), 3, 1))
    assert len(chosen) == 4


def test_easy_vqa_splits_are_apart_and_rephrased_with_their_own_answers():
    train, test = easy_vqa("train"), easy_vqa("test")
    assert (len(train), len(test)) == (4000, 1000)
    assert {p.image for p in train}.isdisjoint(p.image for p in test)
    assert sum(len(p.open) for p in test) == 2537
    picture = next(p for p in train if len({a for _, a in p.open}) == 2)
    assert {a for _, a in picture.open} <= {a for _, a in with_rephrasings(picture).open}
    assert average_image(test[:5]).size == (64, 64)


def test_accuracy_counts_by_answer():
    image = drawn(1, 0).load()
    asked = [(image, "q1", "red"), (image, "q2 longer", "red"), (image, "q3", "circle")]
    said = {"q1": " Red.", "q2 longer": "blue", "q3": "circle"}
    report = measure(lambda images, texts: [said[t] for t in texts], asked, rows=2)
    assert (report["right"], report["of"]) == (2, 3)
    assert report["by_answer"] == {"circle": "1/1", "red": "1/2"}
    assert report["mistakes"] == {"red -> blue": 1}
    assert normalised(" A Red circle. ") == "a red circle"
