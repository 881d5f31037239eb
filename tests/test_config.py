"""config.json read strictly: what is used, what is harmless, and what is refused by its key."""

from __future__ import annotations

import math
from typing import Any

import pytest

from vlm_edge.errors import UnsupportedConfig
from vlm_edge.export.config import HARMLESS, Config
from vlm_edge.export.language import llama
from vlm_edge.export.vision import tower


def refused(call: Any, *said: str) -> None:
    with pytest.raises(UnsupportedConfig) as caught:
        call()
    for word in said:
        assert word in str(caught.value)


@pytest.mark.parametrize("key", sorted(HARMLESS))
def test_harmless_keys_pass_whatever_they_say(key: str) -> None:
    Config({key: "anything"}, "text_config").finish()


def test_used_and_unused_keys() -> None:
    config = Config({"used": 1, "null": None, "off": False}, "text_config")
    assert config.get("used") == 1
    config.finish()
    for value in (1, 0, "x", [], {}, True, 0.0):
        refused(Config({"new": value}, "text_config").finish, "text_config.new", repr(value))
    refused(Config({"new": 1}).finish, "key new = 1")


def test_null_means_the_default() -> None:
    config = Config({"a": None, "b": 0})
    assert (config.get("a", 3), config.get("b", 3), config.get("c", 3)) == (3, 0, 3)
    assert config.size("a", 5) == 5
    assert config.number("a", 0.5) == 0.5
    assert config.flag("a", True) is True
    assert config.choice("a", "x", ("x", "y")) == "x"
    assert config.sub("a").values == {}


@pytest.mark.parametrize(
    ("method", "default", "bad"),
    [
        ("size", 3, [0, -1, 1.0, "4", True, [4]]),
        ("number", 1.0, ["1", True, [1.0], math.nan, math.inf]),
        ("flag", True, [1, 0, "true", []]),
        ("sub", ..., [1, "x", [1], True]),
    ],
)
def test_values_of_another_kind_are_refused(method: str, default: Any, bad: list[Any]) -> None:
    for value in bad:
        config = Config({"key": value}, "part")
        arguments = () if default is ... else (default,)
        refused(
            lambda c=config, a=arguments: getattr(c, method)("key", *a), "part.key", repr(value)
        )


@pytest.mark.parametrize("value", ["z", 1, ["x"], {"x": 1}])
def test_a_choice_lists_what_is_known(value: Any) -> None:
    refused(lambda: Config({"act": value}).choice("act", "x", ("y", "x")), "act", "known are x, y")


def test_only_what_is_implemented() -> None:
    Config({}).only("channels", 3, 3, "why")
    refused(lambda: Config({"channels": 1}).only("channels", 3, 3, "the reason"), "1", "the reason")


def test_paths_lead_down() -> None:
    inner = Config({"a": {"b": {"c": 0}}}).sub("a").sub("b")
    refused(lambda: inner.size("c", 1), "a.b.c")


# -- the language model -----------------------------------------------------------------------

TEXT = {
    "hidden_size": 48,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "intermediate_size": 70,
}


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, {"kv_heads": 4, "head_dim": 12, "epsilon": 1e-6, "vocab_size": 32000, "max_positions": 2048}),
        ({"num_key_value_heads": 2, "head_dim": 10}, {"kv_heads": 2, "head_dim": 10}),
        ({"num_key_value_heads": None}, {"kv_heads": 4}),
        ({"attention_bias": True}, {"qkv_bias": True, "output_bias": True, "mlp_bias": False}),
        ({"mlp_bias": True}, {"qkv_bias": False, "mlp_bias": True}),
        ({"rms_norm_eps": 1}, {"epsilon": 1.0}),
        ({"tie_word_embeddings": True}, {"tied": True}),
        ({"model_type": "mistral"}, {"kv_heads": 8, "window": 4096, "sliding": (True,) * 3}),
        ({"model_type": "mistral", "sliding_window": None}, {"window": None, "sliding": (False,) * 3}),
        ({"model_type": "qwen2"}, {"qkv_bias": True, "output_bias": False, "window": None}),
        ({"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 2},
         {"window": 9, "sliding": (False, False, True)}),
        ({"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 9, "layer_types":
          ["sliding_attention", "full_attention", "full_attention"]},
         {"window": 9, "sliding": (True, False, False)}),
        ({"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 3},
         {"window": None, "sliding": (False,) * 3}),
    ],
)  # fmt: skip
def test_text_config_with_the_defaults_of_its_kind(
    keys: dict[str, Any], expected: dict[str, Any]
) -> None:
    heads = {"num_attention_heads": 8} if keys.get("model_type") == "mistral" else {}
    heads |= {"num_key_value_heads": 4} if keys.get("model_type") == "qwen2" else {}
    found = llama.read(Config({**TEXT, **heads, **keys}, "text_config"))
    assert {key: getattr(found, key) for key in expected} == expected


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"num_key_value_heads": 3}, ("num_key_value_heads = 3", "divide the 4 heads")),
        ({"hidden_act": "mish"}, ("hidden_act", "mish", "silu")),
        ({"model_type": "mixtral"}, ("model_type", "mixtral", "llama, mistral, qwen2")),
        ({"num_local_experts": 8}, ("num_local_experts",)),
        ({"sliding_window": 9}, ("sliding_window",)),  # Llama has none: it would be ignored
        ({"rms_norm_eps": "1e-5"}, ("rms_norm_eps",)),
        ({"rope_theta": [1]}, ("rope_theta",)),
        ({"vocab_size": 0}, ("vocab_size",)),
        ({"quantization_config": {"bits": 4}}, ("quantization_config",)),
        ({"model_type": "mistral", "sliding_window": 0}, ("sliding_window = 0",)),
        ({"model_type": "mistral", "sliding_window": "9"}, ("sliding_window",)),
        ({"model_type": "mistral", "attention_bias": True}, ("attention_bias",)),
        ({"model_type": "qwen2", "use_sliding_window": True, "sliding_window": -1}, ("sliding_window",)),
        ({"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": "1"}, ("max_window_layers",)),
        ({"model_type": "qwen2", "layer_types": ["full_attention"]}, ("layer_types", "3 layers")),
        ({"model_type": "qwen2", "layer_types": ["full_attention"] * 2 + ["linear"]}, ("layer_types",)),
        ({"model_type": "qwen2", "layer_types": "full_attention"}, ("layer_types",)),
    ],
)  # fmt: skip
def test_text_config_that_cannot_be_honoured(keys: dict[str, Any], said: tuple[str, ...]) -> None:
    values = {**TEXT, **keys}
    if keys.get("model_type") in ("mistral", "qwen2"):
        values["num_key_value_heads"] = 4
    refused(lambda: llama.read(Config(values, "text_config")), "text_config", *said)


# -- the vision encoder -----------------------------------------------------------------------

VISION = {"model_type": "clip_vision_model", "hidden_size": 36, "num_attention_heads": 3,
          "num_hidden_layers": 3, "image_size": 30, "patch_size": 10}  # fmt: skip


def read_tower(height: int = 30, width: int = 30, **keys: Any) -> tower.TowerSettings:
    vision = {key.removeprefix("v_"): keys.pop(key) for key in list(keys) if key.startswith("v_")}
    config = Config({"vision_config": {**VISION, **vision}, **keys})
    return tower.read_tower(config, height, width)


@pytest.mark.parametrize(
    ("layer", "layers"),
    [(-1, (3,)), (-2, (2,)), (-4, (0,)), (0, (0,)), (3, (3,)), ([-2, 1, -1], (2, 1, 3)), ([1, 1], (1, 1))],
)  # fmt: skip
def test_hidden_states_are_counted_with_the_embeddings(layer: Any, layers: tuple[int, ...]) -> None:
    found = read_tower(vision_feature_layer=layer)
    assert found.layers == layers
    assert found.width == 36 * len(layers)


@pytest.mark.parametrize("layer", [4, -5, [1, 9], [], True, "last", 1.0])
def test_a_layer_that_is_not_there_is_refused(layer: Any) -> None:
    refused(lambda: read_tower(vision_feature_layer=layer), "vision_feature_layer", repr(layer))


@pytest.mark.parametrize(
    ("kind", "strategy", "tokens"),
    [("clip_vision_model", "default", 9), ("clip_vision_model", "full", 10), ("dinov2", "default", 9),
     ("siglip_vision_model", "full", 9), ("siglip_vision_model", "default", 8)],
)  # fmt: skip
def test_tokens_of_a_tile(kind: str, strategy: str, tokens: int) -> None:
    """SigLIP has no class token: the reference's "default" drops its first patch."""
    found = read_tower(v_model_type=kind, vision_feature_select_strategy=strategy)
    assert found.tokens == tokens


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"v_num_attention_heads": 5}, ("vision_config.num_attention_heads = 5", "36")),
        ({"v_num_channels": 1}, ("vision_config.num_channels", "three")),
        ({"v_model_type": "vit"}, ("vision_config.model_type", "vit", "dinov2")),
        ({"v_patch_size": [10, 10]}, ("vision_config.patch_size",)),
        ({"v_layer_norm_eps": "small"}, ("vision_config.layer_norm_eps",)),
        ({"vision_feature_select_strategy": "cls"}, ("vision_feature_select_strategy", "cls", "full")),
        ({"vision_config": "clip"}, ("vision_config",)),
    ],
)  # fmt: skip
def test_vision_config_that_cannot_be_honoured(keys: dict[str, Any], said: tuple[str, ...]) -> None:
    refused(lambda: read_tower(**keys), *said)


def test_an_oblong_tile() -> None:
    found = read_tower(20, 45, v_model_type="dinov2", v_patch_size=10)
    assert found.encoder.grid == (2, 4)
    assert found.tokens == 8
