"""The operators Attention and CachedAttention of the native library against ONNX's standard ones.

With up to 4 queries they compute in float32: EXACT. With more, queries, keys, values and weights are
rounded to bfloat16, 2^-9 of each at most: an output is a mean of values, so its error is a few times that
of the largest value (WORST), and on average that of the outputs (TYPICAL).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from vlm_edge.runtime import native

LIBRARY = native.library()
pytestmark = pytest.mark.skipif(
    LIBRARY is None,
    reason="the native library is not built, switched off, or the CPU lacks AVX-512 BF16",
)

EXACT = 1e-5
WORST = 3 * 2.0**-9  # of the largest value
TYPICAL = 2.0**-8  # of the root of the mean square


def session(
    nodes: list[Any], inputs: dict[str, Any], outputs: tuple[str, ...], threads: int = 2
) -> Any:
    """Inputs: name -> (element type, dimensions)."""
    graph = helper.make_graph(
        nodes,
        "attention",
        [helper.make_tensor_value_info(name, *spec) for name, spec in inputs.items()],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
    )
    opsets = [helper.make_opsetid("", 24), helper.make_opsetid("vlm_edge", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=11)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.register_custom_ops_library(str(LIBRARY))
    return ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def assert_near(ours: np.ndarray, theirs: np.ndarray, values: np.ndarray, queries: int) -> None:
    error = np.abs(ours - theirs)
    if queries <= 4:
        assert error.max() <= EXACT
        return
    assert error.max() <= WORST * np.abs(values).max()
    assert np.sqrt((error**2).mean()) <= TYPICAL * np.sqrt((theirs**2).mean())


def random(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


# --- Attention


def attention_sessions(heads: int, kv_heads: int, head_dim: int, scale: float) -> tuple[Any, Any]:
    inputs = {
        "q": (TensorProto.FLOAT, ["b", "s", heads * head_dim]),
        "k": (TensorProto.FLOAT, ["b", "t", kv_heads * head_dim]),
        "v": (TensorProto.FLOAT, ["b", "t", kv_heads * head_dim]),
    }
    names = list(inputs)
    ours = helper.make_node(
        "Attention",
        names,
        ["y"],
        domain="vlm_edge",
        num_heads=heads,
        kv_num_heads=kv_heads,
        scale=scale,
    )
    theirs = helper.make_node(
        "Attention", names, ["y"], q_num_heads=heads, kv_num_heads=kv_heads, scale=scale
    )
    return session([ours], inputs, ("y",)), session([theirs], inputs, ("y",))


@pytest.mark.parametrize(
    ("batch", "queries", "keys", "heads", "kv_heads", "head_dim"),
    [
        (1, 577, 577, 3, 3, 64),  # CLIP-L/14-336
        (2, 257, 257, 2, 2, 64),  # DINOv2-S
        (1, 729, 729, 2, 2, 72),  # SigLIP-so400m
        (1, 33, 70, 6, 2, 80),
        (2, 48, 128, 4, 4, 16),  # whole blocks and tiles
        (1, 49, 129, 4, 4, 16),  # and one more
        (1, 5, 1, 4, 1, 20),  # one key
        (3, 7, 127, 2, 1, 256),
        (1, 13, 300, 1, 1, 7),
        (1, 6, 31, 8, 1, 33),
        (1, 10, 65, 2, 2, 320),
        (1, 1, 300, 3, 3, 8),  # float32 from here
        (2, 2, 31, 8, 1, 33),
        (1, 4, 1000, 7, 1, 96),
        (1, 3, 1, 2, 2, 1),
    ],
)
def test_attention(
    batch: int, queries: int, keys: int, heads: int, kv_heads: int, head_dim: int
) -> None:
    rng = np.random.default_rng(0)
    q = random(rng, batch, queries, heads * head_dim)
    k, v = (random(rng, batch, keys, kv_heads * head_dim) for _ in range(2))
    ours, theirs = attention_sessions(heads, kv_heads, head_dim, head_dim**-0.5)
    feed = {"q": q, "k": k, "v": v}
    assert_near(ours.run(None, feed)[0], theirs.run(None, feed)[0], v, queries)


def test_large_scores_with_a_common_part() -> None:
    """Keys often share a large part, such as a bias: it moves all scores alike and must cost nothing."""
    rng = np.random.default_rng(1)
    q, k, v = (random(rng, 1, 200, 2 * 64) for _ in range(3))
    k[..., ::16] += 40
    ours, theirs = attention_sessions(2, 2, 64, 0.125)
    feed = {"q": q, "k": k, "v": v}
    expected = theirs.run(None, feed)[0]
    assert_near(ours.run(None, feed)[0], expected, v, 200)


@pytest.mark.parametrize("queries", [3, 50])
def test_attention_keeps_nan(queries: int) -> None:
    rng = np.random.default_rng(2)
    q, k, v = random(rng, 1, queries, 128), random(rng, 1, 150, 128), random(rng, 1, 150, 128)
    ours, _ = attention_sessions(2, 2, 64, 0.125)
    q[0, 1, 3] = np.nan  # head 0 of query 1
    y = ours.run(None, {"q": q, "k": k, "v": v})[0]
    assert np.isnan(y[0, 1, :64]).all()
    assert np.isnan(y).sum() == 64
    q[0, 1, 3], k[0, 149, 70] = 0, np.nan  # head 1 of the last key
    y = ours.run(None, {"q": q, "k": k, "v": v})[0]
    assert np.isnan(y[..., 64:]).all()
    assert not np.isnan(y[..., :64]).any()
    k[0, 149, 70], v[0, 140, 5] = 0, np.nan  # one channel of one value
    y = ours.run(None, {"q": q, "k": k, "v": v})[0]
    assert np.isnan(y[..., 5]).all()
    assert np.isnan(y).sum() == queries


# --- CachedAttention


@dataclass(frozen=True)
class Case:
    heads: int
    kv_heads: int
    head_dim: int
    queries: int
    starts: tuple[int, ...]
    capacity: int
    rotary_dim: int = 0
    interleaved: int = 0
    window: int = 0
    shared_rotation: bool = False  # cos and sin with a batch of 1
    rotates: bool = True  # else there are neither

    @property
    def rotated(self) -> int:
        return self.rotary_dim or self.head_dim


OUTPUTS = ("y", "present_key", "present_value")


def cached_inputs(case: Case) -> dict[str, Any]:
    kv, f = case.kv_heads * case.head_dim, TensorProto.FLOAT
    past = (f, ["b", case.kv_heads, "c", case.head_dim])
    rotation = (f, ["rotations", "s", case.rotated // 2])
    return {
        "q": (f, ["b", "s", case.heads * case.head_dim]),
        "k": (f, ["b", "s", kv]),
        "v": (f, ["b", "s", kv]),
        **({"cos": rotation, "sin": rotation} if case.rotates else {}),
        "past_key": past,
        "past_value": past,
        "start": (TensorProto.INT64, ["b"]),
    }


def ours(case: Case, threads: int = 2) -> Any:
    inputs = cached_inputs(case)
    names = ["q", "k", "v", "cos", "sin", "past_key", "past_value", "start"]
    node = helper.make_node(
        "CachedAttention",
        [name if name in inputs else "" for name in names],
        list(OUTPUTS),
        domain="vlm_edge",
        num_heads=case.heads,
        kv_num_heads=case.kv_heads,
        scale=case.head_dim**-0.5,
        interleaved=case.interleaved,
        rotary_dim=case.rotary_dim,
        window=case.window,
    )
    return session([node], inputs, OUTPUTS, threads)


def standard(case: Case) -> Any:
    """The nodes that the portable graph has, with its float mask."""
    inputs = {**cached_inputs(case), "mask": (TensorProto.FLOAT, ["b", 1, "s", "c"])}

    def constant(name: str, *values: int) -> onnx.NodeProto:
        tensor = helper.make_tensor(name, TensorProto.INT64, [len(values)], values)
        return helper.make_node("Constant", [], [name], value=tensor)

    def split(name: str, heads: int) -> list[onnx.NodeProto]:
        return [
            constant(f"{name}_shape", 0, 0, heads, case.head_dim),
            helper.make_node("Reshape", [name, f"{name}_shape"], [f"{name}_4d"]),
            helper.make_node("Transpose", [f"{name}_4d"], [f"{name}_heads"], perm=[0, 2, 1, 3]),
        ]

    def rotate(name: str) -> onnx.NodeProto:
        if not case.rotates:
            return helper.make_node("Identity", [f"{name}_heads"], [f"{name}_rotated"])
        return helper.make_node(
            "RotaryEmbedding",
            [f"{name}_heads", "cos", "sin"],
            [f"{name}_rotated"],
            interleaved=case.interleaved,
            rotary_embedding_dim=case.rotary_dim,
        )

    def scatter(past: str, new: str, present: str) -> onnx.NodeProto:
        return helper.make_node("TensorScatter", [past, new, "start"], [present], axis=2)

    nodes = [
        *split("q", case.heads),
        *split("k", case.kv_heads),
        *split("v", case.kv_heads),
        rotate("q"),
        rotate("k"),
        scatter("past_key", "k_rotated", "present_key"),
        scatter("past_value", "v_heads", "present_value"),
        helper.make_node(
            "Attention", ["q_rotated", "present_key", "present_value", "mask"], ["mixed"]
        ),
        helper.make_node("Transpose", ["mixed"], ["tokens"], perm=[0, 2, 1, 3]),
        constant("joined", 0, 0, case.heads * case.head_dim),
        helper.make_node("Reshape", ["tokens", "joined"], ["y"]),
    ]
    return session(nodes, inputs, OUTPUTS)


def feed_of(case: Case, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    batch = len(case.starts)
    kv = case.kv_heads * case.head_dim
    rotations = 1 if case.shared_rotation else batch
    angles = 3 * random(rng, rotations, case.queries, case.rotated // 2)
    past = (batch, case.kv_heads, case.capacity, case.head_dim)
    return {
        "q": random(rng, batch, case.queries, case.heads * case.head_dim),
        "k": random(rng, batch, case.queries, kv),
        "v": random(rng, batch, case.queries, kv),
        **({"cos": np.cos(angles), "sin": np.sin(angles)} if case.rotates else {}),
        "past_key": random(rng, *past),
        "past_value": random(rng, *past),
        "start": np.array(case.starts, dtype=np.int64),
    }


def mask_of(case: Case) -> np.ndarray:
    position = np.array(case.starts)[:, None, None, None] + np.arange(case.queries)[:, None]
    key = np.arange(case.capacity)
    seen = key <= position
    if case.window:
        seen &= key > position - case.window
    return np.where(seen, 0, -np.inf).astype(np.float32)  # [batch, 1, queries, capacity]


SHAPES = [
    Case(9, 3, 64, 1, (0, 300), 600),  # SmolLM2-135M
    Case(14, 2, 64, 1, (777,), 1000, rotary_dim=32, interleaved=1),
    Case(8, 1, 256, 1, (777,), 1000, rotary_dim=64, window=100),  # multi-query
    Case(4, 4, 80, 1, (5, 260), 1000, rotary_dim=40, window=7),
    Case(4, 4, 20, 1, (0, 1), 300, interleaved=1),
    Case(4, 2, 72, 1, (0, 130), 400, shared_rotation=True),
    Case(5, 1, 8, 1, (129, 0, 64), 400, window=128),
    Case(6, 2, 96, 1, (511,), 800, rotary_dim=2),
    Case(2, 2, 22, 1, (256,), 500, window=1),
    Case(32, 32, 80, 1, (40,), 300, rotates=False),  # OPT-2.7B
    Case(5, 5, 7, 1, (0, 130), 400, rotates=False),
]


@pytest.mark.parametrize("queries", [1, 2, 4, 5, 37, 200])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cached_attention(shape: Case, queries: int) -> None:
    case = replace(shape, queries=queries)
    feed = feed_of(case)
    y, key, value = ours(case).run(None, feed)
    reference = {**feed, "mask": mask_of(case)}
    if case.shared_rotation:
        for name in ("cos", "sin"):
            reference[name] = np.repeat(feed[name], len(case.starts), 0)
    expected = standard(case).run(None, reference)
    np.testing.assert_allclose(key, expected[1], atol=1e-6)
    np.testing.assert_array_equal(value, expected[2])
    assert_near(
        y, expected[0], max(feed["v"], feed["past_value"], key=lambda a: np.abs(a).max()), queries
    )


@pytest.mark.parametrize("queries", [1, 50])
def test_in_place(queries: int) -> None:
    """One OrtValue bound as past and present: the same result, written where the past was."""
    case = replace(SHAPES[0], queries=queries)
    feed = feed_of(case)
    running = ours(case)
    expected = running.run(None, feed)
    binding = running.io_binding()
    bound = {name: ort.OrtValue.ortvalue_from_numpy(array.copy()) for name, array in feed.items()}
    for name, value in bound.items():
        binding.bind_ortvalue_input(name, value)
    binding.bind_ortvalue_output("present_key", bound["past_key"])
    binding.bind_ortvalue_output("present_value", bound["past_value"])
    binding.bind_output("y")
    running.run_with_iobinding(binding)
    np.testing.assert_array_equal(binding.get_outputs()[-1].numpy(), expected[0])
    np.testing.assert_array_equal(bound["past_key"].numpy(), expected[1])
    np.testing.assert_array_equal(bound["past_value"].numpy(), expected[2])


@pytest.mark.parametrize("window", [0, 60])
def test_chunks_and_steps_equal_the_whole(window: int) -> None:
    """Prefill of 150 tokens at once = in chunks = token by token, within bfloat16."""
    case = Case(6, 2, 64, 150, (0,), 160, window=window)
    running, feed = ours(case), feed_of(case)
    whole, key, value = running.run(None, feed)
    for chunk in (1, 64, 101):
        past = {"past_key": feed["past_key"], "past_value": feed["past_value"]}
        parts = []
        for at in range(0, case.queries, chunk):
            tokens = {
                name: feed[name][:, at : at + chunk] for name in ("q", "k", "v", "cos", "sin")
            }
            start = np.array([at], dtype=np.int64)
            y, *presents = running.run(None, {**tokens, **past, "start": start})
            past = dict(zip(past, presents, strict=True))
            parts.append(y)
        np.testing.assert_array_equal(past["past_key"], key)
        np.testing.assert_array_equal(past["past_value"], value)
        assert_near(np.concatenate(parts, axis=1), whole, feed["v"], case.queries)


@pytest.mark.parametrize("queries", [2, 50])
def test_what_is_not_seen_does_not_matter(queries: int) -> None:
    """NaN in the cache behind the last position, before the window, or in a later key."""
    case = Case(4, 2, 64, queries, (200,), 400, window=20)
    running, feed = ours(case), feed_of(case)
    expected = running.run(None, feed)[0]
    dirty = {name: feed[name].copy() for name in ("past_key", "past_value")}
    for past in dirty.values():
        past[:, :, 200:] = np.nan
        past[:, :, :128] = np.nan  # whole tiles before the window
    np.testing.assert_array_equal(running.run(None, {**feed, **dirty})[0], expected)
    dirty["past_key"][:, :, :180] = np.nan  # a part of a tile
    near = EXACT if queries <= 4 else 5 * WORST
    np.testing.assert_allclose(running.run(None, {**feed, **dirty})[0], expected, atol=near)
    later = feed["k"].copy()
    later[:, -1] = np.nan
    y = running.run(None, {**feed, "k": later})[0]
    np.testing.assert_allclose(y[:, :-1], expected[:, :-1], atol=near)
    assert np.isnan(y[:, -1]).all()


@pytest.mark.parametrize("queries", [1, 80])
def test_threads_do_not_matter(queries: int) -> None:
    """The same bits whoever computes: nothing is split by the number of threads."""
    case = Case(9, 3, 64, queries, (1000,), 1100)
    feed = feed_of(case)
    alone = ours(case, threads=1).run(None, feed)[0]
    for threads in (2, 3):
        np.testing.assert_array_equal(ours(case, threads).run(None, feed)[0], alone)


def test_errors_name_the_input() -> None:
    case = Case(4, 2, 64, 3, (0,), 10)
    running, feed = ours(case), feed_of(case)
    start = np.array([8], dtype=np.int64)
    with pytest.raises(
        Exception, match="3 tokens at position 8 do not fit a cache of 10 positions"
    ):
        running.run(None, {**feed, "start": start})
    with pytest.raises(Exception, match="position -1"):
        running.run(None, {**feed, "start": start - 9})
    with pytest.raises(Exception, match="k must have as many tokens as q"):
        running.run(None, {**feed, "k": feed["k"][:, :2], "v": feed["v"][:, :2]})
    with pytest.raises(Exception, match="past_value must be"):
        running.run(None, {**feed, "past_value": feed["past_value"][:, :, :5]})
    with pytest.raises(Exception, match="kv_num_heads must divide num_heads"):
        attention_sessions(3, 2, 8, 1.0)
    with pytest.raises(Exception, match="rotary_dim must be even"):
        ours(replace(case, rotary_dim=3))


def test_a_rotation_is_whole_or_absent() -> None:
    case = Case(4, 2, 64, 3, (0,), 10)
    inputs = cached_inputs(case)
    names = ["q", "k", "v", "cos", "", "past_key", "past_value", "start"]
    node = helper.make_node(
        "CachedAttention", names, list(OUTPUTS), domain="vlm_edge", num_heads=4, kv_num_heads=2
    )
    with pytest.raises(Exception, match="cos and sin must both be there, or neither"):
        session([node], inputs, OUTPUTS)
