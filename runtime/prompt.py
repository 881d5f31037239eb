"""From what the caller wrote (text, chat messages, texts and images in turn) to token ids and images.

The words follow transformers' ProcessorMixin.apply_chat_template and the model's processor: render the
chat template, put each image's places where its placeholder stands, add bos unless it is there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlm_edge.errors import (
    EmptyPrompt,
    ImageCountMismatch,
    PromptError,
    TemplateError,
    VisualTokenMismatch,
)
from vlm_edge.runtime.images import ImageInput
from vlm_edge.runtime.instruction import Instruction
from vlm_edge.runtime.manifest import InterleaveSettings, PromptSettings
from vlm_edge.runtime.messages import (
    Prompt,
    as_messages,
    image_source,
    interleaved,
    is_chat,
    listed,
    place_images,
    texts_of,
)
from vlm_edge.runtime.picture import Picture, open_picture
from vlm_edge.runtime.template import ChatTemplate
from vlm_edge.runtime.tiling.plan import UNLIMITED, TileLimits, Tiler
from vlm_edge.runtime.tokenizer import Tokenizer


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
    its processor knows another form (BLIP-2, IDEFICS, OpenFlamingo).

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
    given = [image_source(image) for image in listed(images)]
    own_form = settings.visual_tokens_first or settings.interleave is not None
    if template is None and own_form and not is_chat(prompt):
        use_template = False
    if use_template:
        messages, found = as_messages(prompt, given)
        _refuse_empty(texts_of(messages), found)
        place_images(messages, len(found), settings.image_token)
        text = _render(messages, template, settings.image_token)
        bos = settings.special_tokens.get("bos_token")
        special = not (bos and text.startswith(bos))  # as apply_chat_template
    else:
        text, found = _verbatim(prompt, given, settings)
        _refuse_empty([text], found)
        special = True
    bos = None if settings.interleave is None else settings.interleave.bos_token
    if bos is not None:  # the processor writes bos out, and nothing else is added
        special = False
        text = text if text.startswith(bos) else bos + text
    if settings.bos_behind_images:
        text = _with_bos(text, settings.special_tokens["bos_token"], settings.image_token)
    # The processor's own form: visual tokens before everything, bos too.
    first = settings.visual_tokens_first and settings.image_token not in text
    if not first and text.count(settings.image_token) != len(found):
        raise ImageCountMismatch(text.count(settings.image_token), len(found), settings.image_token)
    pictures = [open_picture(image, tiler, limits) for image in found]
    # A picture that is attended to has one place, which says from where on.
    attended = settings.interleave is not None or settings.bos_behind_images
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


def _refuse_empty(texts: Sequence[str], images: Sequence[ImageInput]) -> None:
    if not images and not any(text.strip() for text in texts):
        raise EmptyPrompt


def _expand(text: str, token: str, places: Sequence[str]) -> str:
    first, *rest = text.split(token)
    return first + "".join(p + piece for p, piece in zip(places, rest, strict=True))


def _with_bos(text: str, bos: str, token: str) -> str:
    """As MllamaProcessor's `build_string_from_input`."""
    if bos in text:
        return text
    rest = text
    while rest.startswith(token):
        rest = rest.removeprefix(token)
    return text[: len(text) - len(rest)] + bos + rest


# -- without the template ---------------------------------------------------------------------


def _verbatim(
    prompt: Prompt, given: list[ImageInput], settings: PromptSettings
) -> tuple[str, list[ImageInput]]:
    if isinstance(prompt, str):
        if settings.interleave is None or settings.image_token in prompt:
            return prompt, given
        parts = [{"type": "image"} for _ in given] + [{"type": "text", "text": prompt}]
        return _joined(parts, settings.interleave, settings.image_token), given
    if is_chat(prompt):
        raise PromptError("chat messages need the chat template; give a text with template=False")
    parts, images = interleaved(prompt, given)
    if settings.interleave is not None:
        return _joined(parts, settings.interleave, settings.image_token), images
    if settings.visual_tokens_first and all("text" in part for part in parts[len(images) :]):
        parts = parts[len(images) :]  # they are first already
    return "".join(part.get("text", settings.image_token) for part in parts), images


def _joined(parts: Sequence[Mapping[str, str]], form: InterleaveSettings, token: str) -> str:
    """Texts and pictures in turn as the model's processor writes them."""
    text, before = "", ""
    for part in parts:
        if part["type"] == "image":
            text += token if before == "image" else form.around_image + token
            text += form.around_image
        else:
            text += form.end_of_utterance or "" if before == "text" else ""
            text += part["text"].strip(" ") if form.strip else part["text"]
        before = part["type"]
    return text


# -- the template -----------------------------------------------------------------------------


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
