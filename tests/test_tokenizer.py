"""The runtime's tokenizer against transformers', and its detokenizer against decoding everything."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Core

from vlm_edge.errors import BundleDamaged
from vlm_edge.runtime.tokenizer import Detokenizer, Tokenizer

TEXTS = [
    "What colour is the roof of the house?\nThe roof is red, and the door is green.",
    "Was steht auf dem Schild? Über den Wolken – naïve façade, 12 345 €.",
    "東京の空は青い。 猫が座っている。",
    "def f(x):\n    return x  # don't, it's they'll we've",
    "emoji 😀😀 👩‍👩‍👧 flags 🇩🇪",
]
TRIED = [
    *TEXTS,
    "",
    " ",
    "  leading and trailing  ",
    "unseen: ŧŋħ ☃ 𝔘𝔫𝔦 \u0000 \ufffd\ufffd é é",
    "USER: <image>\nWhat? ASSISTANT:",
    "<image><image> x<image>y </s> <s> a </s>",
    "▁ literal ▁▁ metaspace",
    "<0x41> a byte token's name",
]
SPECIAL = ["<unk>", "<s>", "</s>"]


def byte_level(regex: bool = True) -> Core:
    """As GPT-2 (its own split) or as Qwen2 (a Split in front)."""
    core = Core(models.BPE())
    split = pre_tokenizers.Split(
        # Qwen2's pattern
        Regex(
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
            r"|\s*[\r\n]+|\s+(?!\S)|\s+"
        ),
        behavior="isolated",
    )
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex)
    core.pre_tokenizer = bytes_ if regex else pre_tokenizers.Sequence([split, bytes_])
    core.normalizer = None if regex else normalizers.NFC()
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    core.train_from_iterator(TEXTS * 3, trainer)
    core.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>"])
    core.add_tokens(["<|plain added é|>"])
    return core


def pieces(bos: bool = True) -> Core:
    """As the tokenizer.json of Llama 2: "▁", bytes for what the vocabulary lacks."""
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    core = Core(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    core.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    core.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=[*SPECIAL, *bytes_], show_progress=False, limit_alphabet=60
    )
    core.train_from_iterator(TEXTS * 3, trainer)
    data = json.loads(core.to_str())  # the byte tokens are no added tokens in Llama's file
    data["added_tokens"] = [t for t in data["added_tokens"] if t["content"] in SPECIAL]
    core = Core.from_str(json.dumps(data))
    core.add_special_tokens(["<image>"])
    if bos:
        core.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
        )
    return core


def unigram() -> Core:
    """As T5: Metaspace on both sides, an eos behind."""
    core = Core(models.Unigram())
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=["<pad>", "</s>", "<unk>", "<image>"],
        unk_token="<unk>", show_progress=False,
    )  # fmt: skip
    core.train_from_iterator(TEXTS * 3, trainer)
    core.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", core.token_to_id("</s>"))]
    )
    return core


def words() -> Core:
    """As BERT: WordPiece."""
    core = Core(models.WordPiece(unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=300, special_tokens=["[UNK]", "[CLS]", "<image>"], show_progress=False
    )
    core.train_from_iterator(TEXTS * 3, trainer)
    return core


def unfamiliar() -> Core:
    """A decoder that rewrites the finished text: it cannot be cut into pieces."""
    core = pieces()
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Replace(" .", ".")]
    )
    return core


KINDS: dict[str, Callable[[], Core]] = {
    "gpt2": byte_level,
    "qwen2": lambda: byte_level(regex=False),
    "llama": pieces,
    "t5": unigram,
    "bert": words,
    "unfamiliar": unfamiliar,
}


@pytest.fixture(scope="module")
def cores() -> dict[str, Core]:
    return {kind: make() for kind, make in KINDS.items()}


def opened(core: Core, folder: Path) -> Tokenizer:
    core.save(str(folder / "tokenizer.json"))
    return Tokenizer(folder / "tokenizer.json")


@pytest.fixture(scope="module")
def tokenizers(cores: dict[str, Core], tmp_path_factory: Any) -> dict[str, Tokenizer]:
    return {kind: opened(core, tmp_path_factory.mktemp(kind)) for kind, core in cores.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_equals_transformers(
    kind: str, cores: dict[str, Core], tokenizers: dict[str, Tokenizer]
) -> None:
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast(tokenizer_object=cores[kind])
    ours = tokenizers[kind]
    for text in TRIED:
        for special in (True, False):
            ids = theirs(text, add_special_tokens=special)["input_ids"]
            assert ours.encode(text, add_special_tokens=special) == ids
            for skip in (True, False):
                expected = theirs.decode(ids, skip_special_tokens=skip)
                assert ours.decode(ids, skip_special_tokens=skip) == expected


def test_truncation_and_padding_in_the_file_do_not_apply(tmp_path: Path) -> None:
    core = byte_level()
    core.enable_truncation(3)
    core.enable_padding(length=200, pad_token="<|endoftext|>")
    ours = opened(core, tmp_path)
    assert 3 < len(ours.encode(TEXTS[0])) < 200
    assert ours.decode(ours.encode(TEXTS[0])) == TEXTS[0]


def test_single_tokens(tokenizers: dict[str, Tokenizer]) -> None:
    ours = tokenizers["llama"]
    image = ours.token_to_id("<image>")
    assert image is not None
    assert ours.encode("<image>", add_special_tokens=False) == [image]
    assert ours.id_to_token(image) == "<image>"
    assert ours.token_to_id("no such token") is None
    assert ours.id_to_token(99999) is None
    assert ours.special_ids == {0, 1, 2, image}


@pytest.mark.parametrize("text", [None, "", "{}", "[1"])
def test_a_bad_file_is_refused(text: str | None, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(BundleDamaged, match="tokenizer"):
        Tokenizer(path)


@st.composite
def sequences(draw: st.DrawFn) -> list[int]:
    """Ids of up to 40 tokens: anywhere (past the end too), often bytes, specials or the same again."""
    any_id = st.integers(0, 560)
    byte = st.integers(3, 258)  # in "llama" the byte tokens
    high = st.integers(3 + 0x80, 258)  # never ASCII: mostly broken UTF-8
    low = st.integers(0, 5)  # specials
    return draw(st.lists(st.one_of(any_id, byte, high, low), max_size=40))


@pytest.mark.parametrize("kind", KINDS)
@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(ids=sequences(), skip=st.booleans())
def test_pieces_together_are_the_whole(
    kind: str, ids: list[int], skip: bool, tokenizers: dict[str, Tokenizer]
) -> None:
    ours = tokenizers[kind]
    stream = Detokenizer(ours, skip_special_tokens=skip)
    found = [stream.push(token) for token in ids] + [stream.flush()]
    assert "".join(found) == ours.decode(ids, skip_special_tokens=skip)
    again = [stream.push(token) for token in ids] + [stream.flush()]  # flush starts over
    assert again == found


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "unfamiliar"])
@pytest.mark.parametrize("text", TEXTS)
def test_text_comes_as_it_is_finished(
    kind: str, text: str, tokenizers: dict[str, Tokenizer]
) -> None:
    ours = tokenizers[kind]
    ids = ours.encode(text, add_special_tokens=False)
    stream = Detokenizer(ours)
    found = [stream.push(token) for token in ids]
    assert "".join([*found, stream.flush()]) == ours.decode(ids)
    if kind != "bert" and kind != "t5":  # those have unknown tokens
        assert not any("\ufffd" in piece for piece in found)
    said = ""
    for index, (token, piece) in enumerate(zip(ids, found, strict=True)):
        said += piece
        name = ours.id_to_token(token) or ""
        held = ours.decode(ids[: index + 1])[len(said) :]
        # Only unfinished characters are held back, or a run of byte tokens.
        assert held in ("", "\ufffd", "\ufffd\ufffd", "\ufffd\ufffd\ufffd") or name.startswith(
            "<0x"
        )


@pytest.mark.parametrize("kind", ["gpt2", "llama", "t5"])
def test_work_per_token_is_bounded(
    kind: str, tokenizers: dict[str, Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = tokenizers[kind]
    decoded = 0
    real = Tokenizer.decode

    def counting(self: Tokenizer, ids: Any, skip_special_tokens: bool = True) -> str:
        nonlocal decoded
        decoded += len(list(ids))
        return real(self, ids, skip_special_tokens)

    monkeypatch.setattr(Tokenizer, "decode", counting)
    stream = Detokenizer(ours)
    run = [3 + 0xF0] * 500 if kind == "llama" else []  # a long run of bytes is decoded once
    ids = [*ours.encode(" ".join(TEXTS), add_special_tokens=False), *run, 300]
    for token in ids:
        stream.push(token)
    stream.flush()
    assert decoded <= 4 * len(ids)


def test_an_added_token_of_a_byte_vocabulary_is_text(tokenizers: dict[str, Tokenizer]) -> None:
    ours = tokenizers["gpt2"]
    stream = Detokenizer(ours)
    added = ours.token_to_id("<|plain added é|>")
    assert added is not None
    (first, *_) = ours.encode("é", add_special_tokens=False)  # half a character
    ids = [added, first, added]
    found = [stream.push(token) for token in ids]
    assert found[0] == "<|plain added é|>"
    assert "".join(found) == ours.decode(ids)


def test_a_decoder_that_cannot_stream_says_so(
    tokenizers: dict[str, Tokenizer], caplog: pytest.LogCaptureFixture
) -> None:
    ours = tokenizers["unfamiliar"]
    ids = ours.encode("the roof .", add_special_tokens=False)
    stream = Detokenizer(ours)
    assert "cannot stream" in caplog.text
    assert [stream.push(token) for token in ids] == [""] * len(ids)
    assert stream.flush() == ours.decode(ids)
