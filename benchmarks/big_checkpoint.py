"""A LLaVA or LLaVA-NeXT checkpoint of real shape with random weights, to measure memory and time.

    python -m vlm_edge.benchmarks.big_checkpoint FOLDER
    vlm export FOLDER --int8 -o BUNDLE

CLIP ViT-L/14 at 336 px, the MLP projector and a Qwen2-shaped language model in bfloat16: 3.7 GB with
the one of 1.5B, 1.7 GB with that of 0.5B. Random weights say nothing about answers; sizes, memory and
times are those of a real model.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import ml_dtypes
import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

VISION: dict[str, Any] = {
    "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096,
    "num_hidden_layers": 24, "num_attention_heads": 16, "image_size": 336, "patch_size": 14,
    "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
}  # fmt: skip
_TEXT: dict[str, Any] = {
    "model_type": "qwen2", "num_key_value_heads": 2, "vocab_size": 151936,
    "max_position_embeddings": 32768, "rope_theta": 1000000.0, "tie_word_embeddings": False,
}  # fmt: skip
TEXTS: dict[str, dict[str, Any]] = {
    "0.5b": _TEXT | {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
                     "num_attention_heads": 14},
    "1.5b": _TEXT | {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
                     "num_attention_heads": 12},
}  # fmt: skip
PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]  # of LLaVA 1.6
STD = 0.02
Shapes = Iterator[tuple[str, tuple[int, ...]]]


def vision_shapes(config: dict[str, Any]) -> Shapes:
    """Names and shapes of the encoder's tensors as LLaVA checkpoints spell them."""
    width, patch = config["hidden_size"], config["patch_size"]
    root = "vision_tower.vision_model"
    yield f"{root}.embeddings.class_embedding", (width,)
    yield f"{root}.embeddings.patch_embedding.weight", (width, 3, patch, patch)
    positions = (config["image_size"] // patch) ** 2 + 1
    yield f"{root}.embeddings.position_embedding.weight", (positions, width)
    for name in ("pre_layrnorm", "post_layernorm"):
        yield from affine(f"{root}.{name}", (width,))
    yield from vision_layer_shapes(config, root)


def vision_layer_shapes(config: dict[str, Any], root: str) -> Shapes:
    """Names and shapes of the layers that CLIP and SigLIP have in common."""
    width, hidden = config["hidden_size"], config["intermediate_size"]
    for index in range(config["num_hidden_layers"]):
        layer = f"{root}.encoder.layers.{index}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield from affine(f"{layer}.self_attn.{name}", (width, width))
        yield from affine(f"{layer}.mlp.fc1", (hidden, width))
        yield from affine(f"{layer}.mlp.fc2", (width, hidden))
        for name in ("layer_norm1", "layer_norm2"):
            yield from affine(f"{layer}.{name}", (width,))


def language_shapes(
    config: dict[str, Any],
    root: str = "language_model.model",
    head: str = "language_model.lm_head",
) -> Shapes:
    """Names and shapes of a Qwen2 decoder's tensors, or of a Llama's, which has no biases."""
    width, hidden, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    kv = width // config["num_attention_heads"] * config["num_key_value_heads"]
    projection = affine if config["model_type"] == "qwen2" else linear
    yield f"{root}.embed_tokens.weight", (vocab, width)
    for index in range(config["num_hidden_layers"]):
        layer = f"{root}.layers.{index}"
        yield from projection(f"{layer}.self_attn.q_proj", (width, width))
        yield from projection(f"{layer}.self_attn.k_proj", (kv, width))
        yield from projection(f"{layer}.self_attn.v_proj", (kv, width))
        yield f"{layer}.self_attn.o_proj.weight", (width, width)
        for name in ("gate_proj", "up_proj"):
            yield f"{layer}.mlp.{name}.weight", (hidden, width)
        yield f"{layer}.mlp.down_proj.weight", (width, hidden)
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"{layer}.{name}.weight", (width,)
    yield f"{root}.norm.weight", (width,)
    yield f"{head}.weight", (vocab, width)


def linear(name: str, shape: tuple[int, ...]) -> Shapes:
    yield f"{name}.weight", shape


def affine(name: str, shape: tuple[int, ...]) -> Shapes:
    yield f"{name}.weight", shape
    yield f"{name}.bias", shape[:1]


def projector_shapes(inputs: int, outputs: int) -> Shapes:
    yield from affine("multi_modal_projector.linear_1", (outputs, inputs))
    yield from affine("multi_modal_projector.linear_2", (outputs, outputs))


def write_weights(path: Path, shapes: list[tuple[str, tuple[int, ...]]], seed: int) -> None:
    """Random bfloat16 tensors as one safetensors file, one tensor in memory at a time."""
    header, end = {}, 0
    for name, shape in shapes:
        begin, end = end, end + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    random = np.random.default_rng(seed)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes:
            values = random.standard_normal(shape, dtype=np.float32) * np.float32(STD)
            if "norm" in name.lower() and name.endswith("weight"):
                values += 1
            values.astype(ml_dtypes.bfloat16).tofile(file)


def write_tokenizer(folder: Path, image_token_id: int) -> None:
    """A byte-level tokenizer of 256 tokens, and the image token at its id."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    filler = {f"<{i}>": i for i in range(len(alphabet), image_token_id)}
    vocab = {symbol: i for i, symbol in enumerate(alphabet)} | filler
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<image>", special=True)])
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})


def write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=1), encoding="utf-8")


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--arch", type=click.Choice(["llava", "llava_next"]), default="llava")
@click.option("--language", type=click.Choice(list(TEXTS)), default="1.5b", show_default=True)
@click.option("--seed", default=0, show_default=True)
def main(folder: Path, arch: str, language: str, seed: int) -> None:
    """Write the checkpoint to FOLDER."""
    folder.mkdir(parents=True)
    text, image_token_id, tiles = TEXTS[language], 400, arch == "llava_next"
    config = {
        "model_type": arch, "image_token_index": image_token_id, "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default", "vision_config": VISION, "text_config": text,
        **({"image_grid_pinpoints": PINPOINTS} if tiles else {}),
    }  # fmt: skip
    write_json(folder / "config.json", config)
    size = VISION["image_size"]
    image = {
        "image_processor_type": "LlavaNextImageProcessor" if tiles else "CLIPImageProcessor",
        "size": {"shortest_edge": size}, "crop_size": {"height": size, "width": size}, "resample": 3,
        **({"image_grid_pinpoints": PINPOINTS} if tiles else {}),
    }  # fmt: skip
    write_json(folder / "preprocessor_config.json", image)
    processor = {
        "processor_class": "LlavaNextProcessor" if tiles else "LlavaProcessor",
        "image_token": "<image>", "patch_size": VISION["patch_size"],
        "num_additional_image_tokens": 1, "vision_feature_select_strategy": "default",
    }  # fmt: skip
    write_json(folder / "processor_config.json", processor)
    write_tokenizer(folder, image_token_id)
    shapes = [
        *vision_shapes(VISION),
        *projector_shapes(VISION["hidden_size"], text["hidden_size"]),
        *language_shapes(text),
    ]
    if tiles:
        shapes.append(("image_newline", (text["hidden_size"],)))
    write_weights(folder / "model.safetensors", shapes, seed)


if __name__ == "__main__":
    main()
