"""The Q-Former of BLIP-2 and InstructBLIP: tokens and every layer's output are transformers'."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from blip_parts import (
    QFORMER,
    Family,
    Made,
    close,
    ids_of,
    layer_outputs,
    make,
    pixels_of,
    read_parts,
    run,
    write,
)
from safetensors.numpy import load_file, save_file
from tiny import edit_json

from vlm_edge.errors import TensorMissing, TensorShapeMismatch, UnsupportedConfig
from vlm_edge.export.config import Config
from vlm_edge.export.connectors import qformer
from vlm_edge.export.quantizers import Float

# family, queries, language model, what differs in qformer_config
CASES: dict[str, tuple[Family, int, str, dict[str, Any]]] = {
    "blip2": ("Blip2", 7, "llama", {}),
    "blip2-one-query": ("Blip2", 1, "t5", dict(
        cross_attention_frequency=1, num_attention_heads=1, hidden_act="gelu_new")),
    "blip2-deep": ("Blip2", 5, "t5", dict(
        cross_attention_frequency=3, num_hidden_layers=5, num_attention_heads=3,
        layer_norm_eps=0.5)),
    "blip2-one-layer": ("Blip2", 3, "llama", dict(  # as wide as the features
        num_hidden_layers=1, hidden_size=36, num_attention_heads=4)),
    "blip2-text-weights": ("Blip2", 7, "llama", dict(use_qformer_text_input=True)),
    "blip2-narrow-opt": ("Blip2", 7, "opt", {}),
    "instructblip": ("InstructBlip", 7, "llama", {}),
    "instructblip-one-query": ("InstructBlip", 1, "t5", dict(
        cross_attention_frequency=1, num_attention_heads=1, hidden_act="quick_gelu")),
    "instructblip-deep": ("InstructBlip", 5, "llama", dict(
        cross_attention_frequency=3, num_hidden_layers=5, num_attention_heads=3,
        layer_norm_eps=0.5)),
    "instructblip-one-layer": ("InstructBlip", 7, "t5", dict(
        num_hidden_layers=1, hidden_size=36, num_attention_heads=9, hidden_act="relu")),
    "instructblip-narrow-opt": ("InstructBlip", 5, "opt", dict(num_hidden_layers=2)),
}  # fmt: skip
LENGTHS = (1, 2, 13, 19)  # the last one is all positions


@pytest.mark.parametrize("case", CASES)
def test_tokens_are_those_of_transformers(case: str, tmp_path: Path) -> None:
    """From the same features, for one tile and several with instructions of their own, as one call and
    layer by layer."""
    family, queries, text, sizes = CASES[case]
    made = make(tmp_path, family, qformer_args=sizes, queries=queries, text=text)
    depth = {**QFORMER, **sizes}["num_hidden_layers"]
    names = tuple(f"connector.layers.{index}.output" for index in range(depth))
    graph = write(made.parts["connector"], tmp_path / "connector.onnx", Float(), names)
    for tiles, length in zip((1, 2, 3, 1), LENGTHS, strict=True):
        feeds = feeds_of(made, tiles, length)
        expected, theirs = reference(made, feeds)
        found, *layers = run(graph, feeds)
        close(found, expected)
        for layer, output in zip(layers[:-1], theirs[:-1], strict=True):
            close(layer, output)
        close(layers[-1], theirs[-1][:, :queries])  # nobody reads the instruction after it
        if family == "InstructBlip":
            assert layers[0].shape[1] == queries + (length if depth > 1 else 0)


def feeds_of(made: Made, tiles: int, length: int) -> dict[str, np.ndarray]:
    """Features by transformers and, where the model is instructed, ids."""
    import torch

    pixels = pixels_of(made.parts["vision"], tiles, seed=length)
    with torch.inference_mode():
        states = made.model.vision_model(made.torch(pixels)).last_hidden_state
    feeds = {"features": states.numpy()}
    if made.connector.instructed:
        feeds["instruction_ids"] = ids_of(made.connector, tiles, length)
    return feeds


def reference(made: Made, feeds: dict[str, np.ndarray]) -> tuple[np.ndarray, list[Any]]:
    """image_features as they fill the places of a prompt, and the outputs of the layers."""
    import torch

    features = made.torch(feeds["features"])
    tokens = made.model.query_tokens.expand(len(features), -1, -1)
    words = {}
    if "instruction_ids" in feeds:
        ids = made.torch(feeds["instruction_ids"])
        mask = torch.ones(len(ids), tokens.shape[1] + ids.shape[1], dtype=torch.long)
        words = {"input_ids": ids, "attention_mask": mask}
    states, layers = layer_outputs(
        made.model.qformer.encoder.layer,
        lambda: (
            made.model.qformer(
                query_embeds=tokens, encoder_hidden_states=features, **words
            ).last_hidden_state
        ),
    )
    with torch.inference_mode():
        projected = made.model.language_projection(states[:, : tokens.shape[1]])
        table = made.model.language_model.get_input_embeddings().weight
        filled = []
        for tile in projected:  # one picture in a prompt, as the processors have it
            places = torch.ones(tokens.shape[1], table.shape[1], dtype=torch.bool)
            filled.append(torch.zeros(places.shape).masked_scatter(places, tile))
    return torch.stack(filled).numpy(), layers


@pytest.mark.parametrize("family", ["Blip2", "InstructBlip"])
def test_the_whole_way_from_pixels(family: Family, tmp_path: Path) -> None:
    made = make(tmp_path, family, dtype="float16")
    pixels = pixels_of(made.parts["vision"], 3)
    feeds = {}
    if made.connector.instructed:
        feeds["instruction_ids"] = ids_of(made.connector, 3, 4)
    expected = made.image_features(pixels, feeds.get("instruction_ids")).pooler_output
    graphs = {name: write(part, tmp_path / f"{name}.onnx") for name, part in made.parts.items()}
    (features,) = run(graphs["vision"], {"pixel_values": pixels})
    (found,) = run(graphs["connector"], {"features": features, **feeds})
    close(found, expected)


def test_only_what_is_read_is_computed(tmp_path: Path) -> None:
    """No feed-forward of the instruction in the last layer, none in BLIP-2; cross-attention where it
    stands."""
    layers = make(tmp_path, "InstructBlip").layers("connector")
    text = {p for p in layers if ".intermediate.dense" in p}
    assert text == {f"qformer.encoder.layer.{i}.intermediate.dense" for i in (0, 1)}
    made = make(tmp_path, "Blip2", qformer_args=dict(use_qformer_text_input=True))
    layers = made.layers("connector")
    assert not any(".intermediate.dense" in path for path in layers)
    cross = {path.split(".")[3] for path in layers if "crossattention" in path}
    assert cross == {"0", "2"}
    assert len(layers) == 3 * 6 + 2 * 4 + 1


def test_an_instruction_longer_than_the_positions_fails(tmp_path: Path) -> None:
    made = make(tmp_path, "InstructBlip")
    graph = write(made.parts["connector"], tmp_path / "connector.onnx")
    feeds = feeds_of(made, 1, made.connector.max_positions)
    run(graph, feeds)
    longer = np.ones((1, made.connector.max_positions + 1), np.int64)
    with pytest.raises(Exception, match="19"):
        run(graph, {**feeds, "instruction_ids": longer})


# -- config.json ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["Blip2", "InstructBlip"])
def test_what_config_json_leaves_out(kind: str) -> None:
    import transformers

    config = getattr(transformers, f"{kind}Config")()
    default = config.qformer_config
    for values in (
        {"model_type": config.model_type},
        {"model_type": config.model_type, "qformer_config": default.to_dict()},
    ):
        found = qformer.read(Config(values), 1408, 2048)
        assert replace(found, act=None) == qformer.QFormerSettings(  # type: ignore[arg-type]
            queries=config.num_query_tokens,
            width=default.hidden_size,
            hidden=default.intermediate_size,
            layers=default.num_hidden_layers,
            heads=default.num_attention_heads,
            every=default.cross_attention_frequency,
            epsilon=default.layer_norm_eps,
            act=None,  # type: ignore[arg-type]
            features=1408,
            projected=2048,
            outputs=2048,
            instructed=kind == "InstructBlip",
            vocabulary=default.vocab_size,
            max_positions=default.max_position_embeddings,
        )


def test_keys_of_transformers_4() -> None:
    """qformer_config as 4.27 wrote it for the published BLIP-2."""
    old = {
        "_name_or_path": "", "attention_probs_dropout_prob": 0.1, "chunk_size_feed_forward": 0,
        "classifier_dropout": None, "cross_attention_frequency": 2, "encoder_hidden_size": 1408,
        "hidden_act": "gelu", "initializer_range": 0.02, "is_decoder": False, "layer_norm_eps": 1e-12,
        "model_type": "blip_2_qformer", "pad_token_id": 0, "position_embedding_type": "absolute",
        "tie_word_embeddings": True, "torch_dtype": None, "transformers_version": "4.27.0.dev0",
        "use_bfloat16": False, "vocab_size": 30522,
    }  # fmt: skip
    config = Config({"model_type": "blip-2", "qformer_config": old, "image_text_hidden_size": 256})
    assert qformer.read(config, 1408, 2560).epsilon == 1e-12
    config.finish()


def test_the_encoder_says_how_wide_features_are(tmp_path: Path) -> None:
    """The reference overwrites `encoder_hidden_size`; files say 1408 whatever the encoder is."""
    make(tmp_path, "Blip2")
    edit_json(tmp_path / "config.json", "qformer_config.encoder_hidden_size", 1408)
    _, parts, settings = read_parts(tmp_path)
    assert settings.features == 36
    parts["connector"].build(Float())


@pytest.mark.parametrize(
    ("key", "value", "why"),
    [
        ("num_query_tokens", 0, "positive integer"),
        ("model_type", "blip-3", "known are blip-2, instructblip"),
        ("qformer_config", [], "should be an object"),
        ("qformer_config.model_type", "instructblip_qformer", "blip-2's Q-Former"),
        ("qformer_config.num_attention_heads", 7, "should divide 768"),
        ("qformer_config.cross_attention_frequency", 0, "positive integer"),
        ("qformer_config.hidden_act", "mish", "known are"),
        ("qformer_config.layer_norm_eps", "small", "should be a number"),
        ("qformer_config.position_embedding_type", "relative_key", "learned embeddings"),
        ("qformer_config.use_rope", True, "does not know this key"),
    ],
)
def test_what_it_cannot_honour_is_named(key: str, value: Any, why: str) -> None:
    outer, _, inner = key.partition(".")
    values = {"model_type": "blip-2", outer: {inner: value} if inner else value}
    with pytest.raises(UnsupportedConfig, match=rf"{key}.*{why}"):
        qformer.read(Config(values), 1408, 2560)


def test_embeddings_wider_than_the_projection_are_refused() -> None:
    """transformers fails on them too: there are too few values to fill the places."""
    config = Config({"model_type": "blip-2"})
    assert qformer.read(config, 1408, 512, 512).outputs == 512
    with pytest.raises(UnsupportedConfig, match=r"word_embed_proj_dim.*513.*gives 512 values"):
        qformer.read(config, 1408, 512, 513)


@pytest.mark.parametrize(
    "name",
    [
        "query_tokens", "language_projection.bias", "qformer.embeddings.word_embeddings.weight",
        "qformer.embeddings.layernorm.bias",
        "qformer.encoder.layer.2.crossattention.attention.value.weight",
        "qformer.encoder.layer.1.output.LayerNorm.weight",
    ],
)  # fmt: skip
def test_a_tensor_that_is_missing_or_of_another_shape_is_named(name: str, tmp_path: Path) -> None:
    make(tmp_path, "InstructBlip")
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, name: tensors[name][..., :-1].copy()}, file)
    with pytest.raises(TensorShapeMismatch, match=name):
        read_parts(tmp_path)[1]["connector"].build(Float())
    del tensors[name]
    save_file(tensors, file)
    with pytest.raises(TensorMissing, match=name):
        read_parts(tmp_path)[1]["connector"].build(Float())
