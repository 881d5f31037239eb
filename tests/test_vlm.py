"""VLM: answers that repeat, settings that act, prompts in every form, and the errors of a call."""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from answers import PLACES, QUESTION, counted, greedy
from PIL import Image

from vlm_edge import VLM
from vlm_edge.errors import (
    SettingError,
)
from vlm_edge.runtime import encode
from vlm_edge.runtime import vlm as vlm_module

# -- tokens -----------------------------------------------------------------------------------


def test_greedy_is_the_argmax_of_a_fresh_prefill_each_time(model: VLM, picture: Path) -> None:
    """Neither the cache nor the logits array that decode uses again may show."""
    built = model.build_prompt(QUESTION, [picture])
    embeds = model.embed(built)
    expected: list[int] = []
    for _ in range(20):
        model.decoder.length = 0
        expected.append(int(np.argmax(model.decoder.prefill(embeds))))
        embeds = np.concatenate([embeds, model.embeddings.rows(np.array(expected[-1:]))[None]], 1)
    assert len(set(expected)) > 4
    assert greedy(model, QUESTION, [picture], max_new_tokens=20) == expected
    assert greedy(model, QUESTION, [picture], max_new_tokens=20) == expected  # nothing is left over


@pytest.mark.parametrize(
    "key", [("clip-llama", "int8"), ("clip-mistral-window",), ("siglip-qwen2", "int4")]
)
def test_other_bundles_repeat_too(key: Any, vlm: Callable[..., VLM], picture: Path) -> None:
    first = greedy(vlm(*key), QUESTION, [picture])
    greedy(vlm(*key), "something else, and longer than the other one is")
    assert greedy(vlm(*key), QUESTION, [picture]) == first


HOT = {"temperature": 2.0, "max_new_tokens": 16, "ignore_eos": True}


def test_a_seed_repeats_and_another_differs(shared: VLM) -> None:
    answers = {seed: shared.generate(QUESTION, seed=seed, **HOT).token_ids for seed in range(4)}
    assert len({tuple(ids) for ids in answers.values()}) == 4
    for seed, ids in answers.items():
        assert shared.generate(QUESTION, seed=seed, **HOT).token_ids == ids
    unseeded = [tuple(shared.generate(QUESTION, **HOT).token_ids) for _ in range(3)]
    assert len(set(unseeded)) == 3


def test_sampling_settings_act(shared: VLM) -> None:
    free = shared.generate(QUESTION, seed=1, **HOT).token_ids
    best = greedy(shared, QUESTION, max_new_tokens=16)
    assert free != best
    assert shared.generate(QUESTION, seed=1, top_k=1, **HOT).token_ids == best
    assert shared.generate(QUESTION, seed=1, top_p=1e-6, **HOT).token_ids == best
    assert shared.generate(QUESTION, seed=1, top_k=3, **HOT).token_ids not in (free, best)
    assert shared.generate(QUESTION, seed=1, top_p=0.7, **HOT).token_ids not in (free, best)
    assert shared.generate(QUESTION, seed=1, repetition_penalty=3.0, **HOT).token_ids != free
    punished = greedy(shared, QUESTION, repetition_penalty=1e6, max_new_tokens=16)
    assert len(set(punished)) == 16
    prompt = set(shared.build_prompt(QUESTION).token_ids)
    assert not prompt & set(punished)  # the prompt counts as seen


def test_the_sampler_sees_every_token_so_far(
    shared: VLM, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompt and answer both count as said before."""
    seen: list[list[int]] = []
    pick = vlm_module.Sampler.pick

    def note(self: Any, logits: np.ndarray, ids: list[int]) -> int:
        seen.append(list(ids))
        return pick(self, logits, ids)

    monkeypatch.setattr(vlm_module.Sampler, "pick", note)
    new = greedy(shared, QUESTION, [picture], max_new_tokens=5)
    prompt = shared.build_prompt(QUESTION, [picture]).token_ids
    assert seen == [[*prompt, *new[:count]] for count in range(5)]


def test_the_checkpoints_own_penalty_is_the_default(vlm: Callable[..., VLM]) -> None:
    model = vlm("siglip-qwen2-v4")
    assert model.manifest.generation.repetition_penalty == 1.3
    own = greedy(model, QUESTION, max_new_tokens=24)
    assert own == greedy(model, QUESTION, repetition_penalty=1.3, max_new_tokens=24)
    assert own != greedy(model, QUESTION, repetition_penalty=1.0, max_new_tokens=24)


# -- where an answer ends ---------------------------------------------------------------------


def test_ignore_eos_gives_exactly_as_many_tokens(model: VLM) -> None:
    plain = model.generate(QUESTION, max_new_tokens=30, ignore_eos=True)
    fresh = [t for i, t in enumerate(plain.token_ids) if t not in plain.token_ids[:i]]
    ends = (fresh[3], fresh[1])  # the one that comes first is not the first of the list
    generation = dataclasses.replace(model.manifest.generation, eos_token_ids=ends)
    model.manifest = dataclasses.replace(model.manifest, generation=generation)
    for count in (1, 2, 30):
        result = model.generate(QUESTION, max_new_tokens=count, ignore_eos=True)
        assert result.token_ids == plain.token_ids[:count]
        assert result.finish_reason == "length"
    ended = model.generate(QUESTION, max_new_tokens=30)
    first = min(plain.token_ids.index(end) for end in ends)
    assert ended.token_ids == plain.token_ids[: first + 1]  # the end token is among them
    assert ended.finish_reason == "stop"
    assert model.generate(QUESTION, max_new_tokens=first + 1).finish_reason == "stop"
    assert model.generate(QUESTION, max_new_tokens=first).finish_reason == "length"


def test_special_tokens_are_no_text(model: VLM) -> None:
    """The model is made to say <s> and </s> in the middle of its answer."""
    wanted = [5 + 68, 1, 5 + 69, 2]
    steps = iter(wanted)

    def logits(*_: Any) -> np.ndarray:
        made = np.zeros(model.manifest.decoder.vocab_size, np.float32)
        made[next(steps)] = 1
        return made

    model.decoder.prefill = model.decoder.decode = logits
    result = model.generate(QUESTION)
    assert result.token_ids == wanted
    assert result.finish_reason == "stop"
    assert "<" not in result.text
    assert len(result.text) == 2


@pytest.mark.parametrize("kind", [str, lambda stop: [stop], lambda stop: ("never said", stop)])
def test_stop_strings(kind: Callable[[str], Any], shared: VLM) -> None:
    whole = shared.generate(QUESTION, max_new_tokens=40, ignore_eos=True)
    stop = whole.text[10:13]
    place = whole.text.index(stop)
    stream = shared.stream(QUESTION, max_new_tokens=40, ignore_eos=True, stop=kind(stop))
    assert "".join(stream) == whole.text[:place]
    assert stream.result.text == whole.text[:place]
    assert stream.result.finish_reason == "stop_string"
    assert 0 < len(stream.result.token_ids) < 40
    assert stream.result.token_ids == whole.token_ids[: len(stream.result.token_ids)]
    assert stop in shared.tokenizer.decode(stream.result.token_ids)


def test_a_stop_string_that_does_not_come_takes_nothing_away(shared: VLM) -> None:
    whole = shared.generate(QUESTION, max_new_tokens=20, ignore_eos=True)
    held = whole.text[-2:] + "#"  # the end of the text might be its beginning
    found = shared.generate(QUESTION, max_new_tokens=20, ignore_eos=True, stop=held)
    assert found.text == whole.text
    assert found.finish_reason == "length"


@pytest.mark.parametrize("case", ["clip-llama", "siglip-qwen2"])
def test_pieces_together_are_the_text(case: str, vlm: Callable[..., VLM], picture: Path) -> None:
    stream = vlm(case).stream(QUESTION, [picture], max_new_tokens=60, ignore_eos=True)
    pieces = list(stream)
    assert len(pieces) > 5
    assert all(pieces)
    assert "".join(pieces) == stream.result.text
    assert stream.result.text == vlm(case).tokenizer.decode(stream.result.token_ids)
    assert list(stream) == []


def test_a_result_without_iterating(shared: VLM) -> None:
    stream = shared.stream(QUESTION, max_new_tokens=6)
    first = next(iter(stream))
    assert stream.result.text.startswith(first)
    assert stream.result is stream.result


# -- prompts and images -----------------------------------------------------------------------


def test_a_picture_in_every_form(shared: VLM, picture: Path) -> None:
    data = picture.read_bytes()
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    wanted = greedy(shared, QUESTION, [picture])
    assert wanted != greedy(shared, QUESTION)
    for images in (picture, str(picture), data, Image.open(picture), [data], (str(picture),), url):
        shared.clear_image_cache()
        assert greedy(shared, QUESTION, images) == wanted
    text = {"type": "text", "text": QUESTION}
    for prompt in (
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}, text]}],
        [{"role": "user", "content": [{"type": "image", "image": Image.open(picture)}, text]}],
        [{"role": "user", "content": [{"type": "image", "path": str(picture)}, text]}],
        [picture, QUESTION],
    ):
        assert greedy(shared, prompt) == wanted
    waiting = [{"role": "user", "content": [{"type": "image"}, text]}]
    assert greedy(shared, waiting, [picture]) == wanted


def test_images_without_a_place_come_first(shared: VLM, picture: Path) -> None:
    """Messages whose content is a plain text, as OpenAI's often is, with `images` beside them."""
    expected = shared.build_prompt(QUESTION, [picture]).token_ids
    messages = [{"role": "user", "content": QUESTION}]
    assert shared.build_prompt(messages, [picture]).token_ids == expected
    parts = [{"role": "user", "content": [{"type": "text", "text": QUESTION}]}]
    assert shared.build_prompt(parts, [picture]).token_ids == expected
    assert messages == [{"role": "user", "content": QUESTION}]  # the caller's own is left alone


def test_without_the_template(shared: VLM, picture: Path, pictures: dict[str, Path]) -> None:
    other = pictures["tall.png"]
    verbatim = "first <image> then <image> and?"
    wanted = greedy(shared, verbatim, [picture, other], template=False)
    turns = ["first ", picture, " then ", other.read_bytes(), " and?"]
    assert greedy(shared, turns, template=False) == wanted
    assert greedy(shared, verbatim, [other, picture], template=False) != wanted
    assert greedy(shared, verbatim, [picture, picture], template=False) != wanted
    assert greedy(shared, turns) != wanted


def test_counts_and_times(model: VLM, picture: Path, pictures: dict[str, Path]) -> None:
    images = [picture, pictures["tall.png"]]
    for count in (5, 1):
        result = model.generate(QUESTION, images, max_new_tokens=count, ignore_eos=True)
        timings, built = result.timings, model.build_prompt(QUESTION, images)
        assert result.prompt_tokens == timings.prompt_tokens == len(built.token_ids)
        assert timings.prefilled_tokens == timings.prompt_tokens  # generate starts anew
        assert result.visual_tokens == 2 * PLACES
        assert (timings.new_tokens, timings.images) == (count, 2)
        assert timings.prefill_ms > 0
        parts = timings.preprocess_ms + timings.vision_ms + timings.connector_ms
        assert timings.ttft_ms >= parts + timings.prefill_ms - 0.01
        if count == 1:
            assert (timings.decode_ms, timings.decode_tokens_per_s) == (0, 0)
            assert (timings.vision_ms, timings.connector_ms) == (0, 0)  # encoded before
        else:
            assert timings.decode_ms > 0
            rate = 1000 * 4 / timings.decode_ms
            assert timings.decode_tokens_per_s == pytest.approx(rate)
            assert min(timings.vision_ms, timings.connector_ms, timings.preprocess_ms) > 0


def test_two_questions_encode_an_image_once(model: VLM, picture: Path) -> None:
    vision, connector = counted(model, "vision"), counted(model, "connector")
    first = greedy(model, QUESTION, [picture])
    greedy(model, "another question", [picture.read_bytes()])
    greedy(model, "both", [picture, picture])
    assert (vision, connector) == ([1], [1])
    model.clear_image_cache()
    assert greedy(model, QUESTION, [picture]) == first
    assert (vision, connector) == ([1, 1], [1, 1])


def test_the_image_cache_is_bounded_by_bytes(
    model: VLM, pictures: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two, three = (pictures[name] for name in ("wide.png", "tall.png", "small.png"))
    size = PLACES * model.manifest.decoder.width * 4
    vision = counted(model, "vision")

    def runs(*images: Path) -> int:
        before = len(vision)
        for image in images:
            model.embed(model.build_prompt(QUESTION, [image]))
        return len(vision) - before

    monkeypatch.setattr(encode, "CACHE_BYTES", 2 * size)
    assert runs(one, two, one, two) == 2
    assert runs(one, three) == 1  # the one used longest ago goes: two
    assert runs(one, three) == 0
    assert runs(two) == 1
    monkeypatch.setattr(encode, "CACHE_BYTES", 1)
    assert runs(one, one) == 1  # the latest stays whatever its size
    assert runs(two, one) == 2


def test_what_is_encoded_stays_as_it_was(model: VLM, picture: Path) -> None:
    first = model.embed(model.build_prompt(QUESTION, [picture]))
    copy = first.copy()
    first[:] = 0
    np.testing.assert_array_equal(model.embed(model.build_prompt(QUESTION, [picture])), copy)


def test_count_tokens(shared: VLM, picture: Path) -> None:
    built = shared.build_prompt(QUESTION, [picture])
    assert shared.count_tokens(width=61, height=37) == built.visual_tokens == PLACES
    for size in ((0, 5), (5, -1)):
        with pytest.raises(SettingError, match="has no tokens"):
            shared.count_tokens(*size)
