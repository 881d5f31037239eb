"""A checkpoint in transformers and float32: the truth the ladder compares with, stage by stage.

What families have in common; each one's own `Reference` is in the file of its architecture's name.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from vlm_edge.errors import ExtraMissing

try:
    import torch
    import transformers
    from transformers import AutoImageProcessor, AutoProcessor
    from transformers.image_utils import load_image
except ImportError as error:
    raise ExtraMissing("verify", error.name or "transformers", "`vlm verify`") from error


@dataclass(frozen=True)
class Inputs:
    """What the checkpoint's processor makes of a prompt."""

    token_ids: list[int]
    tiles: list[np.ndarray]  # of each picture, float32 [tiles, 3, height, width]
    visual_tokens: list[int]  # of each picture
    tensors: Any  # the same as torch tensors, for the model


@dataclass(frozen=True)
class Stages:
    """One forward pass over a prompt, cut open.

    Attributes:
        features: [tiles, tokens, width], what enters the connector; None without images.
        image_features: [tiles, tokens, llm width]; None without images.
        embeddings: [1, n, llm width].
        logits: [vocab] of the last position.
        layers: outputs by layer name, "vision.layers.0" ... and "llm.layers.0" ...
        media: keys and values by the names of the engine media_kv's outputs, [tiles, kv_heads, tokens,
            head_dim]; empty where nothing attends to pictures.
    """

    features: np.ndarray | None
    image_features: np.ndarray | None
    embeddings: np.ndarray
    logits: np.ndarray
    layers: dict[str, np.ndarray]
    media: dict[str, np.ndarray] = field(default_factory=dict)


class Reference:
    """The checkpoint in float32 on the CPU.

    A family says what its model is called, which of its modules the stages are, how its processor lays
    out a prompt's tiles, and how it is run.

    Args:
        source: its folder, or a Hub name.
    """

    model_class: ClassVar[str]  # in transformers
    # modules of `model.model`
    vision: ClassVar[str] = "vision_tower"
    connector: ClassVar[str] = "multi_modal_projector"
    language: ClassVar[str] = "language_model"

    def __init__(self, source: str | Path) -> None:
        with quiet():
            self.processor = self.load_processor(source)
            # Where torchvision is installed its resizing would be used, and differs from Pillow's, with
            # which the checkpoints were made.
            self.processor.image_processor = AutoImageProcessor.from_pretrained(
                source, backend="pil"
            )
            model_class = getattr(transformers, self.model_class)
            model = model_class.from_pretrained(source, dtype=torch.float32)
        self.model = model.eval()
        self.name = f"transformers {transformers.__version__} in float32"

    def load_processor(self, source: str | Path) -> Any:
        """The checkpoint's own."""
        return AutoProcessor.from_pretrained(source)

    def inputs(self, prompt: str, images: Sequence[Path], template: bool) -> Inputs:
        """Through the processor, and its chat template where `template`."""
        pictures = [load_image(str(image)) for image in images]
        special = True
        if template:
            content: list[dict[str, str]] = [{"type": "image"} for _ in images]
            content.append({"type": "text", "text": prompt})
            prompt = self.render(content)
            # as apply_chat_template(tokenize=True) does
            bos = self.processor.tokenizer.bos_token
            special = not (bos is not None and prompt.startswith(bos))
        tensors = self.processor(
            images=pictures or None, text=prompt, return_tensors="pt", add_special_tokens=special
        )
        return Inputs(
            token_ids=tensors["input_ids"][0].tolist(),
            tiles=self.tiles(tensors) if pictures else [],
            visual_tokens=[self.visual_tokens(tensors, index) for index in range(len(pictures))],
            tensors=tensors,
        )

    def render(self, content: list[dict[str, str]]) -> str:
        """A user's message through the chat template."""
        # Blip2Processor drops its folder's template, its tokenizer keeps it.
        processor = self.processor
        renderer = processor if processor.chat_template else processor.tokenizer
        rendered: str = renderer.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        return rendered

    def tiles(self, tensors: Any) -> list[np.ndarray]:
        """The tiles of each picture, float32 [tiles, 3, height, width], without the processor's padding.

        Here each picture is one tile.
        """
        return [tile[None] for tile in tensors["pixel_values"].numpy()]

    def visual_tokens(self, tensors: Any, index: int) -> int:
        """Image tokens that the processor puts into the prompt for picture `index`."""
        places: str = self.processor.replace_image_token(tensors, index)
        return places.count(self.processor.image_token)

    def stages(self, inputs: Inputs) -> Stages:
        """One forward pass with hooks on every stage and layer."""
        found: dict[str, np.ndarray] = {}
        with torch.inference_mode(), hooks() as hook:
            for name, stack in self.stacks().items():
                for index, layer in enumerate(layers_of(stack)):
                    hook(layer, keep(found, f"{name}.layers.{index}"))
            self.hook_stages(hook, found)
            logits = self.forward(inputs)[0, -1].numpy()
        return Stages(
            features=found.pop("features", None),
            image_features=found.pop("image_features", None),
            embeddings=found.pop("embeddings"),
            logits=logits,
            media={name: found.pop(name) for name in list(found) if name.startswith("media.")},
            layers=found,
        )

    def stacks(self) -> dict[str, Any]:
        """The modules that have layers, by the names of the bundle's engines."""
        core = self.model.model
        return {"vision": getattr(core, self.vision), "llm": getattr(core, self.language)}

    def hook_stages(self, hook: Callable[[Any, Any], None], found: dict[str, np.ndarray]) -> None:
        """Let a forward pass leave "features", "image_features" and "embeddings" in `found`."""
        core = self.model.model
        hook(getattr(core, self.connector), keep(found, "image_features", "features"))
        hook(getattr(core, self.language), keep_argument(found, "embeddings", "inputs_embeds"))

    def forward(self, inputs: Inputs) -> Any:
        """Logits [1, n, vocab], of the last position at least."""
        return self.model(**inputs.tensors, logits_to_keep=1).logits

    def greedy(self, inputs: Inputs, new_tokens: int) -> tuple[list[int], np.ndarray]:
        """New tokens, and the logits [new, vocab] each was chosen from, before any penalty."""
        with torch.inference_mode():
            output = self.generate(
                inputs,
                do_sample=False,
                max_new_tokens=new_tokens,
                output_logits=True,
                return_dict_in_generate=True,
            )
        # Before the new tokens stands the prompt, or an encoder-decoder's start token.
        tokens = output.sequences[0, -len(output.logits) :].tolist()
        return tokens, torch.cat(output.logits).float().numpy()

    def generate(self, inputs: Inputs, **settings: Any) -> Any:
        """The model's own `generate`."""
        return self.model.generate(**inputs.tensors, **settings)


def layers_of(stack: Any) -> Any:
    """The stack of transformer layers in a tower or language model, whatever its family calls it."""
    for module in stack.modules():
        if (
            isinstance(module, torch.nn.ModuleList)
            and len(module) == stack.config.num_hidden_layers
        ):
            return module
    raise ValueError(f"{type(stack).__name__} has no list of layers")


def keep(found: dict[str, np.ndarray], output: str, first_input: str | None = None) -> Any:
    """A hook that keeps what a module gives, and what it is called with first."""

    def hook(_module: Any, args: Any, _kwargs: Any, result: Any) -> None:
        found[output] = (result[0] if isinstance(result, tuple) else result).numpy()
        if first_input is not None:
            found[first_input] = args[0].numpy()

    return hook


def keep_argument(found: dict[str, np.ndarray], name: str, argument: str) -> Any:
    """A hook that keeps what a module is called with under a keyword."""

    def hook(_module: Any, _args: Any, kwargs: Any, _result: Any) -> None:
        found[name] = kwargs[argument].numpy()

    return hook


@contextmanager
def hooks() -> Iterator[Callable[[Any, Any], None]]:
    handles: list[Any] = []
    try:
        yield lambda module, hook: handles.append(
            module.register_forward_hook(hook, with_kwargs=True)
        )
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def quiet() -> Iterator[None]:
    """transformers logs what it loads on its own handler; here only its errors are of interest."""
    log = logging.getLogger("transformers")
    before, bars = log.level, transformers.utils.logging.is_progress_bar_enabled()
    log.setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        log.setLevel(before)
        if bars:
            transformers.utils.logging.enable_progress_bar()
