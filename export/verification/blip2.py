"""BLIP-2 in transformers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from vlm_edge.export.verification.reference import Inputs, Stages, keep, keep_argument
from vlm_edge.export.verification.reference import Reference as Base


class Reference(Base):
    """`Blip2ForConditionalGeneration`. It wants an image; a prompt without one goes to its language model
    alone."""

    model_class = "Blip2ForConditionalGeneration"

    def inputs(self, prompt: str, images: Sequence[Path], template: bool) -> Inputs:
        """Of several images its processor makes places for one; the others' stand in front too, since the
        model fills as many as there are."""
        found = super().inputs(prompt, images, template)
        if len(images) < 2:
            return found
        import torch

        tensors, config = dict(found.tensors), self.model.config
        more = torch.full((1, (len(images) - 1) * config.num_query_tokens), config.image_token_id)
        ids = torch.cat([more, tensors["input_ids"]], 1)
        tensors |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        for name in ("qformer_input_ids", "qformer_attention_mask"):
            if name in tensors:
                tensors[name] = tensors[name].expand(len(images), -1)
        return Inputs(ids[0].tolist(), found.tiles, found.visual_tokens, tensors)

    def visual_tokens(self, tensors: Any, index: int) -> int:
        """As many as the Q-Former has queries, whatever the image."""
        return int(self.model.config.num_query_tokens)

    def stages(self, inputs: Inputs) -> Stages:
        """Where inputs_embeds are narrower than the projection (OPT), the model fills an image's places
        with the projection's values in their flat order, as far as they go."""
        stages = super().stages(inputs)
        tokens, width = stages.image_features, stages.embeddings.shape[-1]
        if tokens is None or tokens.shape[-1] == width:
            return stages
        count = tokens.shape[1]
        flat = tokens.reshape(len(tokens), -1)[:, : count * width]
        return replace(stages, image_features=flat.reshape(-1, count, width))

    def stacks(self) -> dict[str, Any]:
        model, language = self.model, self.model.language_model
        images = {"vision": model.vision_model, "connector": model.qformer}
        if language.config.is_encoder_decoder:
            return images | {"llm_encoder": language.encoder, "llm": language.decoder}
        return images | {"llm": language.get_decoder()}

    def hook_stages(self, hook: Callable[[Any, Any], None], found: dict[str, np.ndarray]) -> None:
        model = self.model
        hook(model.qformer, keep_argument(found, "features", "encoder_hidden_states"))
        hook(model.language_projection, keep(found, "image_features"))
        hook(model.language_model, keep_argument(found, "embeddings", "inputs_embeds"))

    def forward(self, inputs: Inputs) -> Any:
        import torch

        language, more = self.model.language_model, {}
        if language.config.is_encoder_decoder:
            start = language.generation_config.decoder_start_token_id
            more["decoder_input_ids"] = torch.tensor([[start]])
        if inputs.tiles:
            return self.model(**inputs.tensors, **more).logits
        embeds = language.get_input_embeddings()(inputs.tensors["input_ids"])
        return language(inputs_embeds=embeds, **more).logits

    def generate(self, inputs: Inputs, **settings: Any) -> Any:
        if inputs.tiles:
            return super().generate(inputs, **settings)
        text = {name: inputs.tensors[name] for name in ("input_ids", "attention_mask")}
        return self.model.language_model.generate(**text, **settings)
