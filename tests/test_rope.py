"""Rotary positions: cosines and sines of the graph against transformers' own, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_graph import run, write

from vlm_edge.errors import UnsupportedConfig
from vlm_edge.export.config import Config
from vlm_edge.export.layers.rope import KINDS, Rope, read_rope

TRAINED = 640  # max_position_embeddings
POSITIONS = np.array([0, 1, 2, 63, 64, 400, 639, 640, 1000, 2047, 4500, 8191])

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 160}

# name -> rope_parameters, head_dim
CASES: dict[str, tuple[dict[str, Any], int]] = {
    "default": ({"rope_type": "default", "rope_theta": 10000.0}, 12),
    "default, another base": ({"rope_type": "default", "rope_theta": 500000}, 64),
    "linear": ({"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0}, 12),
    "dynamic": ({"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}, 12),
    "dynamic, odd factor": ({"rope_type": "dynamic", "rope_theta": 5000.0, "factor": 2.7}, 32),
    "llama3": ({**LLAMA3, "rope_theta": 500000.0, "original_max_position_embeddings": 64}, 64),
    "llama3, all bands": (
        {**LLAMA3, "factor": 32.0, "low_freq_factor": 1.5, "rope_theta": 10000.0,
         "original_max_position_embeddings": 300}, 128),
    "llama3, length of the model": ({**LLAMA3, "rope_theta": 10000.0}, 16),
    "yarn": ({**YARN, "rope_theta": 10000.0}, 12),
    "yarn, wide head": ({**YARN, "rope_theta": 1000000.0, "factor": 16}, 128),
    "yarn, length of the model": ({"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0}, 16),
    "yarn, factor from the lengths": ({**YARN, "rope_theta": 10000.0, "factor": None}, 16),
    "yarn, smaller than one": ({**YARN, "rope_theta": 10000.0, "factor": 0.5}, 16),
    "yarn, attention_factor": ({**YARN, "rope_theta": 10000.0, "attention_factor": 1.3}, 16),
    "yarn, mscale": (
        {**YARN, "rope_theta": 10000.0, "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.707}, 16),
    "yarn, mscale alone": (
        {**YARN, "rope_theta": 10000.0, "factor": 5.0, "mscale": 0.707}, 16),
    "yarn, betas": ({**YARN, "rope_theta": 10000.0, "beta_fast": 8.0, "beta_slow": 2.0}, 32),
    "yarn, not truncated": ({**YARN, "rope_theta": 10000.0, "truncate": False}, 48),
    "yarn, empty ramp": ({**YARN, "rope_theta": 10000.0, "original_max_position_embeddings": 4}, 16),
}  # fmt: skip


def theirs(parameters: dict[str, Any], head_dim: int, positions: np.ndarray) -> list[np.ndarray]:
    """Cosines and sines [s, head_dim / 2] of transformers, as on a first call."""
    import torch
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
    from transformers.utils import logging

    logging.set_verbosity_error()
    config = LlamaConfig(
        hidden_size=head_dim, num_attention_heads=1, head_dim=head_dim,
        max_position_embeddings=TRAINED, rope_parameters=dict(parameters),
    )  # fmt: skip
    rotary = LlamaRotaryEmbedding(config)
    pair = rotary(torch.zeros(1, dtype=torch.float32), torch.tensor(positions)[None])
    assert all(torch.equal(*half.chunk(2, dim=-1)) for half in pair)  # both halves are one
    return [half[0, :, : head_dim // 2].numpy() for half in pair]


def ours(rope: Rope, positions: np.ndarray, path: Path) -> list[np.ndarray]:
    half = ("batch", "sequence", rope.head_dim // 2)
    write(
        path,
        lambda op, x: list(rope(op, x["positions"])),
        {"positions": ("int64", ("batch", "sequence"))},
        {"cos": ("float32", half), "sin": ("float32", half)},
    )
    return [half[0] for half in run(path, {"positions": positions[None]})]


@pytest.mark.parametrize("name", CASES)
def test_cosines_and_sines_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    """The angle at position p has an error of p * 2^-24 from float32 alone: 5e-4 at 8191."""
    parameters, head_dim = CASES[name]
    rope = read_rope(Config({"rope_parameters": parameters}), head_dim, TRAINED)
    dynamic = parameters["rope_type"] == "dynamic"
    # The reference's dynamic base depends on the longest position of the call.
    calls = [POSITIONS[:n] for n in range(2, len(POSITIONS) + 1)] if dynamic else [POSITIONS]
    for positions in calls:
        found = ours(rope, positions, tmp_path / "rope.onnx")
        expected = theirs(parameters, head_dim, positions)
        allowed = 1e-6 + positions[:, None] * 2.0**-23
        for mine, reference in zip(found, expected, strict=True):
            assert mine.dtype == np.float32
            assert (np.abs(mine - reference) <= allowed).all()


def test_the_cases_differ_from_each_other() -> None:
    """Otherwise a key that is ignored would not show above."""
    tables = [np.stack(theirs(*case, POSITIONS)).ravel() for case in CASES.values()]
    same = {
        (a, b)
        for i, a in enumerate(CASES)
        for j, b in enumerate(CASES)
        if i < j and tables[i].shape == tables[j].shape and np.allclose(tables[i], tables[j])
    }
    assert same == set()


def test_dynamic_stretches_the_positions() -> None:
    assert reach(CASES["dynamic"][0]) == 2 * TRAINED
    assert reach({}) == TRAINED


def reach(parameters: dict[str, Any], positions: int = TRAINED) -> int:
    return read_rope(Config({"rope_parameters": parameters}), 12, positions).max_positions


@pytest.mark.parametrize("kind", ["linear", "yarn", "llama3"])
def test_scaling_stretches_the_trained_length_once(kind: str) -> None:
    """max_position_embeddings may be the trained length (Qwen2 with YaRN) or the stretched one
    (Llama 3.1, whose original length is a key of its own)."""
    values = {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0}
    values |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0} if kind == "llama3" else {}
    assert reach(values, 64) == 256
    if kind != "linear":
        assert reach(values | {"original_max_position_embeddings": 64}, 64) == 256
        assert reach(values | {"original_max_position_embeddings": 64}, 200) == 200


@pytest.mark.parametrize("name", [n for n in CASES if CASES[n][0].get("factor", 1) is not None])
@pytest.mark.parametrize("key", ["type", "rope_type"])
def test_both_spellings_are_read_alike(name: str, key: str) -> None:
    """transformers 4 wrote rope_theta beside rope_scaling, whose kind was "type" or "rope_type"."""
    parameters, head_dim = CASES[name]
    scaling = dict(parameters)
    theta, kind = scaling.pop("rope_theta"), scaling.pop("rope_type")
    old = Config({"rope_theta": theta, "rope_scaling": {key: kind, **scaling}})
    new = Config({"rope_parameters": parameters})
    first, second = (read_rope(config, head_dim, TRAINED) for config in (old, new))
    np.testing.assert_array_equal(first.inverse, second.inverse)
    assert (first.scaling, first.dynamic, first.theta) == (
        second.scaling,
        second.dynamic,
        second.theta,
    )
    old.finish()
    new.finish()


def test_nothing_said_is_the_default() -> None:
    plain = read_rope(Config({"rope_scaling": None}), 12, TRAINED)
    expected = 10000.0 ** (-np.arange(0, 12, 2) / 12)
    np.testing.assert_allclose(plain.inverse, expected, rtol=1e-6)
    assert (plain.scaling, plain.dynamic) == (1.0, None)


@pytest.mark.parametrize(
    ("values", "head_dim", "said"),
    [
        ({"rope_parameters": {"rope_type": "longrope"}}, 12, ("rope_parameters.rope_type", "longrope")),
        ({"rope_scaling": {"type": "su", "factor": 2}}, 12, ("rope_scaling.rope_type", "su")),
        ({"partial_rotary_factor": 0.5}, 12, ("text_config.partial_rotary_factor", "0.5")),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25}}, 12,
         ("rope_parameters.partial_rotary_factor", "0.25")),
        ({}, 13, ("head_dim", "13")),
        ({"rope_parameters": {"rope_type": "linear"}}, 12, ("rope_parameters.factor", "number")),
        ({"rope_parameters": {"rope_type": "linear", "factor": "2"}}, 12, ("rope_parameters.factor",)),
        ({"rope_parameters": {"rope_type": "linear", "factor": True}}, 12, ("rope_parameters.factor",)),
        ({"rope_parameters": {**LLAMA3, "low_freq_factor": None}}, 12, ("low_freq_factor",)),
        ({"rope_parameters": {"rope_type": "default", "mrope_section": [2, 2, 2]}}, 12,
         ("rope_parameters.mrope_section",)),
        ({"rope_parameters": {"rope_type": "default", "factor": 2.0}}, 12, ("rope_parameters.factor",)),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, 12, ("full_attention",)),
        ({"rope_parameters": [1, 2]}, 12, ("text_config.rope_parameters",)),
        ({"rope_scaling": "linear"}, 12, ("text_config.rope_scaling",)),
        ({"rope_theta": "10000"}, 12, ("text_config.rope_theta",)),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": "big"}}, 12, ("rope_theta",)),
    ],
)  # fmt: skip
def test_what_cannot_be_honoured_is_refused_by_key(
    values: dict[str, Any], head_dim: int, said: tuple[str, ...]
) -> None:
    with pytest.raises(UnsupportedConfig) as caught:
        read_rope(Config(values, "text_config"), head_dim, TRAINED)
    for word in ("text_config", *said):
        assert word in str(caught.value)


def test_the_refusal_lists_the_known_kinds() -> None:
    with pytest.raises(UnsupportedConfig) as caught:
        read_rope(Config({"rope_scaling": {"rope_type": "x"}}), 12, TRAINED)
    for kind in KINDS:
        assert kind in str(caught.value)
