"""Tiny T5 checkpoints with random weights, drawn so that a wrong detail shows (tests/tiny.py)."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tiny import draw

from vlm_edge.export.checkpoint import Checkpoint, Weights
from vlm_edge.export.language import t5, t5_encoder
from vlm_edge.export.language.interface import decoder_part
from vlm_edge.export.model import Part
from vlm_edge.runtime.manifest import CacheDtype

SIZES: dict[str, Any] = dict(
    vocab_size=61, d_model=30, d_kv=7, d_ff=44, num_layers=2, num_decoder_layers=3, num_heads=3,
    layer_norm_epsilon=1e-3, decoder_start_token_id=0, eos_token_id=1, pad_token_id=0,
)  # fmt: skip


@dataclass(frozen=True)
class TinyT5:
    """What differs from the sizes above. `own_head`: a head beside the token table."""

    config: dict[str, Any] = field(default_factory=dict)
    own_head: bool = True
    salt: int = 0


CASES: dict[str, TinyT5] = {
    "flan": TinyT5(  # gated, a head of its own, nothing scaled; BLIP-2's activation
        dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False), salt=1),
    "flan-gelu": TinyT5(
        dict(feed_forward_proj="gated-gelu", dense_act_fn="gelu", tie_word_embeddings=False,
             relative_attention_num_buckets=12, relative_attention_max_distance=20, num_heads=5,
             d_kv=4, num_layers=3, num_decoder_layers=1)),
    "plain": TinyT5(  # the first T5: one product, tied, scaled
        dict(feed_forward_proj="relu", relative_attention_num_buckets=8,
             relative_attention_max_distance=20, num_heads=1, d_kv=16, num_layers=5,
             num_decoder_layers=4), own_head=False, salt=24),
    "silu": TinyT5(
        dict(feed_forward_proj="gated-silu", tie_word_embeddings=False, num_layers=1,
             relative_attention_num_buckets=9, relative_attention_max_distance=11),
        own_head=False, salt=21),
    "scaled-own": TinyT5(dict(feed_forward_proj="gelu", num_layers=4, num_decoder_layers=2), salt=4),
}  # fmt: skip


def build(case: TinyT5, folder: Path) -> Path:
    """Write the checkpoint as transformers does."""
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(**{**SIZES, **case.config})
    model = T5ForConditionalGeneration(config)
    if case.own_head:
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
    generator = torch.Generator().manual_seed(case.salt)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(draw(name, parameter.shape, generator) * scale_of(name, case, config))
    model.save_pretrained(folder)
    return folder


def scale_of(name: str, case: TinyT5, config: Any) -> float:
    """What T5 asks of `tiny.draw`: scores are not scaled, outputs may be, and answers are to vary (with
    tied weights a large table makes every model repeat its last token)."""
    if name.endswith(".q.weight"):
        return config.d_kv**-0.5
    if config.scale_decoder_outputs and not case.own_head:
        return {"shared.weight": 0.3, "decoder.final_layer_norm.weight": 10}.get(name, 1.0)
    if name == "lm_head.weight" and config.scale_decoder_outputs:
        return config.d_model**0.5
    return 2.0 if name == "shared.weight" else 1.0


def parts(folder: Path, cache_dtype: CacheDtype = "float32") -> tuple[t5.T5Config, dict[str, Part]]:
    """Settings and engines of a checkpoint that holds nothing but a T5."""
    checkpoint = Checkpoint(folder)
    weights = Weights(checkpoint)
    config = t5.read(checkpoint.config, weights, cache_dtype)
    head = weights.sub("shared" if config.tied else "lm_head")
    decoder = decoder_part(weights, head, config)
    return config, {"llm_encoder": t5_encoder.encoder_part(weights, config), "llm": decoder}


def table(folder: Path, config: t5.T5Config) -> np.ndarray:
    """The token table, float32 [vocab, width]."""
    return Checkpoint(folder).tensor("shared.weight", (config.vocab_size, config.width)).numpy()


def prompt(config: t5.T5Config, count: int, seed: int = 0) -> np.ndarray:
    """inputs_embeds float32 [1, count, width]"""
    shape = (1, count, config.width)
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
