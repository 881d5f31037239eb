"""Tiny OPT language models with random weights, written and read as transformers does."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tiny

from vlm_edge.export.checkpoint import Checkpoint, TensorRef, Weights
from vlm_edge.export.examples import Example, Examples
from vlm_edge.export.language import opt
from vlm_edge.export.language.interface import decoder_part
from vlm_edge.export.model import Part
from vlm_edge.runtime.manifest import CacheDtype, DecoderSettings

SIZES: dict[str, Any] = dict(
    hidden_size=36, ffn_dim=50, num_hidden_layers=3, num_attention_heads=3, vocab_size=59,
    max_position_embeddings=90,
)  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "pre-norm": {},
    "pre-norm-24": dict(hidden_size=72),  # a head_dim that every attention takes
    "post-norm": dict(do_layer_norm_before=False, hidden_size=40, num_attention_heads=5,
                      tie_word_embeddings=False),
    "as-350m": dict(do_layer_norm_before=False, word_embed_proj_dim=20, hidden_size=48),
    "wide-table": dict(word_embed_proj_dim=44, hidden_size=30, num_attention_heads=1,
                       tie_word_embeddings=False, activation_function="gelu"),
    "galactica": dict(enable_bias=False, layer_norm_elementwise_affine=False, hidden_size=35,
                      num_attention_heads=5, activation_function="gelu"),
    "no-final-norm": dict(_remove_final_layer_norm=True, hidden_size=32, num_attention_heads=2),
    "norms-alone": dict(enable_bias=False, do_layer_norm_before=False, word_embed_proj_dim=25,
                        layer_norm_elementwise_affine=False, tie_word_embeddings=False),
}  # fmt: skip
# Chosen so that greedy tokens vary and are not near-ties.
SALTS = {"pre-norm-24": 2, "post-norm": 8, "as-350m": 2, "no-final-norm": 1}
DTYPES = {"pre-norm-24": "bfloat16", "as-350m": "float16"}


def build(case: str, folder: Path) -> Path:
    """Write the checkpoint of a case."""
    import torch
    import transformers

    config = transformers.OPTConfig(**{**SIZES, **CASES[case]})
    model = transformers.OPTForCausalLM(config)
    generator = torch.Generator().manual_seed(zlib.crc32(case.encode()) + SALTS.get(case, 0))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Positions count as much as what they are added to.
            scale = 2.0 if "embed_positions" in name else 1.0
            parameter.copy_(scale * tiny.draw(name, parameter.shape, generator))
    model.to(getattr(torch, DTYPES.get(case, "float32"))).save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class Subject:
    """A language model as it is exported, and its reference."""

    part: Part
    settings: DecoderSettings
    table: np.ndarray  # float32 [vocab, width]
    reference: Any

    def logits(self, embeds: np.ndarray) -> np.ndarray:
        """The reference's, float32 [n, vocab], for embeds [1, n, width]."""
        import torch

        with torch.inference_mode():
            return self.reference(inputs_embeds=torch.from_numpy(embeds)).logits[0].numpy()

    def embeds(self, count: int, seed: int = 0) -> np.ndarray:
        """float32 [1, count, width]"""
        shape = (1, count, self.settings.width)
        return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)

    def examples(self, embeds: Sequence[np.ndarray], held_out: Sequence[int] = ()) -> Examples:
        return Examples.split(self.settings, [Example(embed) for embed in embeds], held_out)

    def prompts(self, lengths: Sequence[int]) -> list[np.ndarray]:
        return [self.embeds(length, seed) for seed, length in enumerate(lengths)]


def part_of(
    folder: Path, cache_dtype: CacheDtype = "float32"
) -> tuple[Part, DecoderSettings, TensorRef]:
    """The language model of a checkpoint of `build`, its settings and its token table."""
    checkpoint = Checkpoint(folder)
    weights = Weights(checkpoint)
    config, decoder = opt.read(checkpoint.config, cache_dtype), weights.sub("model.decoder")
    table = decoder.sub("embed_tokens")
    part = decoder_part(decoder, table if config.tied else weights.sub("lm_head"), config)
    return part, config.settings(), table.tensor("weight", config.vocab_size, config.width)


def read(folder: Path, cache_dtype: CacheDtype = "float32") -> Subject:
    """A checkpoint of `build`, and its reference."""
    import torch
    import transformers

    torch.set_num_threads(1)  # at these sizes threads only wait for each other
    part, settings, table = part_of(folder, cache_dtype)
    model = transformers.OPTForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return Subject(part, settings, table.numpy(), model)
