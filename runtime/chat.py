"""A conversation: messages kept, their prefix in the cache re-used from turn to turn."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from vlm_edge.errors import EmptyPrompt, TemplateError
from vlm_edge.runtime.messages import listed
from vlm_edge.runtime.settings import Settings
from vlm_edge.runtime.vlm import VLM, Images, Result, Stream


class Chat:
    """Made by `VLM.chat`.

    Attributes:
        messages: the conversation so far, in Hugging Face content parts; images stay in their places.

    Raises:
        TemplateError: the checkpoint has no chat template (BLIP-2).
    """

    def __init__(self, vlm: VLM, system: str | None = None) -> None:
        if vlm.template is None:
            raise TemplateError("the checkpoint has none; ask single questions (vlm run -p TEXT)")
        self._vlm = vlm
        self._limits: dict[str, Any] = {}
        self.messages: list[dict[str, Any]] = []
        if system:
            self.messages.append({"role": "system", "content": [{"type": "text", "text": system}]})

    def ask(self, text: str, images: Images = (), **settings: Any) -> Result:
        """The whole answer to one more user turn; settings as `VLM.generate`."""
        return self.stream(text, images, **settings).result

    def stream(self, text: str, images: Images = (), **settings: Any) -> Stream:
        """One more user turn, its answer piece by piece.

        `max_tiles` and `max_visual_tokens` hold for the turns that follow too: a picture tiled anew would
        be encoded and prefilled anew.

        The turn joins the conversation when its answer is complete; a failure leaves it as it was.

        Raises:
            PromptError, ImageError, SettingError, EngineFailure.
        """
        content: list[dict[str, Any]] = [{"type": "image", "image": i} for i in listed(images)]
        if not content and not text.strip():
            raise EmptyPrompt
        content.append({"type": "text", "text": text})
        asked = [*self.messages, {"role": "user", "content": content}]
        given = {name: settings.get(name) for name in ("max_tiles", "max_visual_tokens")}
        self._limits |= {name: limit for name, limit in given.items() if limit is not None}
        every = Settings(**settings | self._limits)
        stream = self._vlm.start(asked, (), True, every, reuse=True)
        return Stream(self._remember(asked, stream), stream.pictures)

    def _remember(self, asked: list[dict[str, Any]], stream: Stream) -> Iterator[str | Result]:
        yield from stream
        result = stream.result
        answer = {"role": "assistant", "content": [{"type": "text", "text": result.text}]}
        self.messages = [*asked, answer]
        yield result
