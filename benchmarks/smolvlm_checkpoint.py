"""A checkpoint of SmolVLM-256M's shape with random weights, to measure time and memory by tiles.

    python -m vlm_edge.benchmarks.smolvlm_checkpoint FOLDER
    vlm export FOLDER --int8 -o BUNDLE
    vlm bench BUNDLE --max-tiles 5

SigLIP-B/16 at 512 px, pixel shuffle by 4 (64 tokens a tile), a SmolLM2-135M-shaped decoder, in bfloat16:
0.5 GB. The tokenizer is SmolLM2's own, from the demo's packages, with SmolVLM's tokens at their published
ids. Random weights say nothing about answers; sizes, memory and times are those of a real model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from tokenizers import AddedToken, Tokenizer

from vlm_edge.benchmarks import big_checkpoint
from vlm_edge.benchmarks.big_checkpoint import Shapes, affine, write_json
from vlm_edge.benchmarks.peers.models import demo_checkpoint

VISION: dict[str, Any] = {
    "model_type": "smolvlm_vision", "hidden_size": 768, "intermediate_size": 3072,
    "num_hidden_layers": 12, "num_attention_heads": 12, "image_size": 512, "patch_size": 16,
}  # fmt: skip
TEXT: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49280, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 8192, "rope_theta": 100000.0, "tie_word_embeddings": False,
}  # fmt: skip
FACTOR = 4  # patches along the side of a visual token
TILE, LONGEST = 512, 2048  # pixels

# As published, in the order of their ids, which follow SmolLM2's 49152.
TOKENS = (
    "<global-img>",
    *(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)),
    "<fake_token_around_image>",
    "<image>",
    *(f"<|reserved_special_token_{index}|>" for index in range(88)),
    "<end_of_utterance>",
)
CHAT_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}"
    "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


def shapes() -> Shapes:
    """Names and shapes of all tensors as SmolVLM checkpoints spell them."""
    width, patch, root = VISION["hidden_size"], VISION["patch_size"], "model.vision_model"
    yield f"{root}.embeddings.patch_embedding.weight", (width, 3, patch, patch)
    yield f"{root}.embeddings.patch_embedding.bias", (width,)
    positions = (VISION["image_size"] // patch) ** 2
    yield f"{root}.embeddings.position_embedding.weight", (positions, width)
    yield from big_checkpoint.vision_layer_shapes(VISION, root)
    yield from affine(f"{root}.post_layernorm", (width,))
    proj = "model.connector.modality_projection.proj.weight"
    yield proj, (TEXT["hidden_size"], width * FACTOR**2)
    yield from big_checkpoint.language_shapes(TEXT, "model.text_model", "lm_head")


def write_tokenizer(folder: Path) -> Tokenizer:
    """SmolLM2's with SmolVLM's tokens; the place of <image> in the demo's is SmolLM2's own again."""
    text = (demo_checkpoint() / "tokenizer.json").read_text(encoding="utf-8")
    tokenizer = Tokenizer.from_str(text.replace('"<image>"', '"<reponame>"'))
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in TOKENS])
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {
        "bos_token": "<|im_start|>", "eos_token": "<end_of_utterance>", "pad_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
    }  # fmt: skip
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    write_json(folder / "tokenizer_config.json", {**kind, **names})
    return tokenizer


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--seed", default=0, show_default=True)
def main(folder: Path, seed: int) -> None:
    """Write the checkpoint to FOLDER."""
    folder.mkdir(parents=True)
    tokenizer = write_tokenizer(folder)
    config = {
        "model_type": "smolvlm", "image_token_id": tokenizer.token_to_id("<image>"),
        "scale_factor": FACTOR, "tie_word_embeddings": False, "vision_config": VISION,
        "text_config": TEXT,
    }  # fmt: skip
    write_json(folder / "config.json", config)
    image = {
        "image_processor_type": "SmolVLMImageProcessor", "resample": 1, "do_image_splitting": True,
        "size": {"longest_edge": LONGEST}, "max_image_size": {"longest_edge": TILE},
        "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
    }  # fmt: skip
    write_json(folder / "preprocessor_config.json", image)
    tokens = (TILE // VISION["patch_size"] // FACTOR) ** 2
    processor = {"processor_class": "SmolVLMProcessor", "image_seq_len": tokens}
    write_json(folder / "processor_config.json", processor)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    eos = {"eos_token_id": tokenizer.token_to_id("<end_of_utterance>")}
    write_json(folder / "generation_config.json", eos)
    big_checkpoint.write_weights(folder / "model.safetensors", list(shapes()), seed)


if __name__ == "__main__":
    main()
