"""OpenFlamingo by its own package, open-flamingo 2.0.1, over models of transformers.

The package needs open_clip, and torch and transformers of its own time, to be imported whole; its model does
not. CLIP is transformers' here: open_clip's tower (2.16 to 2.20) gives, with output_tokens=True, the last layer's
tokens without the class token, before ln_post.
"""

from __future__ import annotations

import sys
import warnings
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np


def package() -> Any:
    """open_flamingo.src with its modules `flamingo`, `flamingo_lm`, `helpers` and `factory`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        missing = "open_clip" not in sys.modules
        if missing:
            sys.modules["open_clip"] = ModuleType("open_clip")
        try:
            from open_flamingo.src import factory, flamingo, flamingo_lm, helpers
        finally:
            if missing:
                del sys.modules["open_clip"]
    return SimpleNamespace(
        factory=factory, flamingo=flamingo, flamingo_lm=flamingo_lm, helpers=helpers
    )


def flamingo(
    clip: Any, language: Any, tokenizer: Any, every: int, rule: str, depth: int, latents: int
) -> Any:
    """The package's Flamingo, put together as its factory does.

    Args:
        clip: CLIPModel or CLIPVisionModel.
        tokenizer: gets OpenFlamingo's tokens.
    """
    import torch
    from torch import nn

    class Visual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.clip = getattr(clip, "vision_model", clip)

        def forward(self, pixels: torch.Tensor) -> tuple[None, torch.Tensor]:
            found = self.clip(pixels, output_hidden_states=True)
            return None, found.hidden_states[-1][:, 1:]

    source = package()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|endofchunk|>", "<image>"]})
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": "<PAD>"})
    source.factory.extend_instance(language, source.flamingo_lm.FlamingoLMMixin)
    language.set_decoder_layers_attr_name(source.factory._infer_decoder_layers_attr_name(language))
    language.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    visual = Visual()
    width = visual.clip.config.hidden_size
    model = source.flamingo.Flamingo(
        SimpleNamespace(visual=visual),
        language,
        tokenizer.convert_tokens_to_ids("<|endofchunk|>"),
        tokenizer.convert_tokens_to_ids("<image>"),
        vis_dim=width,
        cross_attn_every_n_layers=every,
    )
    model.perceiver = source.helpers.PerceiverResampler(dim=width, depth=depth, num_latents=latents)
    for block in model.lang_encoder.gated_cross_attn_layers:
        if block is not None:  # an option that the package's factory does not pass on
            block.attn.only_attend_immediate_media = rule == "immediate"
    return model


def logits(model: Any, ids: list[int], pixels: np.ndarray) -> np.ndarray:
    """float32 [n, vocab] of a whole sequence.

    The package cannot run without a picture. Given one that the text has no place for, all its text sees
    nothing under the rule "immediate", which is what "previous" would mean without any: so it is used then.

    Args:
        pixels: float32 [pictures, 3, height, width].
    """
    import torch

    attentions = [b.attn for b in model.lang_encoder.gated_cross_attn_layers if b is not None]
    rule = attentions[0].only_attend_immediate_media
    for attention in attentions:
        attention.only_attend_immediate_media = rule or model.media_token_id not in ids
    with torch.inference_mode():
        found = model(
            vision_x=torch.from_numpy(pixels)[None, :, None],
            lang_x=torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        )
    for attention in attentions:
        attention.only_attend_immediate_media = rule
    array: np.ndarray = found.logits[0].numpy()
    return array
