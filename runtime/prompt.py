"""From what the caller wrote (text, chat messages, texts and images in turn) to token ids and images.

The words follow transformers' ProcessorMixin.apply_chat_template and the model's processor: render the
chat template, put each image's places where its placeholder stands, add bos unless it is there.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes, urlsplit
from urllib.request import url2pathname

from PIL import Image

from vlm_edge.errors import (
    EmptyPrompt,
    ImageCountMismatch,
    ImageUnreadable,
    PromptError,
    TemplateError,
    VisualTokenMismatch,
)
from vlm_edge.runtime.images import ImageInput
from vlm_edge.runtime.instruction import Instruction
from vlm_edge.runtime.manifest import InterleaveSettings, PromptSettings
from vlm_edge.runtime.picture import Picture, open_picture
from vlm_edge.runtime.template import ChatTemplate
from vlm_edge.runtime.tiling.plan import UNLIMITED, TileLimits, Tiler
from vlm_edge.runtime.tokenizer import Tokenizer

# A text; or chat messages; or texts and images in turn, where a str is always a text and an image is
# a pathlib.Path, bytes, a Pillow image or {"image": any of these, a path or a URL as str}.
Prompt = str | Sequence[Any]


@dataclass(frozen=True)
class BuiltPrompt:
    """A prompt ready for the engines.

    Attributes:
        text: what the template made of it, one placeholder per image.
        token_ids: with one place per visual token where the placeholders stood, or first of all.
        pictures: in the order of their placeholders.
        instruction: the text without placeholders as the connector's own tokens, where there are pictures
            and it reads any.
    """

    text: str
    token_ids: list[int]
    pictures: list[Picture]
    instruction: tuple[int, ...] | None = None

    @property
    def terms(self) -> list[int]:
        """What the visual tokens are made of, picture by picture."""
        return [count for picture in self.pictures for _, count in picture.plan.terms]

    @property
    def visual_tokens(self) -> int:
        """How many of the ids are places of visual tokens."""
        return sum(picture.plan.tokens for picture in self.pictures)

    @property
    def visual_keys(self) -> list[tuple[str, int]]:
        """A hex digest of all that decides each picture's visual tokens, and their number."""
        read = "" if self.instruction is None else f" {self.instruction}"
        keys = [
            hashlib.sha256(f"{picture.key}{read}".encode()).hexdigest() for picture in self.pictures
        ]
        return [(key, p.plan.tokens) for key, p in zip(keys, self.pictures, strict=True)]


def build_prompt(
    prompt: Prompt,
    images: Sequence[ImageInput] | ImageInput | None,
    settings: PromptSettings,
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    tiler: Tiler,
    *,
    use_template: bool = True,
    limits: TileLimits = UNLIMITED,
    instruction: Instruction | None = None,
) -> BuiltPrompt:
    """Turn the caller's prompt into token ids and the images they refer to.

    A text with images becomes one user message, the images first. In messages, image parts without a
    source of their own take `images` in order. Without the template the text is used verbatim, its
    placeholders included; so is a text, or texts and images in turn, where the checkpoint has no template and
    its processor knows another form (BLIP-2, IDEFICS).

    Args:
        tiler: says what stands for an image of a given size.
        limits: on the tiles and visual tokens of each image.
        instruction: makes the connector's own token ids of the text, where it reads any.

    Raises:
        EmptyPrompt: no text but white space, and no image.
        TemplateError: a template is wanted and the checkpoint has none, or it refuses the messages.
        ImageCountMismatch: placeholders and images differ in number.
        VisualTokenMismatch: the tokenizer does not keep the placeholder as one token.
        ImageError: an image cannot be read, or the model cannot keep `limits`.
        PromptError: a prompt, message, part or image of another kind.
    """
    given = [_image(image) for image in listed(images)]
    own_form = settings.visual_tokens_first or settings.interleave is not None
    if template is None and own_form and not _is_chat(prompt):
        use_template = False
    if use_template:
        messages, found = _messages(prompt, given)
        _refuse_empty(_texts(messages), found)
        _place(messages, len(found), settings.image_token)
        text = _render(messages, template, settings.image_token)
        bos = settings.special_tokens.get("bos_token")
        special = not (bos and text.startswith(bos))  # as apply_chat_template
    else:
        text, found = _verbatim(prompt, given, settings)
        _refuse_empty([text], found)
        special = True
    if settings.interleave is not None:  # its processor writes bos out, and nothing else is added
        bos, special = settings.interleave.bos_token, False
        text = text if text.startswith(bos) else bos + text
    # The processor's own form: visual tokens before everything, bos too.
    first = settings.visual_tokens_first and settings.image_token not in text
    if not first and text.count(settings.image_token) != len(found):
        raise ImageCountMismatch(text.count(settings.image_token), len(found), settings.image_token)
    pictures = [open_picture(image, tiler, limits) for image in found]
    # A picture that is attended to has one place, which says from where on.
    attended = settings.interleave is not None
    places = [
        settings.image_token if attended else tiler.places(picture.plan, settings.image_token)
        for picture in pictures
    ]
    if first:
        ids = tokenizer.encode("".join(places), add_special_tokens=False)
        ids += tokenizer.encode(text, add_special_tokens=special)
    else:
        expanded = _expand(text, settings.image_token, places)
        ids = tokenizer.encode(expanded, add_special_tokens=special)
    read = None
    if instruction is not None and pictures:
        read = instruction.encode(text.replace(settings.image_token, ""), special)
    built = BuiltPrompt(text, ids, pictures, read)
    wanted = [1] * len(pictures) if attended else built.terms
    if ids.count(settings.image_token_id) != sum(wanted):
        raise VisualTokenMismatch(ids.count(settings.image_token_id), wanted)
    return built


def listed(images: Sequence[ImageInput] | ImageInput | None) -> list[ImageInput]:
    """One image, several or none, as a list."""
    if images is None:
        return []
    if isinstance(images, (str, bytes, os.PathLike, Image.Image)):
        return [images]
    if not isinstance(images, Iterable):
        raise PromptError(
            f"images is {_kind(images)}; give a path, bytes, a Pillow image or several"
        )
    return list(images)


def _refuse_empty(texts: Sequence[str], images: Sequence[ImageInput]) -> None:
    if not images and not any(text.strip() for text in texts):
        raise EmptyPrompt


def _expand(text: str, token: str, places: Sequence[str]) -> str:
    first, *rest = text.split(token)
    return first + "".join(p + piece for p, piece in zip(places, rest, strict=True))


# -- without the template ---------------------------------------------------------------------


def _verbatim(
    prompt: Prompt, given: list[ImageInput], settings: PromptSettings
) -> tuple[str, list[ImageInput]]:
    if isinstance(prompt, str):
        if settings.interleave is None or settings.image_token in prompt:
            return prompt, given
        parts = [{"type": "image"} for _ in given] + [{"type": "text", "text": prompt}]
        return _joined(parts, settings.interleave, settings.image_token), given
    if _is_chat(prompt):
        raise PromptError("chat messages need the chat template; give a text with template=False")
    parts, images = _interleaved(prompt, given)
    if settings.interleave is not None:
        return _joined(parts, settings.interleave, settings.image_token), images
    if settings.visual_tokens_first and all("text" in part for part in parts[len(images) :]):
        parts = parts[len(images) :]  # they are first already
    return "".join(part.get("text", settings.image_token) for part in parts), images


def _joined(parts: Sequence[Mapping[str, str]], form: InterleaveSettings, token: str) -> str:
    """Texts and pictures in turn as IdeficsProcessor writes them."""
    text, before = "", ""
    for part in parts:
        if part["type"] == "image":
            text += token if before == "image" else form.around_image + token
            text += form.around_image
        else:
            text += form.end_of_utterance or "" if before == "text" else ""
            text += part["text"].strip(" ")
        before = part["type"]
    return text


# -- chat messages ----------------------------------------------------------------------------


def _messages(
    prompt: Prompt, given: list[ImageInput]
) -> tuple[list[dict[str, Any]], list[ImageInput]]:
    """Messages of role and content (a string, or parts {"type": "text" | "image"}), and the images."""
    if isinstance(prompt, str):
        parts: list[dict[str, str]] = [{"type": "image"} for _ in given]
        if prompt:
            parts.append({"type": "text", "text": prompt})
        return [{"role": "user", "content": parts}], given
    if not _is_chat(prompt):
        parts, images = _interleaved(prompt, given)
        return [{"role": "user", "content": parts}], images
    waiting = list(given)
    messages, images = [], []
    chat: Sequence[Mapping[str, Any]] = prompt  # type: ignore[assignment]  # a str has left above
    for message in chat:
        # Absent and null are the same: APIs answer `"tool_calls": null`, templates print "None".
        message = {key: value for key, value in message.items() if value is not None}
        content = message.get("content")
        if isinstance(content, Sequence) and not isinstance(content, (str, bytes)):
            message["content"] = []
            for raw in content:
                part, source = _part(raw)
                message["content"].append(part)
                if source is not None:
                    images.append(source)
                elif part["type"] == "image" and waiting:
                    images.append(waiting.pop(0))
        elif content is not None and not isinstance(content, str):
            raise PromptError(f"a message's content is {_kind(content)}; give a text or parts")
        messages.append(message)
    # What no part took belongs to placeholders that the texts spell themselves; the count decides.
    return messages, images + waiting


def _place(messages: list[dict[str, Any]], images: int, token: str) -> None:
    """Images that no message has a place for come first in the first user message, as in a plain
    text prompt; where there is any place at all, the count decides."""
    parts = [p for m in messages if isinstance(m.get("content"), list) for p in m["content"]]
    placed = any(p["type"] == "image" for p in parts) or any(token in t for t in _texts(messages))
    asked = next((m for m in messages if m.get("role") == "user"), None)
    if placed or asked is None or not images:
        return
    content = asked.get("content") or []
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    asked["content"] = [{"type": "image"}] * images + parts


def _is_chat(prompt: Sequence[Any]) -> bool:
    """Whether it is a list of messages; a list of texts and images has no roles."""
    if isinstance(prompt, (bytes, Mapping)) or not isinstance(prompt, Sequence):
        raise PromptError(f"the prompt is {_kind(prompt)}; give a text, or a list of what to say")
    roles = [isinstance(item, Mapping) and "role" in item for item in prompt]
    if any(roles) and not all(roles):
        raise PromptError("the prompt mixes chat messages with other items; each item needs a role")
    return any(roles)


def _interleaved(
    items: Sequence[Any], given: list[ImageInput]
) -> tuple[list[dict[str, str]], list[ImageInput]]:
    if given:
        raise PromptError("give images inside the list or as images=, not both")
    parts, images = [], []
    for item in items:
        if isinstance(item, str):
            part, source = {"type": "text", "text": item}, None
        elif isinstance(item, Mapping):
            part, source = _part(item)
            if part["type"] == "image" and source is None:
                raise PromptError('an image in a list of texts and images needs its own "image"')
        else:
            part, source = {"type": "image"}, _image(item)
        parts.append(part)
        if source is not None:
            images.append(source)
    return parts, images


def _part(part: Any) -> tuple[dict[str, str], ImageInput | None]:
    """One content part as the template sees it, and its image where it brings one.

    Read are OpenAI's `text` and `image_url`, and Hugging Face's `text` and `image` with its source
    under "image", "path", "url" or "base64".
    """
    if not isinstance(part, Mapping):
        raise PromptError(f"a content part is {_kind(part)}; it should be an object with a type")
    kind = part.get("type", "image" if "image" in part else "text")
    if kind == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}, None
    if kind == "image_url":
        address = part.get("image_url")
        address = address.get("url") if isinstance(address, Mapping) else address
        if not isinstance(address, str):
            raise PromptError('a content part of type image_url needs {"image_url": {"url": ...}}')
        return {"type": "image"}, _image(address)
    if kind == "image":
        if part.get("base64") is not None:
            return {"type": "image"}, _from_base64(part["base64"])
        source = next((part[k] for k in ("image", "path", "url") if part.get(k) is not None), None)
        return {"type": "image"}, None if source is None else _image(source)
    raise PromptError(
        f"a content part of type {kind!r} and keys {sorted(part)} is not text or image"
    )


# -- the template -----------------------------------------------------------------------------


def _texts(messages: Sequence[Mapping[str, Any]]) -> list[str]:
    found = []
    for message in messages:
        content = message.get("content", "")
        parts = [{"text": content}] if isinstance(content, str) else content
        found += [part.get("text", "") for part in parts]
    return found


def _render(messages: list[dict[str, Any]], template: ChatTemplate | None, token: str) -> str:
    if template is None:
        raise TemplateError(
            "the checkpoint has none, so it takes no chat messages; give one text in the model's own "
            f"format, with template=False and one {token} for each image"
        )
    return template.render([_fitted(message, template, token) for message in messages])


def _fitted(message: dict[str, Any], template: ChatTemplate, token: str) -> dict[str, Any]:
    """Content in the form the template reads; transformers passes it on and may lose the text."""
    content = message.get("content")
    if isinstance(content, str) and template.takes_parts and not template.takes_strings:
        return message | {"content": [{"type": "text", "text": content}]}
    if isinstance(content, list) and template.takes_strings and not template.takes_parts:
        # A placeholder on a line of its own is how LLaVA was trained.
        return message | {"content": "\n".join(part.get("text", token) for part in content)}
    return message


# -- images -----------------------------------------------------------------------------------


def _image(source: Any) -> ImageInput:
    """An image as runtime/images.py opens it; a str may be a path, a file: or a data: URL."""
    if isinstance(source, (bytes, os.PathLike, Image.Image)):
        return source
    if not isinstance(source, str):
        raise PromptError(f"an image is {_kind(source)}; give a path, bytes or a Pillow image")
    scheme = source.partition(":")[0].lower()
    if scheme in ("http", "https"):
        raise PromptError(f"image {source[:100]} is on the network; download it and give its path")
    if scheme == "file":
        parts = urlsplit(source)
        if parts.netloc not in ("", "localhost"):
            raise PromptError(
                f"image {source[:100]} is on another machine; give a path on this one"
            )
        return Path(url2pathname(parts.path))
    if scheme == "data" and "," in source:
        head, _, body = source.partition(",")
        return _from_base64(body) if head.endswith(";base64") else unquote_to_bytes(body)
    return source


def _from_base64(text: Any) -> bytes:
    try:
        return base64.b64decode("".join(str(text).split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ImageUnreadable("given as base64 text", str(error)) from error


def _kind(value: object) -> str:
    return f"a {type(value).__name__}"
