"""What the exporter bundles for the prompt against what transformers loads from the same folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_tokenizer import TRIED, byte_level, pieces, unigram, words
from tokenizers import Tokenizer as Core

from vlm_edge.errors import CheckpointMissing, UnsupportedConfig
from vlm_edge.export.prompt_files import PromptFiles, read_prompt_files
from vlm_edge.runtime.tokenizer import Tokenizer

LLAMA = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
QWEN = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}


def write(folder: Path, name: str, data: Any) -> None:
    text = data if isinstance(data, str) else json.dumps(data)
    (folder / name).write_text(text, encoding="utf-8")


def change(folder: Path, name: str, **values: Any) -> None:
    write(folder, name, json.loads((folder / name).read_text(encoding="utf-8")) | values)


def fast(core: Core, **kwargs: Any) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=core, **kwargs)


def llama(**kwargs: Any) -> Any:
    from transformers import LlamaTokenizer

    model = json.loads(pieces().to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    return LlamaTokenizer(vocab=model["vocab"], merges=merges, **kwargs)


def qwen2() -> Any:
    from transformers import Qwen2Tokenizer

    model = json.loads(byte_level(False).to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    return Qwen2Tokenizer(vocab=model["vocab"], merges=merges, extra_special_tokens=["<image>"])


CLASSES: dict[str, Callable[[], Any]] = {
    "fast-llama": lambda: fast(pieces(), **LLAMA),
    "fast-llama-image": lambda: fast(
        pieces(), **LLAMA, extra_special_tokens={"image_token": "<image>"}
    ),
    "fast-qwen2": lambda: fast(byte_level(False), **QWEN),
    "fast-gpt2-cleanup": lambda: fast(byte_level(), **QWEN, clean_up_tokenization_spaces=True),
    "fast-t5": lambda: fast(unigram(), eos_token="</s>", pad_token="<pad>"),
    "fast-bert": lambda: fast(words(), unk_token="[UNK]"),
    "llama": llama,
    "llama-bos": lambda: llama(add_bos_token=True),
    "llama-bos-eos": lambda: llama(add_bos_token=True, add_eos_token=True),
    "llama-no-prefix": lambda: llama(add_prefix_space=False, add_bos_token=False),
    "qwen2": qwen2,
}


def checkpoint(folder: Path, kind: str = "fast-llama") -> Path:
    """A folder with all that is about text and a config.json that AutoTokenizer accepts."""
    CLASSES[kind]().save_pretrained(folder)
    write(folder, "config.json", {"model_type": "llava"})
    return folder


def compared(folder: Path) -> tuple[PromptFiles, Any]:
    """Read the folder on both sides and compare ids, text and named tokens."""
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(folder)
    found = read_prompt_files(folder)
    write(folder, "bundled.json", found.tokenizer_json)
    ours = Tokenizer(folder / "bundled.json")
    for text in [*TRIED, "<new> and <late>, <new>."]:
        for special in (True, False):
            ids = theirs(text, add_special_tokens=special)["input_ids"]
            assert ours.encode(text, add_special_tokens=special) == ids
            for skip in (True, False):
                expected = theirs.decode(ids, skip_special_tokens=skip)
                assert ours.decode(ids, skip_special_tokens=skip) == expected
    assert found.special_tokens == theirs.special_tokens_map
    stored = json.loads(found.tokenizer_json)
    assert stored["truncation"] is None
    assert stored["padding"] is None
    return found, theirs


@pytest.mark.parametrize("kind", CLASSES)
def test_saved_tokenizers(kind: str, tmp_path: Path) -> None:
    compared(checkpoint(tmp_path, kind))


@pytest.mark.parametrize("kind", ["fast-llama", "llama", "llama-bos", "fast-qwen2"])
@pytest.mark.parametrize("bos", [True, False])
def test_tokenizer_config_does_not_decide_about_bos(kind: str, bos: bool, tmp_path: Path) -> None:
    """transformers 5 drops add_bos_token where there is a tokenizer.json, and so do we."""
    checkpoint(tmp_path, kind)
    before = read_prompt_files(tmp_path).tokenizer_json
    change(tmp_path, "tokenizer_config.json", add_bos_token=bos, add_eos_token=True)
    found, _ = compared(tmp_path)
    assert found.tokenizer_json == before


def test_a_tokenizer_without_post_processor_adds_nothing(tmp_path: Path) -> None:
    checkpoint(tmp_path)
    change(tmp_path, "tokenizer.json", post_processor=None)
    change(tmp_path, "tokenizer_config.json", add_bos_token=True)
    compared(tmp_path)


def test_stored_truncation_and_padding_are_switched_off(tmp_path: Path) -> None:
    core = pieces()
    core.enable_truncation(4)
    core.enable_padding(length=30, pad_token="<unk>", pad_id=0)
    checkpoint(tmp_path)
    write(tmp_path, "tokenizer.json", core.to_str())
    found, theirs = compared(tmp_path)
    assert found.special_tokens["pad_token"] == theirs.pad_token == "<unk>"


def added(content: str, **fields: Any) -> dict[str, Any]:
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    return {"content": content, **flags, "special": False} | fields


def test_added_tokens_of_tokenizer_config(tmp_path: Path) -> None:
    checkpoint(tmp_path)
    size = pieces().get_vocab_size()
    decoder = {
        "1": added("<s>", special=True),
        str(size + 1): added("<late>", special=True, lstrip=True),
        str(size): added("<new>", normalized=True),
        "4": added("<0x01>", rstrip=True),  # in the vocabulary, but not an added token there
        "2": added("</s>"),  # special by its name
    }
    change(
        tmp_path,
        "tokenizer_config.json",
        added_tokens_decoder=decoder,
        additional_special_tokens=["<extra>", "<image>"],
        mask_token="<mask>",
    )
    write(tmp_path, "special_tokens_map.json", {"bos_token": "not read"})
    found, theirs = compared(tmp_path)
    ours = Core.from_str(found.tokenizer_json)
    assert ours.token_to_id("<new>") == size
    assert ours.token_to_id("<late>") == size + 1
    assert ours.get_vocab(with_added_tokens=True) == theirs.get_vocab()


def test_legacy_files_of_added_tokens(tmp_path: Path) -> None:
    checkpoint(tmp_path)
    size = pieces().get_vocab_size()
    image = pieces().token_to_id("<image>")  # special in tokenizer.json, which wins
    legacy = {"<late>": size + 1, "<new>": size, "<image>": image}
    write(tmp_path, "added_tokens.json", legacy)
    write(
        tmp_path,
        "special_tokens_map.json",
        {
            "bos_token": {"content": "<s>", "lstrip": False, "normalized": False, "rstrip": False},
            "pad_token": "<late>",
            "cls_token": {"content": "<cls>", "lstrip": True, "rstrip": False},
            "additional_special_tokens": ["<x1>"],
        },
    )
    found, theirs = compared(tmp_path)
    assert found.special_tokens["pad_token"] == "<late>"
    assert Core.from_str(found.tokenizer_json).get_vocab() == theirs.get_vocab()


@pytest.mark.parametrize(
    "values",
    [
        {"image_token": "<image>"},
        {"image_token": {**added("<new>", special=True), "__type": "AddedToken"}},
        {"extra_special_tokens": {"image_token": "<new>"}},
        {"extra_special_tokens": ["<new>"]},
        {"additional_special_tokens": ["<new>", "<late>"]},
    ],
    ids=str,
)
def test_named_tokens_that_the_vocabulary_lacks(values: dict[str, Any], tmp_path: Path) -> None:
    change(checkpoint(tmp_path), "tokenizer_config.json", **values)
    compared(tmp_path)


# -- the chat template ------------------------------------------------------------------------

PLACES: dict[str, Callable[[Path], None]] = {
    "tokenizer": lambda f: change(f, "tokenizer_config.json", chat_template="of the tokenizer"),
    "jinja": lambda f: write(f, "chat_template.jinja", "of chat_template.jinja\n"),
    "json": lambda f: write(f, "chat_template.json", {"chat_template": "of chat_template.json"}),
    "processor": lambda f: change(f, "processor_config.json", chat_template="of the processor"),
}


@pytest.mark.parametrize("first", range(len(PLACES) + 1))
def test_chat_template_is_looked_for_in_order(first: int, tmp_path: Path) -> None:
    from transformers import CLIPImageProcessorPil, LlavaProcessor

    checkpoint(tmp_path)
    LlavaProcessor(CLIPImageProcessorPil(), fast(pieces(), **LLAMA), 14, "default").save_pretrained(
        tmp_path
    )
    expected = None
    for name in list(PLACES)[:first]:
        PLACES[name](tmp_path)
        theirs = LlavaProcessor.from_pretrained(tmp_path)
        # A processor takes no template from its tokenizer; we do rather than have none.
        expected = theirs.chat_template if name != "tokenizer" else theirs.tokenizer.chat_template
    assert read_prompt_files(tmp_path).chat_template == expected
    assert (expected is None) == (first == 0)


def test_named_chat_templates(tmp_path: Path) -> None:
    checkpoint(tmp_path)
    named = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]
    change(tmp_path, "tokenizer_config.json", chat_template=named)
    assert read_prompt_files(tmp_path).chat_template == "D"
    change(tmp_path, "tokenizer_config.json", chat_template=named[1:])
    with pytest.raises(UnsupportedConfig, match="chat_template"):
        read_prompt_files(tmp_path)


# -- generation -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("generation", "config", "eos"),
    [
        ({"eos_token_id": 7}, {"eos_token_id": 8}, (7,)),
        ({"eos_token_id": [7, 9, 7]}, {}, (7, 9)),
        (None, {"text_config": {"eos_token_id": 5}, "eos_token_id": 8}, (8,)),
        ({"eos_token_id": None}, {"eos_token_id": [8]}, ()),  # `generate` does not look further
        ({"bos_token_id": 1}, {"text_config": {"eos_token_id": 5}}, ()),
        (None, {"text_config": {"eos_token_id": 5}}, (5,)),
        (None, {}, ()),  # the tokenizer's </s> stops nothing
    ],
)
def test_eos(generation: Any, config: Any, eos: tuple[int, ...], tmp_path: Path) -> None:
    change(checkpoint(tmp_path), "config.json", **config)
    if generation is not None:
        write(tmp_path, "generation_config.json", generation)
    assert read_prompt_files(tmp_path).eos_token_ids == eos


def test_repetition_penalty(tmp_path: Path) -> None:
    checkpoint(tmp_path)
    assert read_prompt_files(tmp_path).repetition_penalty == 1.0
    change(tmp_path, "config.json", text_config={"repetition_penalty": 1.3})
    assert read_prompt_files(tmp_path).repetition_penalty == 1.3
    write(tmp_path, "generation_config.json", {"repetition_penalty": 1.05})
    assert read_prompt_files(tmp_path).repetition_penalty == 1.05
    for bad in (0, "1.0", True):
        write(tmp_path, "generation_config.json", {"repetition_penalty": bad})
        with pytest.raises(UnsupportedConfig, match="repetition_penalty"):
            read_prompt_files(tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_beams", 4),
        ("no_repeat_ngram_size", 3),
        ("suppress_tokens", [5]),
        ("begin_suppress_tokens", [5]),
        ("bad_words_ids", [[5]]),
        ("forced_eos_token_id", 2),
        ("forced_bos_token_id", 2),
        ("min_new_tokens", 3),
        ("min_length", 3),
        ("sequence_bias", [[[5], 1.0]]),
        ("guidance_scale", 1.5),
        ("stop_strings", ["###"]),
    ],
)
def test_generation_that_changes_the_answer_is_refused(
    key: str, value: Any, tmp_path: Path
) -> None:
    checkpoint(tmp_path)
    write(tmp_path, "generation_config.json", {key: value})
    with pytest.raises(UnsupportedConfig, match=f"{key}.*generation_config.json"):
        read_prompt_files(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    change(tmp_path, "config.json", **{key: value})
    with pytest.raises(UnsupportedConfig, match=key):
        read_prompt_files(tmp_path)


def test_transformers_own_defaults_pass(tmp_path: Path) -> None:
    from transformers import GenerationConfig

    checkpoint(tmp_path)
    sampling = GenerationConfig(do_sample=True, temperature=0.6, top_p=0.9, num_beams=1)
    write(tmp_path, "generation_config.json", sampling.to_dict())
    read_prompt_files(tmp_path)
    old = {"num_beams": 1, "no_repeat_ngram_size": 0, "min_length": 0, "repetition_penalty": 1.0}
    write(tmp_path, "generation_config.json", old | {"bad_words_ids": None, "max_length": 20})
    read_prompt_files(tmp_path)


# -- the image placeholder --------------------------------------------------------------------


def test_image_token(tmp_path: Path) -> None:
    checkpoint(tmp_path)
    image = pieces().token_to_id("<image>")
    found = read_prompt_files(tmp_path)
    assert (found.image_token, found.image_token_id) == ("<image>", image)
    write(tmp_path, "processor_config.json", {"image_token": "</s>"})
    assert read_prompt_files(tmp_path).image_token_id == 2
    change(tmp_path, "config.json", image_token_index=2)
    assert read_prompt_files(tmp_path).image_token == "</s>"
    change(tmp_path, "config.json", image_token_id=image)
    with pytest.raises(UnsupportedConfig, match="image_token_id"):
        read_prompt_files(tmp_path)
    write(tmp_path, "processor_config.json", {"image_token": "<none>"})
    with pytest.raises(UnsupportedConfig, match="image_token_id"):
        read_prompt_files(tmp_path)


def test_image_token_that_only_config_names(tmp_path: Path) -> None:
    checkpoint(tmp_path, "fast-t5")
    core = byte_level()
    core.save(str(tmp_path / "tokenizer.json"))
    stored = (tmp_path / "tokenizer.json").read_text(encoding="utf-8")
    write(tmp_path, "tokenizer.json", stored.replace("<image>", "[IMG]"))
    assert read_prompt_files(tmp_path).image_token is None
    change(tmp_path, "config.json", image_token_index=core.token_to_id("<image>"))
    assert read_prompt_files(tmp_path).image_token == "[IMG]"


# -- what cannot be read ----------------------------------------------------------------------


def test_missing_and_damaged_tokenizers(tmp_path: Path) -> None:
    with pytest.raises(CheckpointMissing, match=r"tokenizer\.json is missing; is this"):
        read_prompt_files(tmp_path)
    write(tmp_path, "tokenizer.model", "sentencepiece")
    with pytest.raises(CheckpointMissing, match="AutoTokenizer"):
        read_prompt_files(tmp_path)
    write(tmp_path, "tokenizer.json", "{")
    with pytest.raises(CheckpointMissing, match="damaged"):
        read_prompt_files(tmp_path)


@pytest.mark.parametrize(
    ("kind", "values", "key"),
    [
        ("fast-llama", {"split_special_tokens": True}, "split_special_tokens"),
        ("fast-t5", {"clean_up_tokenization_spaces": True}, "clean_up_tokenization_spaces"),
    ],
)
def test_tokenizer_settings_that_are_refused(
    kind: str, values: dict[str, Any], key: str, tmp_path: Path
) -> None:
    change(checkpoint(tmp_path, kind), "tokenizer_config.json", **values)
    with pytest.raises(UnsupportedConfig, match=key):
        read_prompt_files(tmp_path)


# -- classes that AutoTokenizer takes at their word ---------------------------------------------


@pytest.mark.parametrize(
    ("kind", "named", "settings"),
    [
        ("pieces", "LlamaTokenizer", {}),
        ("pieces", "LlamaTokenizerFast", {"legacy": True}),
        ("pieces", "LlamaTokenizer", {"legacy": False, "add_prefix_space": False}),
        ("bytes", "LlamaTokenizer", {}),
        ("bytes", "GPT2Tokenizer", {"add_bos_token": True}),
    ],
)
@pytest.mark.parametrize("model_type", ["blip-2", "idefics", "instructblip"])
def test_a_rebuilt_tokenizer(
    model_type: str, kind: str, named: str, settings: dict[str, object], tmp_path: Path
) -> None:
    from tokens import tokenizer_of
    from transformers import AutoTokenizer

    made = tokenizer_of(kind)
    made.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text()) | settings
    config.pop("backend", None)
    config["tokenizer_class"] = named
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    image = made.convert_tokens_to_ids("<image>")
    text = json.dumps({"model_type": model_type, "image_token_index": image})
    (tmp_path / "config.json").write_text(text)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    ours = Core.from_str(read_prompt_files(tmp_path).tokenizer_json)
    for tried in ("what is the color?", "what<image>what is", " the  thing", "a <image> the é", ""):
        ids = theirs(tried)["input_ids"]
        assert ours.encode(tried).ids == ids, tried
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True), tried
