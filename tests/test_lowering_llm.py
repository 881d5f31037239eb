"""A language model lowered for the CPU: same logits and cache as the portable graph, in every form.

Cases cover GQA, MQA, biases, windows in all layers and in one of two, head widths that an operator
refuses, scaled rotary positions.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from vlm_edge.runtime import native
from vlm_edge.runtime.feeds import prefill_feeds, windows
from vlm_edge.runtime.manifest import Manifest, read_manifest
from vlm_edge.runtime.ort import open_session

CASES = ["clip-llama", "clip-llama-v4", "clip-llama-native", "clip-llama-biases", "clip-mistral-window",
         "siglip-qwen2", "siglip-llama-yarn-v4", "clip-padded-square"]  # fmt: skip
EXACT = 2e-5  # float32 sums in another order; logits are of order 3
ROUNDING = 0.06  # relative; up to 0.04 through two layers that round the input of every product
NATIVE = pytest.mark.skipif(native.library() is None, reason="our kernels were not built here")


def run(graph: Path, manifest: Manifest, length: int, room: int = 0) -> dict[str, np.ndarray]:
    """All outputs for a prompt of random embeddings, in a cache with `room` unused positions."""
    session = open_session(graph, "llm", 1)
    rng = np.random.default_rng(length)
    embeds = rng.standard_normal((1, length, manifest.decoder.width)).astype(np.float32)
    feeds = prefill_feeds(manifest.decoder, embeds)
    for name, value in feeds.items():
        if name.startswith("past."):
            feeds[name] = np.pad(value, ((0, 0), (0, 0), (0, room), (0, 0)))
        elif name.endswith("_mask"):
            masked = np.finfo(np.float32).min
            feeds[name] = np.pad(value, ((0, 0),) * 3 + ((0, room),), constant_values=masked)
    feeds["logit_positions"] = np.arange(length)
    inputs = {spec.name for spec in session.get_inputs()}
    names = [spec.name for spec in session.get_outputs()]
    found = session.run(names, {k: v for k, v in feeds.items() if k in inputs})
    return dict(zip(names, found, strict=True))


def pair(
    folder: Path, kind: str, *args: Any
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    manifest = read_manifest(folder)
    entry = manifest.engines["llm"]
    return tuple(run(folder / g, manifest, *args) for g in (entry.graph, entry.lowered[kind]))  # type: ignore[return-value]


@pytest.mark.parametrize("length", [1, 2, 29])
@pytest.mark.parametrize("case", CASES)
def test_full_precision_is_equal(case: str, length: int, bundle: Callable[..., Path]) -> None:
    folder = bundle(case)
    heads = read_manifest(folder).decoder.head_dim
    if heads % 8:
        # The operator would refuse it.
        assert read_manifest(folder).engines["llm"].lowered.keys() == {"cuda"}
        return
    portable, lowered = pair(folder, "cpu", length)
    assert portable.keys() == lowered.keys()
    for name, expected in portable.items():
        np.testing.assert_allclose(lowered[name], expected, rtol=0, atol=EXACT, err_msg=name)


def test_attention_is_grouped_and_no_mask_is_left(bundle: Callable[..., Path]) -> None:
    folder = bundle("clip-mistral-window")
    entry = read_manifest(folder).engines["llm"]
    portable, lowered = (ir.load(folder / g).graph for g in (entry.graph, entry.lowered["cpu"]))
    kinds = [node.op_type for node in lowered]
    layers = read_manifest(folder).decoder.layers
    assert kinds.count("GroupQueryAttention") == layers
    assert not {"Attention", "TensorScatter", "Transpose"} & set(kinds)
    assert {v.name for v in portable.inputs} - {v.name for v in lowered.inputs} == {
        "sliding_attention_mask", "write_indices"
    }  # fmt: skip
    assert [v.name for v in portable.outputs] == [v.name for v in lowered.outputs]
    assert not (folder / "llm.cpu.data").exists()


@NATIVE
@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize("length", [1, 2, 29])
@pytest.mark.parametrize("case", CASES)
def test_our_kernels_give_the_quantized_model(
    case: str, length: int, precision: str, bundle: Callable[..., Path]
) -> None:
    """Ours round activations to int8 by block, where ONNX Runtime may keep them in float: a graph that
    reads another layer, weight or position is off by ten times the bound."""
    portable, lowered = pair(bundle(case, precision), "cpu-native", length, 7)
    for name, expected in portable.items():
        error = np.linalg.norm(lowered[name] - expected) / np.linalg.norm(expected)
        assert error < ROUNDING, name


@NATIVE
def test_a_window_is_honoured_by_our_attention(bundle: Callable[..., Path]) -> None:
    """Far keys changed: a window must not see them, so the last logits stay bit for bit."""
    folder = bundle("clip-mistral-window", "int8")
    manifest = read_manifest(folder)
    window = manifest.decoder.sliding_window
    assert window == windows(manifest.decoder)["sliding_attention_mask"] == 11
    session = open_session(folder / manifest.engines["llm"].lowered["cpu-native"], "llm", 1)
    rng = np.random.default_rng(0)
    embeds = rng.standard_normal((1, 1, manifest.decoder.width)).astype(np.float32)
    shape = (1, manifest.decoder.kv_heads, 40, manifest.decoder.head_dim)
    past = {
        f"past.{kv}.{i}": rng.standard_normal(shape).astype(np.float32)
        for i in range(manifest.decoder.layers)
        for kv in ("key", "value")
    }
    rest = {
        "inputs_embeds": embeds, "positions": np.array([[30]]), "write_indices": np.array([30]),
        "logit_positions": np.array([0]),
    }  # fmt: skip
    (before,) = session.run(["logits"], {**rest, **past})
    for value in past.values():
        value[:, :, :20] = rng.standard_normal(value[:, :, :20].shape)  # keys 20..30 are seen
    (after,) = session.run(["logits"], {**rest, **past})
    np.testing.assert_array_equal(before, after)
    for value in past.values():
        value[:, :, 20] += 1
    (seen,) = session.run(["logits"], {**rest, **past})
    assert np.abs(seen - after).max() > 1e-4
