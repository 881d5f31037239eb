"""VLM: a bundle's engines stitched together, from a prompt with images to streamed text."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vlm_edge.errors import ContextOverflow, EngineFailure, SettingError
from vlm_edge.runtime.bundle import Bundle
from vlm_edge.runtime.encode import Encoded, ImageEncoder
from vlm_edge.runtime.engine import open_engines
from vlm_edge.runtime.images import ImageInput
from vlm_edge.runtime.inputs import PromptInputs, prompt_inputs
from vlm_edge.runtime.messages import Prompt
from vlm_edge.runtime.picture import Picture
from vlm_edge.runtime.plans import PlanStore
from vlm_edge.runtime.preprocess import check_size
from vlm_edge.runtime.prompt import BuiltPrompt, build_prompt
from vlm_edge.runtime.sampling import Sampler, StopStrings
from vlm_edge.runtime.settings import Settings
from vlm_edge.runtime.splice import shared_prefix
from vlm_edge.runtime.template import ChatTemplate
from vlm_edge.runtime.tiling.plan import UNLIMITED, TileLimits, TilePlan
from vlm_edge.runtime.timings import Stopwatch, Timings
from vlm_edge.runtime.tokenizer import Detokenizer, Tokenizer

if TYPE_CHECKING:
    from vlm_edge.runtime.chat import Chat

Images = Sequence[ImageInput] | ImageInput


@dataclass(frozen=True)
class Result:
    """An answer.

    Attributes:
        text: without special tokens and without the stop string.
        token_ids: new tokens, the end-of-sequence token included where it came.
        prompt_tokens: in the prompt, visual ones included.
        visual_tokens: of these, visual.
        finish_reason: "stop" (end of sequence), "stop_string" or "length".
        timings: what each stage cost.
        plans: how each image was tiled.
    """

    text: str
    token_ids: list[int]
    prompt_tokens: int
    visual_tokens: int
    finish_reason: str
    timings: Timings
    plans: list[TilePlan]


class Stream:
    """Text as it is generated; after the last piece `result` holds the whole answer.

    Attributes:
        pictures: the prompt's images and how each is tiled, known before the first piece.
    """

    def __init__(self, pieces: Iterator[str | Result], pictures: Sequence[Picture]) -> None:
        self._pieces, self.pictures = pieces, pictures
        self._result: Result | None = None

    def __iter__(self) -> Iterator[str]:
        for piece in self._pieces:
            if isinstance(piece, Result):
                self._result = piece
            elif piece:
                yield piece

    @property
    def result(self) -> Result:
        """The answer; generates whatever has not been iterated over yet."""
        for _ in self:
            pass
        if self._result is None:
            raise RuntimeError("the stream was closed before the answer was complete")
        return self._result


class VLM:
    """A vision-language model ready to answer. Made by `VLM.load`; not for use by several threads."""

    def __init__(
        self,
        bundle: Bundle,
        device: str,
        threads: int | None,
        plans: PlanStore | None = None,
        check: bool = True,
    ) -> None:
        self.bundle, self.manifest, self.device = bundle, bundle.manifest, device
        prompt = self.manifest.prompt
        self.tokenizer = Tokenizer(bundle.file("tokenizer.json"))
        self.template = None
        if prompt.chat_template is not None:
            source = bundle.file(prompt.chat_template).read_text(encoding="utf-8")
            self.template = ChatTemplate(source, prompt.special_tokens)
        self.embeddings = bundle.embeddings()
        self._engines, self.decoder = open_engines(bundle, device, threads, plans, check)
        self.vision, self.connector = self._engines["vision"], self._engines.get("connector")
        self.media_kv = self._engines.get("media_kv")
        self.tiler, self.instruction = bundle.tiler(), bundle.instruction()
        self.images = ImageEncoder(
            self._engines,
            self.manifest.image,
            self.tiler,
            instructed=self.instruction is not None,
        )
        self._cached: list[int] = []  # keys of the positions in the decoder's cache
        self._turn = 0  # answers started: the cache belongs to the latest
        self.load_s = 0.0

    @classmethod
    def load(
        cls,
        bundle: str | Path,
        device: str = "cpu",
        threads: int | None = None,
        check: bool = True,
        plans: str | Path | None = None,
    ) -> VLM:
        """Open a bundle on a device.

        Args:
            bundle: the folder `vlm export` wrote.
            device: "cpu"; "cuda", ONNX Runtime on an NVIDIA GPU; "tensorrt" or "tensorrt-rtx", with the
                plans that `vlm build` made. One that is absent is an error, never replaced by another.
            threads: of the CPU, per operator; None takes all processors this process may use.
            check: compare every file of the bundle, and every plan, with its sha256.
            plans: the folder of TensorRT plans; None is the one beside the bundle.

        Raises:
            BundleError, DeviceError, SettingError, ExtraMissing.
        """
        begin = time.perf_counter()
        whole = isinstance(threads, int) and not isinstance(threads, bool)
        most = 4 * (os.cpu_count() or 1)  # more only wait for each other
        if threads is not None and (not whole or not 1 <= threads <= most):
            raise SettingError(
                f"threads = {threads!r}; it should be a whole number from 1 to {most}"
            )
        store = None if plans is None else PlanStore(plans)
        vlm = cls(Bundle(bundle, check), device, threads, store, check)
        vlm.load_s = time.perf_counter() - begin
        return vlm

    # -- answers ----------------------------------------------------------------------------

    def generate(
        self, prompt: Prompt, images: Images = (), template: bool = True, **settings: Any
    ) -> Result:
        """The whole answer at once; arguments as `stream`."""
        return self.stream(prompt, images, template, **settings).result

    def stream(
        self, prompt: Prompt, images: Images = (), template: bool = True, **settings: Any
    ) -> Stream:
        """Answer a prompt piece by piece.

        Args:
            prompt: a text; chat messages (OpenAI or Hugging Face content parts); or texts and images
                in turn (there an image is a path object, bytes or Pillow image, never a str).
            images: paths, bytes or Pillow images, for the prompt's image places in order.
            template: through the checkpoint's chat template; False takes the prompt verbatim, with
                its own image placeholders.
            settings: max_new_tokens, temperature, top_p, top_k, repetition_penalty, stop, ignore_eos,
                seed, max_tiles, max_visual_tokens (`Settings`).

        Raises:
            PromptError, ImageError, SettingError, EngineFailure.
        """
        return self.start(prompt, images, template, Settings(**settings), reuse=False)

    def start(
        self, prompt: Prompt, images: Images, template: bool, settings: Settings, reuse: bool
    ) -> Stream:
        """`stream`, with the choice to re-use what the cache shares with this prompt."""
        # All that can be wrong with the call is found here, before the first piece is asked for.
        watch = Stopwatch()
        penalty = settings.repetition_penalty
        if penalty is None:
            penalty = self.manifest.generation.repetition_penalty
        sampler = Sampler(
            settings.temperature, settings.top_p, settings.top_k, penalty, settings.seed
        )
        stops = StopStrings(() if settings.stop is None else settings.stop)
        with watch.stage("preprocess"):
            built = self.build_prompt(prompt, images, template, settings.limits)
        limit = self.manifest.decoder.max_positions
        if limit is not None and len(built.token_ids) + settings.max_new_tokens > limit:
            raise ContextOverflow(len(built.token_ids), settings.max_new_tokens, limit)
        self.decoder.check_room(len(built.token_ids), settings.max_new_tokens)
        answer = self._answer(built, sampler, stops, settings, watch, reuse)
        return Stream(answer, built.pictures)

    def _answer(
        self,
        built: BuiltPrompt,
        sampler: Sampler,
        stops: StopStrings,
        settings: Settings,
        watch: Stopwatch,
        reuse: bool,
    ) -> Iterator[str | Result]:
        ends = () if settings.ignore_eos else self.manifest.generation.eos_token_ids
        self._turn += 1
        turn = self._turn
        encoded = self._encode(built, watch)
        with watch.stage("prefill"):
            logits, prefilled = self._prefill(built, encoded, reuse)
            ids = self.decoder.history(built.token_ids)
            token = self._pick(sampler, logits, ids)
        ttft = watch.elapsed_ms()
        detokenizer = Detokenizer(self.tokenizer)
        new: list[int] = []
        text, reason = "", "length"
        while True:
            new.append(token)
            ids.append(token)
            piece = stops.push(detokenizer.push(token))
            text += piece
            yield piece
            if stops.stopped or token in ends:
                reason = "stop_string" if stops.stopped else "stop"
                break
            if len(new) == settings.max_new_tokens:
                break
            if turn != self._turn:
                raise SettingError(
                    "another answer was started on this VLM; finish one stream before the next"
                )
            with watch.stage("decode"):
                logits = self.decoder.decode(self.embeddings.row(token))
                token = self._pick(sampler, logits, ids)
            self._cached.append(ids[-1])
        complete = stops.stopped
        if not complete:
            piece = stops.push(detokenizer.flush())
            if stops.stopped:
                reason = "stop_string"
            piece += stops.flush()
            text += piece
            yield piece
        spent = watch.spent
        timings = Timings(
            preprocess_ms=spent.get("preprocess", 0.0),
            vision_ms=spent.get("vision", 0.0),
            connector_ms=spent.get("connector", 0.0),
            prefill_ms=spent["prefill"],
            decode_ms=spent.get("decode", 0.0),
            ttft_ms=ttft,
            prompt_tokens=len(built.token_ids),
            prefilled_tokens=prefilled,
            new_tokens=len(new),
            images=len(built.pictures),
        )
        plans = [picture.plan for picture in built.pictures]
        yield Result(text, new, len(built.token_ids), built.visual_tokens, reason, timings, plans)

    def chat(self, system: str | None = None) -> Chat:
        """A conversation; each turn re-uses what the cache holds of the turns before."""
        from vlm_edge.runtime.chat import Chat

        return Chat(self, system)

    # -- stages, each callable by itself (verification, calibration) --------------------------

    def build_prompt(
        self,
        prompt: Prompt,
        images: Images = (),
        template: bool = True,
        limits: TileLimits = UNLIMITED,
    ) -> BuiltPrompt:
        """Token ids with one place per visual token, and the pictures for those places, in order."""
        built = build_prompt(
            prompt,
            images,
            self.manifest.prompt,
            self.tokenizer,
            self.template,
            self.tiler,
            use_template=template,
            limits=limits,
            instruction=self.instruction,
        )
        for picture in built.pictures:
            plan, name = picture.plan, picture.decoded.name
            check_size(plan.width, plan.height, self.manifest.image, plan.sheets, name)
        return built

    def pixels(self, picture: Picture) -> np.ndarray:
        """float32 [tiles, 3, height, width] as the checkpoint's processor makes them."""
        return self.images.pixels(picture)

    def encode(self, picture: Picture, instruction: Sequence[int] | None = None) -> Encoded:
        """A picture as the language model takes it (`ImageEncoder.encode`)."""
        return self.images.encode(picture, instruction)

    def embed(self, built: BuiltPrompt) -> np.ndarray:
        """inputs_embeds float32 [1, n, width]: token rows, visual tokens in their places."""
        return self.inputs(built).embeds

    def inputs(self, built: BuiltPrompt) -> PromptInputs:
        """All that the decoder reads of a prompt."""
        return self._inputs(built, self._encode(built, Stopwatch()))

    def count_tokens(
        self,
        width: int,
        height: int,
        max_tiles: int | None = None,
        max_visual_tokens: int | None = None,
    ) -> int:
        """Visual tokens an image of this size (pixels) takes in the prompt, from the settings alone.

        Raises:
            SettingError: a size or bound that is not a positive number.
            ImageError: the model cannot take such an image, or keep the bounds.
        """
        sides = (width, height)
        if not all(isinstance(side, int) and side > 0 for side in sides):
            raise SettingError(f"an image of {width}x{height} pixels has no tokens")
        plan = self.tiler.plan(width, height, TileLimits(max_tiles, max_visual_tokens))
        check_size(width, height, self.manifest.image, plan.sheets, f"of {width}x{height}")
        return plan.tokens

    def clear_image_cache(self) -> None:
        """Forget encoded images, so that the next use encodes them again."""
        self.images.clear()

    def close(self) -> None:
        """Give back the engines' memory."""
        for engine in self._engines.values():
            engine.close()
        self.decoder.close()

    def __enter__(self) -> VLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _pick(self, sampler: Sampler, logits: np.ndarray, ids: list[int]) -> int:
        try:
            return sampler.pick(logits, ids)
        except EngineFailure:  # not finite: nor is what made them, and it is in the cache
            self.decoder.clear()
            self._cached.clear()
            raise

    def _encode(self, built: BuiltPrompt, watch: Stopwatch) -> list[Encoded]:
        return [self.images.encode(picture, built.instruction, watch) for picture in built.pictures]

    def _inputs(self, built: BuiltPrompt, encoded: Sequence[Encoded]) -> PromptInputs:
        settings = self.manifest
        token = settings.prompt.image_token_id
        return prompt_inputs(built, encoded, token, settings.decoder, self.embeddings)

    def _prefill(
        self, built: BuiltPrompt, encoded: Sequence[Encoded], reuse: bool
    ) -> tuple[np.ndarray, int]:
        """Logits [vocab] of the last prompt position, and how many positions were computed."""
        inputs = self._inputs(built, encoded)
        reuse = reuse and self.decoder.keeps_prefix
        kept = shared_prefix(np.array(self._cached, np.int64), inputs.keys) if reuse else 0
        new = inputs.after(kept)
        # Should the engine fail below, the rest is not trusted.
        self._cached = inputs.keys[:kept].tolist()
        self.decoder.length = kept
        if new.media is not None:
            self.decoder.attend(new.media)
        logits = self.decoder.prefill(new.embeds)
        self._cached = inputs.keys.tolist()
        return logits, new.embeds.shape[1]
