"""LLaVA in transformers and float32: the truth the ladder compares with, stage by stage."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vlm_edge.errors import ExtraMissing

try:
    import torch
    import transformers
    from transformers import AutoImageProcessor, AutoProcessor, LlavaForConditionalGeneration
    from transformers.image_utils import load_image
except ImportError as error:
    raise ExtraMissing("verify", error.name or "transformers", "`vlm verify`") from error


@dataclass(frozen=True)
class Inputs:
    """What the checkpoint's processor makes of a prompt."""

    token_ids: list[int]
    pixels: np.ndarray | None  # float32 [tiles, 3, height, width]
    tensors: Any  # the same as torch tensors, for the model


@dataclass(frozen=True)
class Stages:
    """One forward pass over a prompt, cut open.

    Attributes:
        features: [tiles, tokens, width], what enters the projector; None without images.
        image_features: [tiles, tokens, llm width]; None without images.
        embeddings: [1, n, llm width].
        logits: [vocab] of the last position.
        layers: outputs by layer name, "vision.layers.0" ... and "llm.layers.0" ...
    """

    features: np.ndarray | None
    image_features: np.ndarray | None
    embeddings: np.ndarray
    logits: np.ndarray
    layers: dict[str, np.ndarray]


class Reference:
    """The checkpoint in float32 on the CPU.

    Args:
        source: its folder, or a Hub name.
    """

    def __init__(self, source: str | Path) -> None:
        with _quiet():
            self.processor = AutoProcessor.from_pretrained(source)
            # Where torchvision is installed its resizing would be used, and differs from Pillow's, with
            # which the checkpoints were made.
            self.processor.image_processor = AutoImageProcessor.from_pretrained(
                source, backend="pil"
            )
            model = LlavaForConditionalGeneration.from_pretrained(source, dtype=torch.float32)
        self.model = model.eval()
        self.name = f"transformers {transformers.__version__} in float32"

    def inputs(self, prompt: str, images: Sequence[Path], template: bool) -> Inputs:
        """Through the processor, and its chat template where `template`."""
        pictures = [load_image(str(image)) for image in images]
        special = True
        if template:
            content: list[dict[str, str]] = [{"type": "image"} for _ in images]
            content.append({"type": "text", "text": prompt})
            prompt = self.processor.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
            )
            # as apply_chat_template(tokenize=True) does
            bos = self.processor.tokenizer.bos_token
            special = not (bos is not None and prompt.startswith(bos))
        tensors = self.processor(
            images=pictures or None, text=prompt, return_tensors="pt", add_special_tokens=special
        )
        pixels = tensors.get("pixel_values")
        return Inputs(
            tensors["input_ids"][0].tolist(), None if pixels is None else pixels.numpy(), tensors
        )

    def stages(self, inputs: Inputs) -> Stages:
        """One forward pass with hooks on every stage and layer."""
        found: dict[str, np.ndarray] = {}
        core = self.model.model
        with torch.inference_mode(), _hooks() as hook:
            for name, stack in (("vision", core.vision_tower), ("llm", core.language_model)):
                for index, layer in enumerate(_layers(stack)):
                    hook(layer, _keep(found, f"{name}.layers.{index}"))
            hook(core.multi_modal_projector, _keep(found, "image_features", "features"))
            hook(core.language_model, _keep_embeddings(found))
            logits = self.model(**inputs.tensors, logits_to_keep=1).logits[0, -1].numpy()
        return Stages(
            features=found.pop("features", None),
            image_features=found.pop("image_features", None),
            embeddings=found.pop("embeddings"),
            logits=logits,
            layers=found,
        )

    def greedy(self, inputs: Inputs, new_tokens: int) -> tuple[list[int], np.ndarray]:
        """New tokens, and the logits [new, vocab] each was chosen from, before any penalty."""
        with torch.inference_mode():
            output = self.model.generate(
                **inputs.tensors,
                do_sample=False,
                max_new_tokens=new_tokens,
                output_logits=True,
                return_dict_in_generate=True,
            )
        tokens = output.sequences[0, len(inputs.token_ids) :].tolist()
        return tokens, torch.cat(output.logits).float().numpy()


def _layers(stack: Any) -> Any:
    """The stack of transformer layers in a tower or language model, whatever its family calls it."""
    for module in stack.modules():
        if (
            isinstance(module, torch.nn.ModuleList)
            and len(module) == stack.config.num_hidden_layers
        ):
            return module
    raise ValueError(f"{type(stack).__name__} has no list of layers")


def _keep(found: dict[str, np.ndarray], output: str, first_input: str | None = None) -> Any:
    def hook(_module: Any, args: Any, _kwargs: Any, result: Any) -> None:
        found[output] = (result[0] if isinstance(result, tuple) else result).numpy()
        if first_input is not None:
            found[first_input] = args[0].numpy()

    return hook


def _keep_embeddings(found: dict[str, np.ndarray]) -> Any:
    def hook(_module: Any, _args: Any, kwargs: Any, _result: Any) -> None:
        found["embeddings"] = kwargs["inputs_embeds"].numpy()

    return hook


@contextmanager
def _hooks() -> Iterator[Callable[[Any, Any], None]]:
    handles: list[Any] = []
    try:
        yield lambda module, hook: handles.append(
            module.register_forward_hook(hook, with_kwargs=True)
        )
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _quiet() -> Iterator[None]:
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
