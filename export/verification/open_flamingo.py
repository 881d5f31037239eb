"""OpenFlamingo in torch: CLIP and the language model are transformers', the resampler and the gated blocks
are written out here after the papers (arXiv 2204.14198, 2308.01390).

They are no part of transformers, and the package that has them needs a torch of its own time;
tests/test_open_flamingo.py holds both against that package.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors import safe_open
from torch.nn.functional import gelu, layer_norm, linear
from transformers import AutoImageProcessor
from transformers.image_utils import load_image

from vlm_edge.export.checkpoint import Checkpoint
from vlm_edge.export.language.open_flamingo import EPSILON, HEAD_DIM, HEADS
from vlm_edge.export.open_flamingo import IMAGE, OWN, TABLES
from vlm_edge.export.verification.reference import Inputs, Stages, hooks, keep, layers_of, quiet
from vlm_edge.export.verification.reference import Reference as Base

Tensors = dict[str, torch.Tensor]


class Reference(Base):
    """A folder that `export/open_flamingo.py` has put together, in float32."""

    def __init__(self, source: str | Path) -> None:
        checkpoint = Checkpoint(Path(source))
        config, tensors = checkpoint.config.values, _tensors(checkpoint)
        text = config["text_config"]
        own = {name.removeprefix(f"{OWN}."): tensors.pop(name) for name in [*tensors] if _own(name)}
        tables = zip(TABLES[text["model_type"]], ("embed_tokens", "lm_head"), strict=True)
        for stored, name in tables:
            tensors.pop("lm_head.weight" if name == "lm_head" else stored, None)
            if f"{name}.weight" in own:
                tensors[stored] = own.pop(f"{name}.weight")
        vision = transformers.CLIPVisionConfig(**config["vision_config"])
        self._vision = _load(transformers.CLIPVisionModel, vision, tensors)
        settings = transformers.AutoConfig.for_model(**text)
        kind = transformers.AutoModelForCausalLM._model_mapping[type(settings)]
        self.model = _load(kind, settings, tensors)
        self._own, self._config = own, config
        self._pixels = AutoImageProcessor.from_pretrained(source, backend="pil")
        self._tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(source)
        self._latents: torch.Tensor | None = None  # of the prompt's pictures
        self._visible = torch.zeros(0, 0, dtype=torch.bool)  # [n, pictures]
        for index in config["cross_attention_layers"]:
            block = _below(own, f"gated_cross_attn_layers.{index}.")
            layer = layers_of(self.model)[index]
            layer.register_forward_pre_hook(self._before(block), with_kwargs=True)
        self.name = (
            f"torch {torch.__version__} and transformers {transformers.__version__} in float32"
        )

    def inputs(self, prompt: str, images: Sequence[Path], template: bool) -> Inputs:
        """The pictures, then the text."""
        ids = self._tokenizer(IMAGE * len(images) + prompt)["input_ids"]
        opened = [load_image(str(image)) for image in images]
        found = [self._pixels(images=i, return_tensors="np")["pixel_values"] for i in opened]
        return Inputs(
            token_ids=ids,
            tiles=found,
            visual_tokens=[self._config["resampler_n_latents"]] * len(images),
            tensors={"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids))},
        )

    def stages(self, inputs: Inputs) -> Stages:
        found: dict[str, np.ndarray] = {}
        with torch.inference_mode(), hooks() as hook:
            for name, stack in (("vision", self._vision), ("llm", self.model)):
                for index, layer in enumerate(layers_of(stack)):
                    hook(layer, keep(found, f"{name}.layers.{index}"))
            hook(self.model.get_input_embeddings(), keep(found, "embeddings"))
            features = self._see(inputs)
            logits = self.model(**inputs.tensors).logits[0, -1].numpy()
        return Stages(
            features=features,
            image_features=None if self._latents is None else self._latents.numpy(),
            embeddings=found.pop("embeddings"),
            logits=logits,
            layers=found,
            media=self._media(),
        )

    def generate(self, inputs: Inputs, **settings: Any) -> Any:
        self._see(inputs)
        ends = self._tokenizer.convert_tokens_to_ids("<|endofchunk|>")
        return self.model.generate(**inputs.tensors, eos_token_id=ends, **settings)

    def _see(self, inputs: Inputs) -> np.ndarray | None:
        """Encode the pictures, settle who sees which; gives the features [pictures, patches, width]."""
        ids, features = inputs.tensors["input_ids"][0], None
        self._latents, pictures = None, len(inputs.tiles)
        if pictures:
            pixels = torch.from_numpy(np.concatenate(inputs.tiles))
            states = self._vision(pixels, output_hidden_states=True).hidden_states
            features = states[-1][
                :, 1:
            ]  # as open_clip's output_tokens: no class token, no last norm
            self._latents = _resampled(features, _below(self._own, "perceiver."))
        image = self._tokenizer.convert_tokens_to_ids(IMAGE)
        latest = (ids == image).cumsum(0)[:, None]
        order = torch.arange(pictures) + 1
        immediate = self._config["only_attend_immediate_media"]
        self._visible = latest == order if immediate else latest >= order
        return None if features is None else features.numpy()

    def _media(self) -> dict[str, np.ndarray]:
        if self._latents is None:
            return {}
        found = {}
        for number, index in enumerate(self._config["cross_attention_layers"]):
            block = _below(self._own, f"gated_cross_attn_layers.{index}.attn.")
            for kind, name in (("key", "to_k"), ("value", "to_v")):
                array = _heads(linear(self._latents, block[f"{name}.weight"])).numpy()
                found[f"media.{kind}.{number}"] = array
        return found

    def _before(self, block: Tensors) -> Any:
        """A hook that puts the block before a layer."""

        def hook(_layer: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
            if args:
                return (self._gated(args[0], block), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": self._gated(kwargs["hidden_states"], block)}

        return hook

    def _gated(self, x: torch.Tensor, block: Tensors) -> torch.Tensor:
        """[1, s, width] -> same; what `generate` adds sees what the prompt's last token saw (MPT's config
        has no cache, and runs the whole again)."""
        added = x.shape[1] - len(self._visible)
        rows = self._visible[-1:]
        if added >= 0:
            rows = torch.cat([self._visible, rows.expand(added, -1)])
        if self._latents is not None:
            at = _below(block, "attn.")
            media = self._latents.flatten(0, 1)[None]  # [1, pictures * latents, width]
            q = _heads(linear(_norm(x, at, "norm"), at["to_q.weight"])) * HEAD_DIM**-0.5
            k, v = (_heads(linear(media, at[f"{name}.weight"])) for name in ("to_k", "to_v"))
            seen = rows.repeat_interleave(self._latents.shape[1], dim=1)
            scores = (q @ k.mT).masked_fill(~seen, -torch.finfo(torch.float32).max)
            weights = scores.softmax(-1)
            if self._config["only_attend_immediate_media"]:
                weights = weights * rows.any(1)[:, None]
            mixed = linear((weights @ v).transpose(1, 2).flatten(2), at["to_out.weight"])
            x = x + mixed * block["attn_gate"].tanh()
        fed = gelu(linear(_norm(x, block, "ff.0"), block["ff.1.weight"]))
        return x + linear(fed, block["ff.3.weight"]) * block["ff_gate"].tanh()


def _resampled(features: torch.Tensor, weights: Tensors) -> torch.Tensor:
    """[pictures, patches, width] -> [pictures, latents, width]"""
    x = weights["latents"].expand(len(features), -1, -1)
    depth = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
    for index in range(depth):
        at = _below(weights, f"blocks.{index}.0.")
        latents = _norm(x, at, "latents_layer_norm")
        both = torch.cat([_norm(features, at, "context_layer_norm"), latents], dim=1)
        q = _heads(linear(latents, at["q_proj.weight"])) * HEAD_DIM**-0.5
        k, v = (_heads(linear(both, at[f"{name}_proj.weight"])) for name in "kv")
        mixed = ((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + linear(mixed, at["output_proj.weight"])
        ff = _below(weights, f"blocks.{index}.1.")
        x = x + linear(gelu(linear(_norm(x, ff, "ln"), ff["fc.weight"])), ff["c_proj.weight"])
    return _norm(x, weights, "layer_norm")


def _norm(x: torch.Tensor, weights: Tensors, name: str) -> torch.Tensor:
    return layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], EPSILON)


def _heads(x: torch.Tensor) -> torch.Tensor:
    """[batch, n, heads * head_dim] -> [batch, heads, n, head_dim]"""
    return x.unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2)


def _below(weights: Tensors, prefix: str) -> Tensors:
    return {n.removeprefix(prefix): tensor for n, tensor in weights.items() if n.startswith(prefix)}


def _own(name: str) -> bool:
    return name.startswith(f"{OWN}.")


def _tensors(checkpoint: Checkpoint) -> Tensors:
    found: Tensors = {}
    for path in checkpoint.files():
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118  # a file of safetensors is no mapping
                tensor = file.get_tensor(name)
                found[name] = tensor.float() if tensor.is_floating_point() else tensor
    return found


def _load(kind: Any, config: Any, tensors: Tensors) -> Any:
    """The model with those of the tensors that are its own."""
    with quiet():  # about those that are another model's
        model = kind.from_pretrained(None, config=config, state_dict=dict(tensors))
    return model.eval()
