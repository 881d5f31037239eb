"""VLM: what a call refuses, and what a failure leaves behind."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from answers import QUESTION, counted, greedy
from PIL import Image

from vlm_edge import VLM
from vlm_edge.errors import (
    ContextOverflow,
    DeviceUnavailable,
    EmptyPrompt,
    EngineFailure,
    ImageCountMismatch,
    ImageTooLarge,
    ImageUnreadable,
    PromptError,
    SettingError,
)

# -- what is refused --------------------------------------------------------------------------


def test_the_context_is_used_to_its_last_position(model: VLM, picture: Path) -> None:
    limit = model.manifest.decoder.max_positions
    length = len(model.build_prompt(QUESTION, [picture]).token_ids)
    result = model.generate(QUESTION, [picture], max_new_tokens=limit - length, ignore_eos=True)
    assert length + len(result.token_ids) == limit == 640
    runs = counted(model, "vision")
    with pytest.raises(
        ContextOverflow, match=rf"{length} prompt .* {limit - length + 1} new .* {limit}"
    ):
        model.stream(QUESTION, [picture], max_new_tokens=limit - length + 1)
    assert runs == []


CALLS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"max_new_tokens": 0}, SettingError, "max_new_tokens = 0"),
    ({"max_new_tokens": 1.5}, SettingError, "max_new_tokens"),
    ({"max_new_tokens": True}, SettingError, "max_new_tokens"),
    ({"max_new_tokens": "9"}, SettingError, "max_new_tokens"),
    ({"temperature": -1}, SettingError, "temperature"),
    ({"top_p": 0}, SettingError, "top_p"),
    ({"top_k": -1}, SettingError, "top_k"),
    ({"repetition_penalty": 0}, SettingError, "repetition_penalty"),
    ({"seed": -1}, SettingError, "seed"),
    ({"stop": ""}, SettingError, "stop"),
    ({"max_tokens": 5}, TypeError, "max_tokens"),
    ({"prompt": " "}, EmptyPrompt, "empty"),
    ({"prompt": "<image>"}, ImageCountMismatch, "1 image place"),
    ({"images": ["no-such.png"]}, ImageUnreadable, "no-such.png"),
]


@pytest.mark.parametrize(("call", "error", "said"), CALLS, ids=lambda value: str(value)[:40])
def test_a_bad_call_is_refused_at_once(
    call: dict[str, Any], error: Any, said: str, shared: VLM
) -> None:
    """By `stream` itself, before anybody asks for a piece."""
    with pytest.raises(error, match=said):
        shared.stream(**{"prompt": QUESTION, **call})


@pytest.mark.parametrize("count", [1, 2, 9])
def test_the_keys_of_the_cache_are_what_went_through_the_decoder(
    count: int, model: VLM, picture: Path
) -> None:
    """All positions but the last new token, which no step has read yet. A wrong key would let a later
    turn take the answer to another question from the cache."""
    result = model.generate(QUESTION, [picture], max_new_tokens=count, ignore_eos=True)
    ids = np.array([*model.build_prompt(QUESTION, [picture]).token_ids, *result.token_ids[:-1]])
    assert model.decoder.length == len(model._cached) == len(ids)
    cached = np.array(model._cached)
    visual = ids == model.manifest.prompt.image_token_id
    np.testing.assert_array_equal(cached[~visual], ids[~visual])
    assert (cached[visual] < 0).all()


def test_another_stream_in_between_is_refused(model: VLM) -> None:
    wanted = {q: greedy(model, q) for q in ("one?", "two? and more")}
    first, second = (model.stream(q, max_new_tokens=12, ignore_eos=True) for q in wanted)
    pieces = iter(first)
    next(pieces)
    next(iter(second))
    with pytest.raises(SettingError, match="another answer was started"):
        list(pieces)
    with pytest.raises(RuntimeError):
        _ = first.result
    assert second.result.token_ids == wanted["two? and more"]  # the newer one is right
    assert greedy(model, "one?") == wanted["one?"]


def test_a_stream_that_is_not_begun_disturbs_nothing(model: VLM) -> None:
    wanted = greedy(model, QUESTION)
    stream = model.stream(QUESTION, max_new_tokens=12, ignore_eos=True)
    pieces = iter(stream)
    next(pieces)
    model.stream("never asked for")
    assert stream.result.token_ids == wanted


def test_an_abandoned_stream_leaves_the_model_usable(model: VLM) -> None:
    wanted = greedy(model, QUESTION)
    pieces = iter(model.stream("something else", max_new_tokens=30))
    next(pieces)
    pieces.close()
    assert greedy(model, QUESTION) == wanted


def test_an_engine_that_fails_leaves_the_model_usable(model: VLM, picture: Path) -> None:
    wanted = greedy(model, QUESTION, [picture])
    decode = model.decoder.decode

    def fails(*_: Any) -> Any:
        raise EngineFailure("llm", "out of memory")

    model.decoder.decode = fails
    with pytest.raises(EngineFailure):
        model.generate(QUESTION, [picture])
    model.decoder.decode = decode
    assert greedy(model, QUESTION, [picture]) == wanted


def test_values_that_are_not_finite_do_not_outlive_their_answer(model: VLM) -> None:
    """A masked position counts nothing, but nothing times NaN is NaN."""
    wanted = greedy(model, "hi there")
    rows, overflowing = model.embeddings.rows, []

    def broken(ids: np.ndarray) -> np.ndarray:
        return rows(ids) * np.float32(np.nan if overflowing else 1)

    model.embeddings.rows = broken
    overflowing.append(True)
    with pytest.raises(EngineFailure, match="nan"):
        model.generate("a longer prompt than the one that comes after it")
    overflowing.clear()
    assert greedy(model, "hi there") == wanted


def test_a_special_token_without_a_row(model: VLM) -> None:
    """Tokenizers may know more tokens than the model's table has rows."""
    size = model.manifest.decoder.vocab_size
    build = model.build_prompt
    model.build_prompt = lambda *args: dataclasses.replace(build(*args), token_ids=[1, size])
    with pytest.raises(PromptError, match=f"token {size} .* table of {size}"):
        model.generate("<pad>")


def test_load(bundle: Callable[..., Path]) -> None:
    folder = bundle("clip-llama")
    for device in ("cuda", "tensorrt"):
        with pytest.raises(DeviceUnavailable, match=device):
            VLM.load(folder, device=device)
    with pytest.raises(SettingError, match="'metal'; known are cpu"):
        VLM.load(folder, device="metal")
    for threads in (0, -1):
        with pytest.raises(SettingError, match="threads"):
            VLM.load(folder, threads=threads)
    with pytest.raises(SettingError, match="plans are TensorRT's"):
        VLM.load(folder, "cpu", plans="x.plans")
    with VLM.load(str(folder), "cpu", threads=2, check=False) as model:
        assert model.load_s > 0
        assert model.device == "cpu"
        assert greedy(model, QUESTION)


def test_after_close_there_is_one_sentence(bundle: Callable[..., Path], picture: Path) -> None:
    with VLM.load(bundle("clip-llama"), threads=1) as model:
        stream = model.stream(QUESTION)
        next(iter(stream))
    model.close()  # twice is no error
    for call in (
        lambda: stream.result,
        lambda: model.generate(QUESTION),
        lambda: model.generate(QUESTION, [picture]),
    ):
        with pytest.raises(EngineFailure, match="closed"):
            call()


def test_a_strip_is_refused_by_name_before_the_first_piece(shared: VLM, tmp_path: Path) -> None:
    """Scaled until its short edge fits a tile it would have 180 million pixels."""
    strip = tmp_path / "strip.png"
    Image.new("RGB", (1, 200_000)).save(strip)
    with pytest.raises(ImageTooLarge, match=r"strip\.png has 1 x 200000 pixels, 30 x 6000000 once"):
        shared.stream("what is it?", images=[strip])
    with pytest.raises(ImageTooLarge, match="image of 1x200000 has"):
        shared.count_tokens(1, 200_000)
