"""A checkpoint's tokenizer, chat template and generation defaults, settled as transformers 5 does.

The rules were read from transformers 5.23 (tokenization_utils_base.py, tokenization_utils_tokenizers.py,
processing_utils.py, generation/configuration_utils.py): where a folder has a tokenizer.json,

- its post-processor alone decides about bos and eos: `add_bos_token` and `add_eos_token` of
  tokenizer_config.json are dropped on loading (version 4 obeyed them);
- added tokens come from tokenizer_config.json's `added_tokens_decoder`, else from
  special_tokens_map.json and added_tokens.json, and are added in the order of their ids, whichever id
  the vocabulary then gives them;
- `clean_up_tokenization_spaces` is ignored for BPE.

This is `TokenizersBackend`, which AutoTokenizer takes for every LLaVA checkpoint. Where it takes a class that
rebuilds the vocabulary's pipeline in Python (`REBUILT`), most save a tokenizer.json that says the same;
LlamaTokenizer does not (`_as_rebuilt`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, pre_tokenizers

from vlm_edge.errors import CheckpointMissing, UnsupportedConfig
from vlm_edge.export.config import read_json

NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

# Keys of generation_config.json that change the greedy answer, with the values that do nothing.
# Sampling's own keys (temperature, top_k ...) are the caller's and are not read.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "penalty_alpha": (0,),
    "dola_layers": (),
    "guidance_scale": (1,),
    "sequence_bias": (),
    "encoder_repetition_penalty": (1,),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "bad_words_ids": ([],),
    "force_words_ids": ([],),
    "constraints": ([],),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "forced_decoder_ids": ([],),
    "exponential_decay_length_penalty": (),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "watermarking_config": (),
    "stop_strings": ([],),
    "token_healing": (False,),
}


@dataclass(frozen=True)
class PromptFiles:
    """What the bundle's prompt, stop and penalty settings are made of.

    Attributes:
        tokenizer_json: text of the tokenizer.json to bundle.
        chat_template: Jinja text, None where the checkpoint has none.
        special_tokens: named tokens as chat templates see them (bos_token, image_token ...).
        eos_token_ids: each ends an answer; empty where the checkpoint names none.
        repetition_penalty: 1.0 where generation_config.json says nothing.
        image_token: the placeholder, None where neither processor nor vocabulary has one.
        image_token_id: its id.
        instruction_tokenizer_json: of the connector's own tokenizer, None where there is none.
    """

    tokenizer_json: str
    chat_template: str | None
    special_tokens: dict[str, str]
    eos_token_ids: tuple[int, ...]
    repetition_penalty: float
    image_token: str | None
    image_token_id: int | None
    instruction_tokenizer_json: str | None = None


# eos_token_id of a text_config that says none, by model_type.
EOS: dict[str, int | None] = {"llama": 2, "mistral": 2, "opt": 2, "t5": 1}
# The placeholder that a processor takes where nothing names one; else <image>.
IMAGE_TOKEN = {"mllama": "<|image|>"}
# Their processors add the placeholder to a tokenizer that lacks it.
ADDS_IMAGE_TOKEN = ("blip-2", "instructblip")
# Of these AutoTokenizer takes the class that tokenizer_config.json names, or where it names none this one.
REBUILT = {
    "blip-2": "GPT2Tokenizer", "idefics": "LlamaTokenizer", "instructblip": "GPT2Tokenizer",
}  # fmt: skip


def read_prompt_files(folder: Path, inner_generation: bool = False) -> PromptFiles:
    """Read everything about text from a Hugging Face checkpoint folder.

    Args:
        inner_generation: `generate` is the language model's own and takes its defaults from text_config;
            generation_config.json belongs to the whole and is not read (BLIP-2).

    Raises:
        CheckpointMissing: there is no tokenizer.json, or a file is not readable.
        UnsupportedConfig: a setting changes the answer and cannot be honoured.
    """
    config = _optional(folder / "config.json")
    settings = _optional(folder / "tokenizer_config.json")
    processor = _optional(folder / "processor_config.json")
    core, special_tokens = _read_tokenizer(folder, settings)
    rebuilt = REBUILT.get(str(config.get("model_type")))
    if rebuilt is not None:
        _as_rebuilt(core, settings, str(settings.get("tokenizer_class") or rebuilt))
    generation = _inner_generation(config) if inner_generation else _generation(folder, config)
    token, token_id = _image_token(core, special_tokens, processor, config)  # may add it to `core`
    return PromptFiles(
        tokenizer_json=core.to_str(),
        chat_template=_chat_template(folder, settings, processor),
        special_tokens=special_tokens,
        eos_token_ids=_eos(generation),
        repetition_penalty=_penalty(generation),
        image_token=token,
        image_token_id=token_id,
        instruction_tokenizer_json=_instruction_tokenizer(folder / "qformer_tokenizer"),
    )


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


# -- the tokenizer ----------------------------------------------------------------------------


def _read_tokenizer(
    folder: Path, settings: Mapping[str, Any]
) -> tuple[tokenizers.Tokenizer, dict[str, str]]:
    """The tokenizer as transformers completes it, and its named special tokens."""
    core = _open_tokenizer(folder)
    _refuse_tokenizer(core, settings)
    special_tokens = _merge_tokens(core, folder, settings)
    core.no_truncation()
    core.no_padding()
    return core, special_tokens


def _as_rebuilt(core: tokenizers.Tokenizer, settings: Mapping[str, Any], name: str) -> None:
    """LlamaTokenizer's own pipeline in the place of the file's: a space stands before the text and, unless
    `legacy`, not behind every special token too. Other classes say what their files say."""
    byte_level = "ByteLevel" in json.dumps(json.loads(core.to_str())["pre_tokenizer"])
    if name.removesuffix("Fast") != "LlamaTokenizer" or byte_level:
        return
    prefix = settings.get("add_prefix_space") is not False
    scheme: Any = "never" if not prefix else "always" if settings.get("legacy") else "first"
    core.normalizer = None
    core.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=scheme, split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    core.decoder = decoders.Sequence([*steps, *([decoders.Strip(" ", 1, 0)] if prefix else [])])


def _instruction_tokenizer(folder: Path) -> str | None:
    """InstructBlipProcessor's second tokenizer, which lies in a folder of its own."""
    if not folder.is_dir():
        return None
    return str(_read_tokenizer(folder, _optional(folder / "tokenizer_config.json"))[0].to_str())


def _open_tokenizer(folder: Path) -> tokenizers.Tokenizer:
    path = folder / "tokenizer.json"
    if not path.is_file():
        others = ("tokenizer.model", "vocab.json", "tekken.json")
        other = next((name for name in others if (folder / name).is_file()), None)
        if other is None:
            raise CheckpointMissing(folder, "tokenizer.json is missing; is this a checkpoint?")
        raise CheckpointMissing(
            folder,
            f"tokenizer.json is missing, {other} alone is not read; write it once with transformers: "
            "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)",
        )
    try:
        core = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise CheckpointMissing(folder, f"tokenizer.json is damaged ({error})") from error
    return core


def _refuse_tokenizer(core: tokenizers.Tokenizer, settings: Mapping[str, Any]) -> None:
    if settings.get("split_special_tokens"):
        raise UnsupportedConfig("split_special_tokens", True, "image placeholders must stay whole")
    for_bpe = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"
    is_bpe = type(core.model).__name__ == "BPE"
    if settings.get("clean_up_tokenization_spaces") and (not is_bpe or settings.get(for_bpe)):
        raise UnsupportedConfig(
            "clean_up_tokenization_spaces", True, "the runtime does not rewrite the decoded text"
        )


def _merge_tokens(
    core: tokenizers.Tokenizer, folder: Path, settings: Mapping[str, Any]
) -> dict[str, str]:
    """Add to `core` the tokens that tokenizer.json lacks; return the named special tokens.

    Source: PreTrainedTokenizerBase._from_pretrained and TokenizersBackend.__init__.
    """
    values = dict(settings)
    if core.padding is not None:
        values.setdefault("pad_token", core.padding["pad_token"])
    added: dict[int, AddedToken] = {}
    if "added_tokens_decoder" in values:
        added = {int(i): _token(t, False) for i, t in values["added_tokens_decoder"].items()}
    else:
        values |= _optional(folder / "special_tokens_map.json")
        extra = values.get("extra_special_tokens") or values.get("additional_special_tokens") or ()
        special = {_text(t) for t in (*extra, *(values[k] for k in NAMED if values.get(k)))}
        for text, index in _optional(folder / "added_tokens.json").items():
            added[index] = AddedToken(text, normalized=text not in special, special=text in special)
        added |= core.get_added_tokens_decoder()
    known = {token.content: token for token in added.values()}
    named = {key: values[key] for key in values if key in NAMED and values[key]}
    named |= {
        key: value
        for key, value in values.items()
        if key.endswith("_token") and key not in NAMED and isinstance(value, (str, dict))
    }
    extra = values.get("extra_special_tokens") or values.get("additional_special_tokens") or []
    if isinstance(extra, dict):
        named, extra = named | extra, []
    tokens = {key: known.get(_text(value)) or _token(value, True) for key, value in named.items()}
    names = {token.content for token in tokens.values()}
    present = {token.content for token in core.get_added_tokens_decoder().values()}
    queue = [token for _, token in sorted(added.items())]
    later = [*tokens.values(), *(_token(value, True) for value in extra)]
    queue += [token for token in later if token.content not in present | set(known)]
    for token in queue:
        token.special = token.special or token.content in names
    core.add_tokens(queue)
    return {key: token.content for key, token in tokens.items()}


def _token(value: Any, special: bool) -> AddedToken:
    """A string, or AddedToken's fields as JSON; a bare string is special where `special` says so."""
    if isinstance(value, Mapping):
        fields = {key: value[key] for key in value if key not in ("__type", "content")}
        return AddedToken(value["content"], **({"special": special} | fields))
    return AddedToken(str(value), special=special)


def _text(value: Any) -> str:
    return str(value["content"]) if isinstance(value, Mapping) else str(value)


# -- the template -----------------------------------------------------------------------------


def _chat_template(
    folder: Path, settings: Mapping[str, Any], processor: Mapping[str, Any]
) -> str | None:
    """The default template, in the order in which processors look; the tokenizer's own comes last."""
    found: Any = processor.get("chat_template")
    if found is None:
        found = _optional(folder / "chat_template.json").get("chat_template")
    path = folder / "chat_template.jinja"
    if found is None and path.is_file():
        try:
            found = path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise CheckpointMissing(folder, f"{path.name} is not readable ({error})") from error
    if found is None:
        found = settings.get("chat_template")
    if isinstance(found, list):
        found = {entry["name"]: entry["template"] for entry in found}
    if isinstance(found, Mapping):
        if "default" not in found:
            raise UnsupportedConfig("chat_template", sorted(found), "none of them is named default")
        found = found["default"]
    return None if found is None else str(found)


# -- generation -------------------------------------------------------------------------------


def _generation(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """generation_config.json, else the same keys of config.json, where older checkpoints have them."""
    path = folder / "generation_config.json"
    if path.is_file():
        found = read_json(path)
    else:
        path = folder / "config.json"
        text = config.get("text_config") or {}
        keys = {*NEUTRAL, "eos_token_id", "repetition_penalty"}
        found = {k: v for k, v in (*text.items(), *config.items()) if k in keys and v is not None}
    for key, harmless in NEUTRAL.items():
        value = found.get(key)
        if value is not None and value not in harmless:
            raise UnsupportedConfig(
                key, value, "it changes the answer and vlm-edge does not implement it; remove it from "
                f"{path.name} if the answers may differ from transformers'",
            )  # fmt: skip
    return found


def _inner_generation(config: Mapping[str, Any]) -> dict[str, Any]:
    """What transformers 5 takes from text_config for a language model within another model: its ids
    alone (GenerationConfig.from_model_config)."""
    text = config.get("text_config") or {}
    return {"eos_token_id": text.get("eos_token_id", EOS.get(text.get("model_type", "opt")))}


def _penalty(generation: Mapping[str, Any]) -> float:
    value = generation.get("repetition_penalty")
    value = 1.0 if value is None else value
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
        raise UnsupportedConfig("repetition_penalty", value, "it should be a number above 0")
    return float(value)


def _eos(generation: Mapping[str, Any]) -> tuple[int, ...]:
    """What transformers' `generate` stops at; the tokenizer's own end token stops nothing there."""
    value = generation.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if any(isinstance(i, bool) or not isinstance(i, int) for i in ids):
        raise UnsupportedConfig("eos_token_id", value, "it should be an id or a list of ids")
    return tuple(dict.fromkeys(ids))


def _image_token(
    core: tokenizers.Tokenizer,
    special_tokens: Mapping[str, str],
    processor: Mapping[str, Any],
    config: Mapping[str, Any],
) -> tuple[str | None, int | None]:
    """The placeholder as LlavaProcessor finds it, and its id, which config.json must agree with."""
    named = special_tokens.get("image_token") or processor.get("image_token")
    usual = IMAGE_TOKEN.get(str(config.get("model_type")), "<image>")
    token = _text(named) if named else usual
    found: int | None = core.token_to_id(token)
    key = "image_token_id" if config.get("image_token_id") is not None else "image_token_index"
    wanted = config.get(key)
    if found is None and wanted is None and config.get("model_type") in ADDS_IMAGE_TOKEN:
        core.add_special_tokens([AddedToken(token, normalized=False, special=True)])
        found = core.token_to_id(token)
    if named is None and found is None and isinstance(wanted, int):
        token, found = core.id_to_token(wanted) or token, wanted
    if found is None and named is None:
        return None, None
    if found is None or (wanted is not None and wanted != found):
        raise UnsupportedConfig(key, wanted, f"the tokenizer gives {token} the id {found}")
    return token, found
