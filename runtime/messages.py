"""What the caller wrote, in one form: chat messages, or texts and images in turn; images as they are opened.

Read are OpenAI's and Hugging Face's content parts, paths, file: and data: URLs, bytes and Pillow images.
"""

from __future__ import annotations

import base64
import binascii
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes, urlsplit
from urllib.request import url2pathname

from PIL import Image

from vlm_edge.errors import ImageUnreadable, PromptError
from vlm_edge.runtime.images import ImageInput

# A text; or chat messages; or texts and images in turn, where a str is always a text and an image is
# a pathlib.Path, bytes, a Pillow image or {"image": any of these, a path or a URL as str}.
Prompt = str | Sequence[Any]


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


def as_messages(
    prompt: Prompt, given: list[ImageInput]
) -> tuple[list[dict[str, Any]], list[ImageInput]]:
    """Messages of role and content (a string, or parts {"type": "text" | "image"}), and the images."""
    if isinstance(prompt, str):
        parts: list[dict[str, str]] = [{"type": "image"} for _ in given]
        if prompt:
            parts.append({"type": "text", "text": prompt})
        return [{"role": "user", "content": parts}], given
    if not is_chat(prompt):
        parts, images = interleaved(prompt, given)
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


def place_images(messages: list[dict[str, Any]], images: int, token: str) -> None:
    """Images that no message has a place for come first in the first user message, as in a plain
    text prompt; where there is any place at all, the count decides."""
    parts = [p for m in messages if isinstance(m.get("content"), list) for p in m["content"]]
    placed = any(p["type"] == "image" for p in parts) or any(token in t for t in texts_of(messages))
    asked = next((m for m in messages if m.get("role") == "user"), None)
    if placed or asked is None or not images:
        return
    content = asked.get("content") or []
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    asked["content"] = [{"type": "image"}] * images + parts


def is_chat(prompt: Sequence[Any]) -> bool:
    """Whether it is a list of messages; a list of texts and images has no roles."""
    if isinstance(prompt, (bytes, Mapping)) or not isinstance(prompt, Sequence):
        raise PromptError(f"the prompt is {_kind(prompt)}; give a text, or a list of what to say")
    roles = [isinstance(item, Mapping) and "role" in item for item in prompt]
    if any(roles) and not all(roles):
        raise PromptError("the prompt mixes chat messages with other items; each item needs a role")
    return any(roles)


def interleaved(
    items: Sequence[Any], given: list[ImageInput]
) -> tuple[list[dict[str, str]], list[ImageInput]]:
    """Texts and images in turn as content parts, and the images."""
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
            part, source = {"type": "image"}, image_source(item)
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
        return {"type": "image"}, image_source(address)
    if kind == "image":
        if part.get("base64") is not None:
            return {"type": "image"}, _from_base64(part["base64"])
        source = next((part[k] for k in ("image", "path", "url") if part.get(k) is not None), None)
        return {"type": "image"}, None if source is None else image_source(source)
    raise PromptError(
        f"a content part of type {kind!r} and keys {sorted(part)} is not text or image"
    )


def texts_of(messages: Sequence[Mapping[str, Any]]) -> list[str]:
    """Every text that the messages hold; "" for an image."""
    found = []
    for message in messages:
        content = message.get("content", "")
        parts = [{"text": content}] if isinstance(content, str) else content
        found += [part.get("text", "") for part in parts]
    return found


def image_source(source: Any) -> ImageInput:
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
