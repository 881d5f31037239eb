"""A BLIP-2 or InstructBLIP checkpoint of real shape with random weights, to measure memory and time.

    python -m vlm_edge.benchmarks.blip2_checkpoint FOLDER --language flan-t5-base
    vlm export FOLDER --int8 -o BUNDLE

EVA-ViT-g/14 at 224 px and the Q-Former with 32 queries as published, and a language model of one's choice,
in bfloat16: 2.0 GB, 0.2 and the language model (opt-350m 0.7, flan-t5-base 0.5). Random weights say nothing
about answers; sizes, memory and times are those of a real model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from vlm_edge.benchmarks import big_checkpoint
from vlm_edge.benchmarks.big_checkpoint import Shapes, affine, linear, write_json

Config = dict[str, Any]
MODEL_TYPES = {"blip2": "blip-2", "instructblip": "instructblip"}
PROCESSORS = {"blip2": "Blip2Processor", "instructblip": "InstructBlipProcessor"}
QUERIES, IMAGE_TOKEN_ID = 32, 400

VISION: Config = {
    "hidden_size": 1408, "intermediate_size": 6144, "num_hidden_layers": 39,
    "num_attention_heads": 16, "image_size": 224, "patch_size": 14,
}  # fmt: skip
QFORMER: Config = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
    "num_attention_heads": 12, "cross_attention_frequency": 2, "encoder_hidden_size": 1408,
    "vocab_size": 30523, "max_position_embeddings": 512,
}  # fmt: skip
_OPT: Config = {"model_type": "opt", "vocab_size": 50304, "max_position_embeddings": 2048}
_T5: Config = {
    "model_type": "t5", "vocab_size": 32128, "d_kv": 64, "feed_forward_proj": "gated-gelu",
    "relative_attention_num_buckets": 32, "relative_attention_max_distance": 128,
    "tie_word_embeddings": False, "decoder_start_token_id": 0,
}  # fmt: skip
LANGUAGES: dict[str, Config] = {
    "opt-350m": _OPT | {"hidden_size": 1024, "ffn_dim": 4096, "num_hidden_layers": 24,
                        "num_attention_heads": 16, "word_embed_proj_dim": 512,
                        "do_layer_norm_before": False},
    "opt-2.7b": _OPT | {"hidden_size": 2560, "ffn_dim": 10240, "num_hidden_layers": 32,
                        "num_attention_heads": 32, "word_embed_proj_dim": 2560},
    "flan-t5-base": _T5 | {"d_model": 768, "d_ff": 2048, "num_layers": 12, "num_heads": 12},
    "flan-t5-xl": _T5 | {"d_model": 2048, "d_ff": 5120, "num_layers": 24, "num_heads": 32},
    "vicuna-7b": {"model_type": "llama", "vocab_size": 32064, "hidden_size": 4096,
                  "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
                  "num_key_value_heads": 32, "max_position_embeddings": 2048},
}  # fmt: skip


def config_of(arch: str, language: str, vision_layers: int) -> Config:
    """config.json of `arch`, a key of MODEL_TYPES, with `language`, a key of LANGUAGES."""
    kind, text = MODEL_TYPES[arch], LANGUAGES[language]
    part = kind.replace("-", "_")
    return {
        "model_type": kind, "num_query_tokens": QUERIES, "image_token_index": IMAGE_TOKEN_ID,
        "vision_config": VISION | {"model_type": f"{part}_vision_model",
                                   "num_hidden_layers": vision_layers},
        "qformer_config": QFORMER | {"model_type": f"{part}_qformer"},
        "text_config": text, "use_decoder_only_language_model": text["model_type"] != "t5",
    }  # fmt: skip


def shapes(config: Config) -> Shapes:
    """Names and shapes of all tensors as BLIP-2 and InstructBLIP checkpoints spell them."""
    vision, qformer, text = (config[f"{part}_config"] for part in ("vision", "qformer", "text"))
    yield "query_tokens", (1, config["num_query_tokens"], qformer["hidden_size"])
    yield from vision_shapes(vision)
    instructed = config["model_type"] == "instructblip"
    yield from qformer_shapes(qformer, vision["hidden_size"], instructed)
    root, kind = "language_model", text["model_type"]
    width = text["d_model" if kind == "t5" else "hidden_size"]
    yield from affine("language_projection", (width, qformer["hidden_size"]))
    if kind == "llama":
        yield from big_checkpoint.language_shapes(text, f"{root}.model", f"{root}.lm_head")
    elif kind == "opt":
        yield from opt_shapes(text, f"{root}.model.decoder")
    else:
        yield from t5_shapes(text, root)


def vision_shapes(config: Config, root: str = "vision_model") -> Shapes:
    """Of EVA-ViT."""
    width, hidden, patch = config["hidden_size"], config["intermediate_size"], config["patch_size"]
    positions = (config["image_size"] // patch) ** 2 + 1
    yield f"{root}.embeddings.class_embedding", (1, 1, width)
    yield f"{root}.embeddings.position_embedding", (1, positions, width)
    yield from affine(f"{root}.embeddings.patch_embedding", (width, 3, patch, patch))
    for index in range(config["num_hidden_layers"]):
        layer = f"{root}.encoder.layers.{index}"
        yield from affine(f"{layer}.self_attn.qkv", (3 * width, width))
        yield from affine(f"{layer}.self_attn.projection", (width, width))
        yield from affine(f"{layer}.mlp.fc1", (hidden, width))
        yield from affine(f"{layer}.mlp.fc2", (width, hidden))
        for name in ("layer_norm1", "layer_norm2"):
            yield from affine(f"{layer}.{name}", (width,))
    yield from affine(f"{root}.post_layernorm", (width,))


def qformer_shapes(
    config: Config, features: int, instructed: bool, root: str = "qformer"
) -> Shapes:
    """Of the Q-Former that reads features of that width, and an instruction too if it is instructed."""
    width, hidden = config["hidden_size"], config["intermediate_size"]
    norm = f"{root}.layernorm"
    if instructed:
        embeddings = f"{root}.embeddings"
        yield f"{embeddings}.word_embeddings.weight", (config["vocab_size"], width)
        yield f"{embeddings}.position_embeddings.weight", (config["max_position_embeddings"], width)
        norm = f"{embeddings}.layernorm"
    yield from affine(norm, (width,))
    for index in range(config["num_hidden_layers"]):
        layer = f"{root}.encoder.layer.{index}"
        inputs = {"attention": width}
        if index % config["cross_attention_frequency"] == 0:
            inputs["crossattention"] = features
        for attention, memory in inputs.items():
            for name, source in (("query", width), ("key", memory), ("value", memory)):
                yield from affine(f"{layer}.{attention}.attention.{name}", (width, source))
            yield from affine(f"{layer}.{attention}.output.dense", (width, width))
            yield from affine(f"{layer}.{attention}.output.LayerNorm", (width,))
        for suffix in ("_query", "") if instructed else ("_query",):
            yield from affine(f"{layer}.intermediate{suffix}.dense", (hidden, width))
            yield from affine(f"{layer}.output{suffix}.dense", (width, hidden))
            yield from affine(f"{layer}.output{suffix}.LayerNorm", (width,))


def opt_shapes(config: Config, root: str) -> Shapes:
    """Of an OPT whose head is its token table."""
    width, hidden, outer = config["hidden_size"], config["ffn_dim"], config["word_embed_proj_dim"]
    yield f"{root}.embed_tokens.weight", (config["vocab_size"], outer)
    yield f"{root}.embed_positions.weight", (config["max_position_embeddings"] + 2, width)
    if outer != width:
        yield from linear(f"{root}.project_in", (width, outer))
        yield from linear(f"{root}.project_out", (outer, width))
    for index in range(config["num_hidden_layers"]):
        layer = f"{root}.layers.{index}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield from affine(f"{layer}.self_attn.{name}", (width, width))
        yield from affine(f"{layer}.fc1", (hidden, width))
        yield from affine(f"{layer}.fc2", (width, hidden))
        for name in ("self_attn_layer_norm", "final_layer_norm"):
            yield from affine(f"{layer}.{name}", (width,))
    if config.get("do_layer_norm_before", True):
        yield from affine(f"{root}.final_layer_norm", (width,))


def t5_shapes(config: Config, root: str) -> Shapes:
    """Of a Flan-T5: gated feed-forward, a head of its own."""
    width, hidden, heads = config["d_model"], config["d_ff"], config["num_heads"]
    inner, table = heads * config["d_kv"], (config["vocab_size"], width)
    yield f"{root}.shared.weight", table
    for stack, kinds in (
        ("encoder", ("SelfAttention",)),
        ("decoder", ("SelfAttention", "EncDecAttention")),
    ):
        for index in range(config["num_layers"]):
            block = f"{root}.{stack}.block.{index}"
            for place, kind in enumerate(kinds):
                for name in "qkv":
                    yield from linear(f"{block}.layer.{place}.{kind}.{name}", (inner, width))
                yield from linear(f"{block}.layer.{place}.{kind}.o", (width, inner))
            last = f"{block}.layer.{len(kinds)}.DenseReluDense"
            for name in ("wi_0", "wi_1"):
                yield from linear(f"{last}.{name}", (hidden, width))
            yield from linear(f"{last}.wo", (width, hidden))
            for place in range(len(kinds) + 1):
                yield f"{block}.layer.{place}.layer_norm.weight", (width,)
        bias = f"{root}.{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        yield bias, (config["relative_attention_num_buckets"], heads)
        yield f"{root}.{stack}.final_layer_norm.weight", (width,)
    yield f"{root}.lm_head.weight", table


def write(folder: Path, arch: str, config: Config, seed: int) -> None:
    """The checkpoint of that config.json; `folder` exists."""
    write_json(folder / "config.json", config)
    side = config["vision_config"]["image_size"]
    image = {
        "image_processor_type": "BlipImageProcessor", "size": {"height": side, "width": side},
        "resample": 3, "do_convert_rgb": True,
    }  # fmt: skip
    write_json(folder / "preprocessor_config.json", image)
    processor = {
        "processor_class": PROCESSORS[arch], "num_query_tokens": config["num_query_tokens"]
    }  # fmt: skip
    write_json(folder / "processor_config.json", processor)
    big_checkpoint.write_tokenizer(folder, config["image_token_index"])
    if arch == "instructblip":
        (folder / "qformer_tokenizer").mkdir()
        big_checkpoint.write_tokenizer(folder / "qformer_tokenizer", IMAGE_TOKEN_ID)
    big_checkpoint.write_weights(folder / "model.safetensors", list(shapes(config)), seed)


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--arch", type=click.Choice(list(MODEL_TYPES)), default="blip2", show_default=True)
@click.option(
    "--language", type=click.Choice(list(LANGUAGES)), default="opt-350m", show_default=True
)
@click.option(
    "--vision-layers",
    type=click.IntRange(min=1),
    default=VISION["num_hidden_layers"],
    show_default=True,
)
@click.option("--seed", default=0, show_default=True)
def main(folder: Path, arch: str, language: str, vision_layers: int, seed: int) -> None:
    """Write the checkpoint to FOLDER."""
    folder.mkdir(parents=True)
    write(folder, arch, config_of(arch, language, vision_layers), seed)


if __name__ == "__main__":
    main()
