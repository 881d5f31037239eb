"""benchmarks/blip2_checkpoint.py: its tensors are those of transformers, and we read what it writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from vlm_edge import VLM
from vlm_edge.benchmarks import blip2_checkpoint as made
from vlm_edge.export.pipeline import export

SMALL = {
    "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "image_size": 28, "vocab_size": 420, "ffn_dim": 40,
    "word_embed_proj_dim": 20, "d_model": 32, "d_ff": 40, "d_kv": 8, "num_layers": 2, "num_heads": 3,
}  # fmt: skip


def with_sizes(config: dict[str, Any], sizes: dict[str, int]) -> dict[str, Any]:
    """`config` with those of `sizes` that its parts have."""
    parts = {
        name: part | {key: sizes[key] for key in sizes if key in part}
        for name, part in config.items()
        if name.endswith("_config")
    }
    return config | parts


@pytest.mark.parametrize("arch", made.MODEL_TYPES)
@pytest.mark.parametrize("language", made.LANGUAGES)
def test_the_tensors_are_those_of_transformers(arch: str, language: str) -> None:
    import torch
    import transformers

    layers = {"num_hidden_layers": 3, "num_layers": 3}
    config = with_sizes(made.config_of(arch, language, vision_layers=3), layers)
    kind = {"blip2": "Blip2", "instructblip": "InstructBlip"}[arch]
    reference = getattr(transformers, f"{kind}Config")(**config)
    with torch.device("meta"):
        model = getattr(transformers, f"{kind}ForConditionalGeneration")(reference)
    tied = {f"language_model.{stack}.embed_tokens.weight" for stack in ("encoder", "decoder")}
    if language.startswith("opt"):
        tied.add("language_model.lm_head.weight")
    expected = {n: tuple(t.shape) for n, t in model.state_dict().items() if n not in tied}
    assert dict(made.shapes(config)) == expected


@pytest.mark.parametrize(
    ("arch", "language", "parts"),
    [
        ("blip2", "opt-350m", ["vision", "connector", "llm"]),
        ("blip2", "opt-2.7b", ["vision", "connector", "llm"]),
        ("blip2", "flan-t5-base", ["vision", "connector", "llm_encoder", "llm"]),
        ("instructblip", "vicuna-7b", ["vision", "connector", "llm"]),
        ("instructblip", "flan-t5-xl", ["vision", "connector", "llm_encoder", "llm"]),
    ],
)
def test_a_small_one_is_exported_and_answers(
    arch: str, language: str, parts: list[str], tmp_path: Path, pictures: dict[str, Path]
) -> None:
    config = with_sizes(made.config_of(arch, language, vision_layers=2), SMALL)
    (tmp_path / "checkpoint").mkdir()
    made.write(tmp_path / "checkpoint", arch, config, seed=0)
    report = export(tmp_path / "checkpoint", tmp_path / "bundle")
    assert report.architecture == arch
    assert list(report.precisions) == parts
    with VLM.load(tmp_path / "bundle") as vlm:
        answer = vlm.generate(
            "what?", [pictures["small.png"]], False, max_new_tokens=3, ignore_eos=True
        )
    assert len(answer.token_ids) == 3
    assert answer.visual_tokens == made.QUERIES
