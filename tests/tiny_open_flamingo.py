"""Tiny OpenFlamingos with random weights: the three pieces as users have them, put together by
`vlm_edge.export.open_flamingo`.

The model is made by the package's own classes (open_flamingo_reference.py), and checkpoint.pt is what its
training would save: names under the layers they stand before, the table, buffers, and of GPT-NeoX the head.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from open_flamingo_reference import flamingo
from tiny import VISION, draw
from tokens import tokenizer_of

from vlm_edge.export.open_flamingo import Rule, assemble

LLAMA: dict[str, Any] = dict(
    hidden_size=48, intermediate_size=70, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=160, rms_norm_eps=1e-3,
)  # fmt: skip
NEOX: dict[str, Any] = dict(
    hidden_size=48, intermediate_size=70, num_hidden_layers=4, num_attention_heads=3,
    max_position_embeddings=160, layer_norm_eps=1e-3, rotary_pct=0.25,
)  # fmt: skip
MPT: dict[str, Any] = dict(
    d_model=48, n_layers=4, n_heads=3, max_seq_len=160, layer_norm_epsilon=1e-3
)
SIZES = {"llama": LLAMA, "gpt_neox": NEOX, "mpt": MPT}
NAMES = {"llama": "Llama", "gpt_neox": "GPTNeoX", "mpt": "Mpt"}


@dataclass(frozen=True)
class TinyOpenFlamingo:
    """One model: what differs from the sizes above, and how its pieces are written.

    Attributes:
        saved: checkpoint.pt is what training saves, the state dict alone, or that with the blocks under
            their other name and a wrapper's prefix, as the first version wrote it.
        depth, latents: of the resampler; the package always has 6 and 64.
    """

    text: Literal["llama", "gpt_neox", "mpt"] = "llama"
    text_args: dict[str, Any] = field(default_factory=dict)
    vision_args: dict[str, Any] = field(default_factory=dict)
    every: int = 1
    rule: Rule = "immediate"
    tokenizer: Literal["pieces", "bytes"] = "pieces"
    saved: Literal["training", "state", "first"] = "training"
    whole_clip: bool = True  # CLIPModel, not its vision tower alone
    depth: int = 2
    latents: int = 5
    dtype: str = "float32"
    shard: str = "5GB"
    salt: int = 0


OPEN_FLAMINGO_CASES: dict[str, TinyOpenFlamingo] = {
    "llama": TinyOpenFlamingo(every=2),
    "llama-first": TinyOpenFlamingo(
        rule="previous", saved="first", whole_clip=False, dtype="bfloat16", shard="60KB",
        text_args=dict(num_hidden_layers=5, tie_word_embeddings=True), every=3, depth=1, latents=1,
        vision_args=dict(hidden_act="gelu")),
    "llama-every": TinyOpenFlamingo(tokenizer="bytes", saved="state", rule="previous", latents=7, salt=1),
    "gpt_neox": TinyOpenFlamingo(text="gpt_neox", tokenizer="bytes", every=2),  # as Pythia
    "gpt_neox-serial": TinyOpenFlamingo(  # as RedPajama-INCITE-3B
        text="gpt_neox", tokenizer="bytes", rule="previous", dtype="float16",
        text_args=dict(rotary_pct=1.0, use_parallel_residual=False, num_attention_heads=4)),
    "mpt": TinyOpenFlamingo(text="mpt", tokenizer="bytes", every=4),  # as MPT-7B
    "mpt-clip": TinyOpenFlamingo(
        text="mpt", tokenizer="bytes", every=2, rule="previous", shard="60KB",
        text_args=dict(n_heads=4, attn_config=dict(clip_qkv=0.7))),
}  # fmt: skip


@dataclass(frozen=True)
class Pieces:
    """A model of the package, and the folders and file it was saved as."""

    model: Any
    tokenizer: Any
    vision: Path
    language: Path
    checkpoint: Path


def build_pieces(name: str, folder: Path, spec: TinyOpenFlamingo | None = None) -> Pieces:
    """The pieces of OPEN_FLAMINGO_CASES[name] (or of `spec`) below `folder`, and the model itself."""
    import torch
    import transformers

    spec = spec or OPEN_FLAMINGO_CASES[name]
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + spec.salt)
    dtype = getattr(torch, spec.dtype)
    tokenizer = tokenizer_of(spec.tokenizer)
    clip = _clip(spec)
    config = getattr(transformers, f"{NAMES[spec.text]}Config")(
        **{**SIZES[spec.text], "vocab_size": len(tokenizer) + 7, **spec.text_args},
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    language = getattr(transformers, f"{NAMES[spec.text]}ForCausalLM")(config)
    for module in (clip, language):
        _fill(module, dtype, generator)
    paths = folder / "clip", folder / "language", folder / "checkpoint.pt"
    clip.save_pretrained(paths[0])
    transformers.CLIPImageProcessorPil(
        size={"shortest_edge": 30}, crop_size={"height": 30, "width": 30}
    ).save_pretrained(paths[0])
    language.save_pretrained(paths[1], max_shard_size=spec.shard)
    tokenizer.save_pretrained(paths[1])
    model = flamingo(clip, language, tokenizer, spec.every, spec.rule, spec.depth, spec.latents)
    trained = (model.perceiver, model.lang_encoder.gated_cross_attn_layers)
    for module in trained:
        _fill(module, dtype, generator)
    _fill_new_rows(model.lang_encoder, config.vocab_size, dtype, generator)
    torch.save(_saved(model, spec), paths[2])
    return Pieces(model.eval(), tokenizer, *paths)


def build_open_flamingo(name: str, folder: Path, spec: TinyOpenFlamingo | None = None) -> Path:
    """The pieces below `folder`, put together in its sub-folder `whole`."""
    spec = spec or OPEN_FLAMINGO_CASES[name]
    return whole(build_pieces(name, folder, spec), folder / "whole", spec.rule)


def whole(pieces: Pieces, output: Path, rule: Rule) -> Path:
    return assemble(pieces.vision, pieces.language, pieces.checkpoint, output, rule)


def _clip(spec: TinyOpenFlamingo) -> Any:
    import transformers

    vision = {**VISION["clip"], **spec.vision_args}
    if not spec.whole_clip:
        return transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**vision))
    text = dict(hidden_size=12, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1)
    return transformers.CLIPModel(
        transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    )


def _fill(module: Any, dtype: Any, generator: Any) -> None:
    """Random values that `dtype` holds exactly; stored as such."""
    import torch

    with torch.no_grad():
        for name, parameter in module.named_parameters():
            values = _draw(name, parameter.shape, generator)
            parameter.copy_(values.to(dtype).float())


def _draw(name: str, shape: Any, generator: Any) -> Any:
    import torch

    if name.endswith("_gate") or not shape:  # gates of both signs, neither shut nor wide open
        return 0.8 * torch.randn(shape, generator=generator)
    noise = draw(name, shape, generator)
    if name.endswith("latents"):
        return noise * shape[-1] ** 0.5 / 1.5
    if "embed_in" in name or "wte" in name:
        return 0.4 * torch.randn(shape, generator=generator)
    if "embed_out" in name:
        return noise * 2
    return noise


def _fill_new_rows(language: Any, count: int, dtype: Any, generator: Any) -> None:
    """Of the table what training gives them; of the head, which is not trained, zeros."""
    import torch

    table, head = language.get_input_embeddings(), language.get_output_embeddings()
    with torch.no_grad():
        rows = 0.4 * torch.randn(table.weight[count:].shape, generator=generator)
        table.weight[count:] = rows.to(dtype).float()
        if head.weight is not table.weight:
            head.weight[count:] = 0


def _saved(model: Any, spec: TinyOpenFlamingo) -> dict[str, Any]:
    """As train_utils.filter_state_dict_to_trainable leaves it: what is trained, tables, buffers."""
    import torch

    dtype = getattr(torch, spec.dtype)
    language = model.lang_encoder
    embeddings = {"embed_tokens.weight", "embed_in.weight", "wte.weight", "embed_out.weight"}

    def kept(name: str) -> bool:
        if "vision_encoder" in name or "old_decoder_blocks" in name:
            return False
        first = "lang_encoder.gated_cross_attn_layers" in name
        block = first if spec.saved == "first" else ".gated_cross_attn_layer." in name
        return block or name.startswith("perceiver") or any(name.endswith(e) for e in embeddings)

    state = {name: tensor.to(dtype) for name, tensor in model.state_dict().items() if kept(name)}
    layers = language.decoder_layers_attr_name
    state[f"lang_encoder.{layers}.0.decoder_layer.rotary_emb.inv_freq"] = torch.ones(3)
    if spec.saved == "first":
        return {f"module.{name}": tensor for name, tensor in state.items()}
    if spec.saved == "state":
        return state
    return {"epoch": 3, "model_state_dict": state, "optimizer_state_dict": {}}
