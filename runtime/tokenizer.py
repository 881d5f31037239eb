"""Text to token ids and back with the checkpoint's own tokenizer.json, whole or one token at a time."""

from __future__ import annotations

import codecs
import json
import logging
import os
from collections.abc import Iterable
from functools import cached_property
from typing import Any

import tokenizers

from vlm_edge.errors import BundleDamaged, PromptError

log = logging.getLogger(__name__)


class Tokenizer:
    """A bundle's tokenizer.json; equal to transformers' tokenizer of the checkpoint it came from.

    The exporter (`vlm_edge.export.prompt_files`) has already settled what transformers decides
    outside that file: added tokens, what is put in front and behind, no truncation, no padding.

    Raises:
        BundleDamaged: the file is missing or is not a tokenizer.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        try:
            self._core = tokenizers.Tokenizer.from_file(os.fspath(path))
        except Exception as error:  # the library raises nothing narrower
            raise BundleDamaged(os.fspath(path), f"it is not a tokenizer ({error})") from error
        self._core.no_truncation()
        self._core.no_padding()

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids; `add_special_tokens` puts bos/eos where the checkpoint's tokenizer does.

        Raises:
            PromptError: the text is not valid Unicode (a lone surrogate, from bytes that are not UTF-8).
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise PromptError("the text is not valid UTF-8") from error
        ids: list[int] = self._core.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Text; ids without a token (padding rows of the embedding table) give nothing."""
        return str(self._core.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def token_to_id(self, token: str) -> int | None:
        """The id of one whole token, None where the vocabulary lacks it."""
        found: int | None = self._core.token_to_id(token)
        return found

    def id_to_token(self, token_id: int) -> str | None:
        """The token as the vocabulary spells it ("▁the", "Ġthe"), None where there is none."""
        found: str | None = self._core.id_to_token(token_id)
        return found

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """The ids that `skip_special_tokens` leaves out."""
        added = self._core.get_added_tokens_decoder()
        return frozenset(index for index, token in added.items() if token.special)

    @cached_property
    def decoder_steps(self) -> tuple[dict[str, Any], ...]:
        """The "decoder" of tokenizer.json, its sequences flattened."""
        decoder = self._core.decoder
        return tuple(_flat(json.loads(decoder.__getstate__()))) if decoder is not None else ()


def _flat(step: dict[str, Any]) -> list[dict[str, Any]]:
    if step["type"] != "Sequence":
        return [step]
    return [inner for part in step["decoders"] for inner in _flat(part)]


class Detokenizer:
    """Text of a growing sequence: the pieces together are exactly `Tokenizer.decode` of all ids.

    A piece holds back what a later token could still change: an unfinished UTF-8 character of a
    byte-level vocabulary, and a run of SentencePiece's byte tokens (`<0xE2>`), which decode together
    (one bad byte turns the whole run into U+FFFD). The work per token does not grow with the text.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        kinds = [step["type"] for step in tokenizer.decoder_steps]
        self._stream: _Bytes | _Window
        if kinds == ["ByteLevel"]:
            self._stream = _Bytes()
        else:
            self._stream = _Window(tokenizer)

    def push(self, token_id: int) -> str:
        """The text that this token completes, often "" or more than its own."""
        token = self._tokenizer.id_to_token(token_id)
        if token is None or token_id in self._skipped:
            return ""
        return self._stream.push(token_id, token)

    def flush(self) -> str:
        """What was held back; afterwards a new sequence may start."""
        return self._stream.flush()


def _byte_table() -> dict[str, int]:
    """GPT-2's printable character for each byte, reversed (openai/gpt-2, encoder.py)."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    table = {chr(byte): byte for byte in shown}
    return table | {chr(256 + n): byte for n, byte in enumerate(hidden)}


_BYTES = _byte_table()


class _Bytes:
    """Byte-level vocabularies: the tokens' bytes in a row, read as UTF-8."""

    def __init__(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int, token: str) -> str:
        try:
            text = bytes([_BYTES[char] for char in token])
        except KeyError:  # an added token is written as it is
            text = token.encode()
        return self._utf8.decode(text)

    def flush(self) -> str:
        text = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return text


class _Window:
    """Other vocabularies: the new tokens are decoded behind the last one, whose own text is cut off.

    That one token of context keeps decoders from treating the new ones as the start of the text
    (Strip and Metaspace drop a leading space, WordPiece puts none).
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._context: list[int] = []
        self._pending: list[int] = []
        steps = tokenizer.decoder_steps
        self._bytes = any(step["type"] == "ByteFallback" for step in steps)
        self._local = _is_local(steps)
        if not self._local:
            kinds = ", ".join(step["type"] for step in steps)
            log.warning("this tokenizer's decoder (%s) cannot stream: text comes at the end", kinds)

    def push(self, token_id: int, token: str) -> str:
        self._pending.append(token_id)
        in_run = self._bytes and len(token) == 6 and token.startswith("<0x") and token[-1] == ">"
        return "" if in_run or not self._local else self._take()

    def flush(self) -> str:
        text = self._take() if self._pending else ""
        self._context = []
        return text

    def _take(self) -> str:
        before = self._tokenizer.decode(self._context, skip_special_tokens=False)
        text = self._tokenizer.decode(self._context + self._pending, skip_special_tokens=False)
        self._context, self._pending = self._pending[-1:], []
        return text[len(before) :]


_LOCAL = {"Replace", "ByteFallback", "Metaspace", "Strip", "WordPiece", "BPEDecoder"}


def _is_local(steps: Iterable[dict[str, Any]]) -> bool:
    """Whether a token's text depends on no more than its neighbour and the bytes around it.

    After Fuse a step sees the whole text at once: only dropping one leading space is local then.
    """
    fused = False
    for step in steps:
        kind = step["type"]
        if kind == "Fuse":
            fused = True
        elif fused and not (kind == "Strip" and step["start"] <= 1 and step["stop"] == 0):
            return False
        elif kind not in _LOCAL:
            return False
    return True
