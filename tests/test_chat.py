"""Chat: later turns re-use the cache and say what a fresh model says to the same messages."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from vlm_edge import VLM
from vlm_edge.errors import ContextOverflow, EngineFailure, ImageUnreadable, SettingError
from vlm_edge.runtime.chat import Chat

SETTINGS = {"max_new_tokens": 10, "ignore_eos": True}
TURNS = [
    ("what is this?", ["wide.png"]),
    ("and the color?", []),
    ("that one?", ["tall.png"]),
    ("ö?", []),
]


@pytest.fixture
def pair(bundle: Callable[..., Path]) -> Iterator[Callable[..., tuple[VLM, VLM]]]:
    """pair(case) -> a model to talk to, and one that answers each time anew."""
    opened: list[VLM] = []

    def load(*key: str) -> tuple[VLM, VLM]:
        opened.extend(VLM.load(bundle(*key), threads=1) for _ in range(2))
        return opened[-2], opened[-1]

    yield load
    for model in opened:
        model.close()


def ask(chat: Chat, fresh: VLM, text: str, images: Any = (), **settings: Any) -> Any:
    """One turn, checked against `fresh` over the same messages."""
    before = list(chat.messages)
    result = chat.ask(text, images, **{**SETTINGS, **settings})
    messages = chat.messages[:-1]
    assert messages[: len(before)] == before
    expected = fresh.generate(messages, **{**SETTINGS, **settings})
    assert result.token_ids == expected.token_ids
    assert result.text == expected.text
    assert result.prompt_tokens == expected.prompt_tokens
    assert chat.messages[-1] == {
        "role": "assistant",
        "content": [{"type": "text", "text": expected.text}],
    }
    return result


# siglip-qwen2: text and special tokens by bytes, a window; int8: another arithmetic
CASES = [("clip-llama",), ("clip-llama-native",), ("clip-mistral-window",), ("siglip-qwen2",)]


@pytest.mark.parametrize("key", CASES, ids=lambda key: "-".join(key))
def test_turns_reuse_the_cache_and_say_the_same(
    key: Any, pair: Callable[..., tuple[VLM, VLM]], pictures: dict[str, Path]
) -> None:
    model, fresh = pair(*key)
    chat, before = model.chat(), 0
    for turn, (text, names) in enumerate(TURNS):
        timings = ask(chat, fresh, text, [pictures[name] for name in names]).timings
        if turn == 0:
            assert timings.prefilled_tokens == timings.prompt_tokens
        else:  # at least the whole prompt before, but for the tokens that its end merges with
            assert timings.prefilled_tokens <= timings.prompt_tokens - before + 6
        assert timings.images == sum(len(names) for _, names in TURNS[: turn + 1])
        assert (timings.vision_ms > 0) == bool(names)  # only a new image is encoded
        before = timings.prompt_tokens


def test_dynamic_rope_beyond_the_trained_length(pair: Callable[..., tuple[VLM, VLM]]) -> None:
    """Its base depends on the whole call: what an earlier call wrote was rotated by another one."""
    model, fresh = pair("clip-padded-square")
    chat = model.chat()
    ask(chat, fresh, "what is this and that? " * 30)
    assert chat._vlm.decoder.length < 640
    result = ask(chat, fresh, "and the color? " * 60)
    assert result.prompt_tokens > 640


def test_a_system_message_comes_first(pair: Callable[..., tuple[VLM, VLM]]) -> None:
    model, fresh = pair("siglip-qwen2")
    chat = model.chat("the cat is there")
    ask(chat, fresh, "what?")
    assert [message["role"] for message in chat.messages] == ["system", "user", "assistant"]
    other = model.chat()
    assert other.ask("what?", **SETTINGS).prompt_tokens < chat.ask("x", **SETTINGS).prompt_tokens


def test_another_image_in_the_same_place_is_another_prefix(
    pair: Callable[..., tuple[VLM, VLM]], pictures: dict[str, Path]
) -> None:
    model, fresh = pair("clip-llama")
    first = ask(model.chat(), fresh, "what is this?", pictures["wide.png"])
    second = ask(model.chat(), fresh, "what is this?", pictures["tall.png"])
    third = ask(model.chat(), fresh, "what is this?", pictures["tall.png"])
    places = model.manifest.tiling.tile_tokens
    assert first.prompt_tokens - 10 < second.timings.prefilled_tokens + places
    assert second.timings.prefilled_tokens > places
    assert third.timings.prefilled_tokens == 1  # all but the last position, whose logits are wanted


def test_a_file_that_changes_is_another_image(
    pair: Callable[..., tuple[VLM, VLM]], pictures: dict[str, Path], tmp_path: Path
) -> None:
    model, fresh = pair("clip-llama")
    path = Path(shutil.copy(pictures["wide.png"], tmp_path / "view.png"))
    chat = model.chat()
    ask(chat, fresh, "what is this?", path)
    shutil.copy(pictures["tall.png"], path)
    assert ask(chat, fresh, "and now?").timings.vision_ms > 0


def test_two_chats_and_single_questions_in_turn(
    pair: Callable[..., tuple[VLM, VLM]], pictures: dict[str, Path]
) -> None:
    model, fresh = pair("clip-llama")
    one, two = model.chat(), model.chat("be short")
    ask(one, fresh, "what is this?", pictures["wide.png"])
    ask(two, fresh, "and what is that?", [pictures["wide.png"], pictures["small.png"]])
    ask(one, fresh, "the color?")
    assert (
        model.generate("what?", **SETTINGS).token_ids
        == fresh.generate("what?", **SETTINGS).token_ids
    )
    ask(two, fresh, "the cat?")
    ask(one, fresh, "again?", pictures["tall.png"])
    assert [len(chat.messages) for chat in (one, two)] == [6, 5]


def test_streamed_turns(pair: Callable[..., tuple[VLM, VLM]], pictures: dict[str, Path]) -> None:
    model, fresh = pair("clip-llama")
    chat = model.chat()
    stream = chat.stream("what is this?", [pictures["wide.png"]], **SETTINGS)
    pieces = list(stream)
    assert len(pieces) > 1
    assert "".join(pieces) == stream.result.text == chat.messages[-1]["content"][0]["text"]
    ask(chat, fresh, "and?")


def test_the_stop_string_and_the_end_token_are_not_remembered(
    pair: Callable[..., tuple[VLM, VLM]],
) -> None:
    model, fresh = pair("clip-llama")
    text = fresh.generate(
        [{"role": "user", "content": [{"type": "text", "text": "x"}]}], **SETTINGS
    ).text
    chat = model.chat()
    result = ask(chat, fresh, "x", stop=text[4:6])
    assert result.finish_reason == "stop_string"
    assert text[4:6] not in chat.messages[-1]["content"][0]["text"]
    ask(chat, fresh, "y")


def abandon(chat: Chat) -> None:
    pieces = iter(chat.stream("never finished", **SETTINGS))
    next(pieces)
    pieces.close()


def interrupt(chat: Chat) -> None:
    stream = chat.stream("refused", **SETTINGS)
    next(iter(stream))
    chat._vlm.generate("in between", max_new_tokens=2)
    with pytest.raises(SettingError, match="another answer"):
        list(stream)


def break_engine(chat: Chat) -> None:
    decoder = chat._vlm.decoder
    original, calls = decoder.decode, []

    def fails(embeds: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise EngineFailure("llm", "no memory")
        return original(embeds)

    decoder.decode = fails
    try:
        with pytest.raises(EngineFailure):
            chat.ask("it breaks", **SETTINGS)
    finally:
        decoder.decode = original


def break_prefill_of_another_prompt(chat: Chat) -> None:
    """It has written over the conversation's positions when it fails."""
    decoder = chat._vlm.decoder
    original = decoder.prefill

    def fails(embeds: Any) -> Any:
        original(embeds)
        raise EngineFailure("llm", "no memory")

    decoder.prefill = fails
    try:
        with pytest.raises(EngineFailure):
            chat._vlm.generate("something else, about as long as the conversation is so far")
    finally:
        decoder.prefill = original


def overflow(chat: Chat) -> None:
    with pytest.raises(ContextOverflow):
        chat.ask("long " * 500, **SETTINGS)


def bad_image(chat: Chat) -> None:
    with pytest.raises(ImageUnreadable):
        chat.ask("x", ["no-such.png"], **SETTINGS)


def bad_setting(chat: Chat) -> None:
    with pytest.raises(SettingError):
        chat.ask("x", temperature=-1)
    with pytest.raises(TypeError, match="heat"):
        chat.ask("x", heat=1)


@pytest.mark.parametrize(
    "fail",
    [
        abandon,
        interrupt,
        break_engine,
        break_prefill_of_another_prompt,
        overflow,
        bad_image,
        bad_setting,
    ],
)
def test_a_failed_turn_leaves_the_conversation_as_it_was(
    fail: Callable[[Chat], None], pair: Callable[..., tuple[VLM, VLM]], pictures: dict[str, Path]
) -> None:
    model, fresh = pair("clip-llama")
    chat = model.chat()
    ask(chat, fresh, "what is this?", [pictures["wide.png"]])
    before = list(chat.messages)
    fail(chat)
    assert chat.messages == before
    ask(chat, fresh, "and the color?")
    ask(chat, fresh, "and?", [pictures["tall.png"]])


def test_images_of_a_turn_in_every_form(
    pair: Callable[..., tuple[VLM, VLM]], pictures: dict[str, Path]
) -> None:
    model, _ = pair("clip-llama")
    path = pictures["wide.png"]
    wanted = model.chat().ask("what?", path, **SETTINGS).token_ids
    for images in (str(path), [path], (path.read_bytes(),), iter([path])):
        assert model.chat().ask("what?", images, **SETTINGS).token_ids == wanted
    nothing = model.chat().ask("what?", **SETTINGS).token_ids
    assert nothing != wanted
    for images in ([], (), None):
        assert model.chat().ask("what?", images, **SETTINGS).token_ids == nothing
