"""The int8 cache: rounding, graph, runtime, our kernels and the command line.

The graph is compared with attention written out in numpy; however positions come in (whole, in chunks,
one by one) the int8 cache must hold the same numbers, up to values that lie between two of them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import onnxruntime
import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper

from vlm_edge import VLM
from vlm_edge.cli import export as cli_export
from vlm_edge.cli.main import cli
from vlm_edge.errors import BundleDamaged, EngineFailure, SettingError
from vlm_edge.export.graphs import DTYPES, Interface, build, save
from vlm_edge.export.layers import cache
from vlm_edge.export.lowering import tensorrt
from vlm_edge.export.pipeline import export
from vlm_edge.export.precision import PrecisionPlan
from vlm_edge.export.verify import verify
from vlm_edge.runtime import native, ort, ort_decoder
from vlm_edge.runtime.bundle import Bundle
from vlm_edge.runtime.feeds import causal_mask, empty_cache, prefill_feeds, windows
from vlm_edge.runtime.manifest import CacheDtype, DecoderSettings, TensorSpec, read_manifest
from vlm_edge.runtime.ort import open_session
from vlm_edge.runtime.ort_decoder import CHUNK, OrtDecoder
from vlm_edge.runtime.plans import PlanProfile

# GQA; MQA with head_dim 12; a window in all layers; a window in one; MQA with head_dim 10 and no lowering
CASES = ["clip-llama-v4", "clip-llama-native", "clip-mistral-window", "siglip-qwen2", "clip-mistral-v4"]  # fmt: skip
# Float sums in another order move a key across the middle of two int8 values now and then, which moves
# the logits (of order 3) by much less than the rounding itself does.
TIES = 0.03
NATIVE = pytest.mark.skipif(native.library() is None, reason="our kernels were not built here")

Make = Callable[..., Path]


@pytest.fixture(scope="module")
def rounded(tmp_path_factory: pytest.TempPathFactory, checkpoint: Callable[[str], Path]) -> Make:
    """rounded(case, precision="fp32") -> folder of the bundle with an int8 cache; do not write into it."""
    root, made = tmp_path_factory.mktemp("rounded"), set[Path]()

    def make(case: str, precision: str = "fp32") -> Path:
        folder = root / f"{case}-{precision}"
        if folder not in made:
            plan = PrecisionPlan.uniform(precision)
            export(checkpoint(case), folder, precision=plan, cache_dtype="int8")
            made.add(folder)
        return folder

    return make


def random(folder: Path, count: int, seed: int = 0) -> np.ndarray:
    """inputs_embeds [1, count, width]"""
    width = read_manifest(folder).decoder.width
    return np.random.default_rng(seed).standard_normal((1, count, width)).astype(np.float32)


def opened(folder: Path, kind: str | None = None) -> OrtDecoder:
    """The decoder of a bundle, of its portable graph unless `kind` is a lowering."""
    bundle = Bundle(folder, check=False)
    entry = bundle.manifest.engines["llm"]
    name = entry.graph if kind is None else entry.lowered[kind]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ort, "graph_of", lambda *_: folder / name)
        return OrtDecoder(bundle, threads=1)


def arrays(decoder: Any) -> dict[str, np.ndarray]:
    """The cache as numpy arrays over its own memory."""
    return {name: value.numpy() for name, value in decoder._caches.items()}


def round_rows(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    scale = np.maximum(np.abs(x).max(axis=-1, keepdims=True) / np.float32(127), np.float32(1e-30))
    return np.rint(x / scale).astype(np.int8), scale.astype(np.float32)


# --- the graph


def graph_of(folder: Path, case: tuple[int, int, int], dtype: CacheDtype) -> Any:
    """A session of one attention without rotation: q, k, v, mask, at and the cache -> y and the cache."""
    heads, kv_heads, head_dim = case
    settings = DecoderSettings(1, kv_heads, head_dim, 0, 0, 0, None, True, dtype)
    arrays = settings.cache()
    io = Interface(
        (
            TensorSpec("q", "float32", ("batch", heads, "s", head_dim)),
            TensorSpec("k", "float32", ("batch", kv_heads, "s", head_dim)),
            TensorSpec("v", "float32", ("batch", kv_heads, "s", head_dim)),
            TensorSpec("mask", "float32", ("batch", 1, "s", "capacity")),
            TensorSpec("at", "int64", ("batch",)),
            *(TensorSpec(f"past.{a.name}", a.dtype, a.shape) for a in arrays),
        ),
        (
            TensorSpec("y", "float32", ("batch", heads, "s", head_dim)),
            *(TensorSpec(f"present.{a.name}", a.dtype, a.shape) for a in arrays),
        ),
    )

    def forward(op: Any, x: dict[str, Any]) -> list[Any]:
        past = [x[f"past.{a.name}"] for a in arrays]
        keys, values, written = cache.write(op, past, x["k"], x["v"], x["at"])
        return [op.Attention(x["q"], keys, values, x["mask"]), *written]

    save(build("attention", io, forward), folder / "g.onnx")
    return onnxruntime.InferenceSession(folder / "g.onnx", providers=["CPUExecutionProvider"])


def attended(q: np.ndarray, keys: np.ndarray, values: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """float64 attention: q [b, heads, s, hd], keys and values [b, kv_heads, n, hd], mask [b, 1, s, n]"""
    group = q.shape[1] // keys.shape[1]
    keys, values = (np.repeat(x.astype(np.float64), group, axis=1) for x in (keys, values))
    scores = q @ keys.swapaxes(2, 3) / np.sqrt(q.shape[3]) + mask
    weights = np.exp(scores - scores.max(axis=3, keepdims=True))
    return weights / weights.sum(axis=3, keepdims=True) @ values


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("case", [(4, 4, 8), (6, 2, 12), (5, 1, 7), (9, 3, 64)], ids=str)
def test_graph_is_attention_over_rounded_keys_and_values(
    case: tuple[int, int, int], window: int | None, tmp_path: Path
) -> None:
    """Two sequences that are at different positions, over a cache that holds something and has room."""
    heads, kv_heads, head_dim = case
    session, rng = graph_of(tmp_path, case, "int8"), np.random.default_rng(0)
    batch, count, capacity, at = 2, 3, 20, np.array([6, 11])

    def draw(rows: int, tokens: int) -> np.ndarray:
        return rng.standard_normal((batch, rows, tokens, head_dim)).astype(np.float32)

    q, k, v = draw(heads, count), draw(kv_heads, count), draw(kv_heads, count)
    past = {
        name: array
        for kind in ("key", "value")
        for name, array in zip(
            (f"past.{kind}.0", f"past.{kind}_scale.0"),
            round_rows(draw(kv_heads, capacity)),
            strict=True,
        )
    }
    mask = np.stack([causal_mask(b + np.arange(count), capacity, window)[None] for b in at])
    given = {"q": q, "k": k, "v": v, "mask": mask, "at": at, **past}
    names = [spec.name for spec in session.get_outputs()]
    found = dict(zip(names, session.run(None, given), strict=True))

    seen = {}
    for kind, new in (("key", k), ("value", v)):
        values, scales = past[f"past.{kind}.0"].copy(), past[f"past.{kind}_scale.0"].copy()
        for b in range(batch):
            span = slice(at[b], at[b] + count)
            values[b, :, span], scales[b, :, span] = round_rows(new[b])
        np.testing.assert_array_equal(found[f"present.{kind}.0"], values)
        np.testing.assert_array_equal(found[f"present.{kind}_scale.0"], scales)
        assert found[f"present.{kind}.0"].dtype == np.int8
        seen[kind] = values * scales
        assert np.abs(values).max() == 127  # the whole range is used, and no more
    expected = attended(q, seen["key"], seen["value"], mask)
    np.testing.assert_allclose(found["y"], expected, atol=2e-5)


def test_rows_of_zeros_tiny_numbers_and_nan(tmp_path: Path) -> None:
    """Zeros are divided by nothing, subnormal rows do not overflow, NaN stays with its position."""
    case = (1, 1, 4)
    session = graph_of(tmp_path, case, "int8")
    k = np.zeros((1, 1, 4, 4), np.float32)
    k[0, 0, 1] = 1e-40
    k[0, 0, 2] = [1e38, -3e38, 0, 1]
    k[0, 0, 3, 0] = np.nan
    empty = empty_cache(DecoderSettings(1, 1, 4, 0, 0, 0, None, True, "int8"), 4)
    given = {
        "q": k,
        "k": k,
        "v": k,
        "mask": np.zeros((1, 1, 4, 4), np.float32),
        "at": np.array([0]),
    }
    names = [spec.name for spec in session.get_outputs()]
    outputs = session.run(None, given | {f"past.{name}": array for name, array in empty.items()})
    found = dict(zip(names, outputs, strict=True))
    stored = found["present.key.0"].astype(np.float32) * found["present.key_scale.0"]
    np.testing.assert_array_equal(stored[0, 0, :2], 0)
    np.testing.assert_allclose(stored[0, 0, 2], k[0, 0, 2], atol=3e38 / 250)
    assert np.isnan(stored[0, 0, 3]).any()
    assert np.isfinite(found["present.key_scale.0"][0, 0, :3]).all()


# --- settings


def test_the_caches_shapes_and_bytes_follow_the_settings() -> None:
    float32 = DecoderSettings(2, 3, 10, 0, 0, 0, None, True)
    int8 = DecoderSettings(2, 3, 10, 0, 0, 0, None, True, "int8")
    assert float32.cache_dtype == "float32"  # bundles of before have no such key
    assert [spec.name for spec in float32.cache()] == ["key.0", "value.0", "key.1", "value.1"]
    assert {spec.dtype for spec in float32.cache()} == {"float32"}
    arrays = empty_cache(int8, 7)
    assert {name: (str(a.dtype), a.shape) for name, a in arrays.items() if name.endswith(".1")} == {
        "key.1": ("int8", (1, 3, 7, 10)), "value.1": ("int8", (1, 3, 7, 10)),
        "key_scale.1": ("float32", (1, 3, 7, 1)), "value_scale.1": ("float32", (1, 3, 7, 1)),
    }  # fmt: skip
    for settings in (float32, int8):
        held = sum(array.nbytes for array in empty_cache(settings, 7).values())
        assert settings.cache_bytes() * 7 == held
    assert set(cli_export.CACHES) == set(get_args(CacheDtype)) < DTYPES.keys()


def test_a_manifest_that_contradicts_its_graph_is_refused(rounded: Make, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(rounded("clip-llama-native"), folder)
    data = json.loads((folder / "manifest.json").read_text())
    assert data["decoder"]["cache_dtype"] == "int8"
    del data["decoder"]["cache_dtype"]
    (folder / "manifest.json").write_text(json.dumps(data))
    with pytest.raises(BundleDamaged, match="cache is int8, its settings say float32"):
        Bundle(folder)
    data["decoder"]["cache_dtype"] = "int4"
    (folder / "manifest.json").write_text(json.dumps(data))
    with pytest.raises(BundleDamaged, match=r"decoder\.cache_dtype is 'int4'"):
        Bundle(folder)


# --- the decoder


@pytest.mark.parametrize("case", CASES)
def test_close_to_the_float_cache(case: str, rounded: Make, bundle: Make) -> None:
    """As far as int8 with a scale a row can be, and not the same."""
    x = random(bundle(case), 60)
    plain, ours = (opened(folder).prefill(x) for folder in (bundle(case), rounded(case)))
    error = np.linalg.norm(ours - plain) / np.linalg.norm(plain)
    assert 1e-5 < error < 0.08


@pytest.mark.parametrize("case", CASES)
def test_chunks_and_steps_are_the_whole(
    case: str, rounded: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In chunks and one by one, across growing caches: the same logits and the same int8 numbers."""
    folder = rounded(case)
    monkeypatch.setattr(ort_decoder, "ROOM", ort_decoder.STEP)
    count = 2 * ort_decoder.STEP + 3
    x, decoder = random(folder, count), opened(folder)
    if not read_manifest(folder).decoder.chunked_prefill:
        pytest.skip("its rotations depend on the whole call")
    whole = decoder.prefill(x).copy()
    caches = {name: array[:, :, :count].copy() for name, array in arrays(decoder).items()}

    def same(found: np.ndarray, decoder: OrtDecoder) -> None:
        np.testing.assert_allclose(found, whole, rtol=0, atol=TIES)
        for name, array in arrays(decoder).items():
            now = array[:, :, :count]
            if array.dtype == np.int8:
                moved = now.astype(int) != caches[name]
                assert moved.mean() < 0.02, name
                assert np.abs(now.astype(int) - caches[name]).max() <= 2, name
            else:
                np.testing.assert_allclose(now, caches[name], rtol=0.02, err_msg=name)

    for chunk in (1, 7, 64):
        monkeypatch.setattr(ort_decoder, "CHUNK", chunk)
        decoder.clear()
        same(decoder.prefill(x), decoder)
    monkeypatch.setattr(ort_decoder, "CHUNK", CHUNK)
    decoder.clear()
    assert decoder.capacity == 0
    for index in range(count):
        found = decoder.decode(x[0, index])
    same(found, decoder)


def test_a_prefix_is_used_again(rounded: Make) -> None:
    """Cut back to a prefix and gone on otherwise: as if the other had been said at once."""
    folder = rounded("clip-mistral-window")
    x, other = random(folder, 80), random(folder, 50, seed=1)
    decoder, fresh = opened(folder), opened(folder)
    decoder.prefill(x)
    decoder.length = 30
    found = decoder.prefill(other).copy()
    expected = fresh.prefill(np.concatenate([x[:, :30], other], axis=1))
    np.testing.assert_allclose(found, expected, rtol=0, atol=TIES)
    np.testing.assert_allclose(decoder.decode(x[0, 0]), fresh.decode(x[0, 0]), rtol=0, atol=TIES)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_bundle_answers(precision: str, rounded: Make, pictures: dict[str, Path]) -> None:
    """Through the public class, pictures and a second question included."""
    with VLM.load(rounded("clip-llama-v4", precision), threads=1) as vlm:
        chat = vlm.chat()
        first = chat.ask("what is it?", images=[pictures["wide.png"]], max_new_tokens=4)
        chat.ask("and then?", max_new_tokens=4)
        again = vlm.chat().ask("what is it?", images=[pictures["wide.png"]], max_new_tokens=4)
        assert first.token_ids == again.token_ids
        assert arrays(vlm.decoder)["key.0"].dtype == np.int8


def test_calibration_takes_the_cache_in(rounded: Make, bundle: Make) -> None:
    """The divergence of INT4 weights in the manifest is that of weights and cache together."""
    figures = []
    for folder in (bundle("clip-llama-native", "int4"), rounded("clip-llama-native", "int4")):
        calibration = read_manifest(folder).calibration
        assert calibration is not None
        figures.append(calibration["parts"]["llm"]["kl"])
    assert figures[0] != figures[1]
    assert figures[1] < figures[0] + 0.05


# --- our kernels


def operator(case: tuple[int, int, int], window: int) -> Any:
    """A session of CachedAttentionInt8."""
    heads, kv_heads, head_dim = case
    f, i8 = TensorProto.FLOAT, TensorProto.INT8
    new, past = ["b", "s", kv_heads * head_dim], ["b", kv_heads, "c", head_dim]
    scale, turns = ["b", kv_heads, "c", 1], ["b", "s", head_dim // 2]
    inputs = {
        "q": (f, ["b", "s", heads * head_dim]), "k": (f, new), "v": (f, new), "cos": (f, turns),
        "sin": (f, turns), "past.key": (i8, past), "past.value": (i8, past),
        "start": (TensorProto.INT64, ["b"]), "past.key_scale": (f, scale), "past.value_scale": (f, scale),
    }  # fmt: skip
    outputs = {
        "y": inputs["q"],
        **{n.replace("past", "present"): s for n, s in inputs.items() if "." in n},
    }
    node = helper.make_node(
        "CachedAttentionInt8", list(inputs), list(outputs), domain="vlm_edge", num_heads=heads,
        kv_num_heads=kv_heads, scale=head_dim**-0.5, window=window,
    )  # fmt: skip
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info(name, *spec) for name, spec in inputs.items()],
        [helper.make_tensor_value_info(name, *spec) for name, spec in outputs.items()],
    )
    opsets = [helper.make_opsetid("", 24), helper.make_opsetid("vlm_edge", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=11)
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(native.library()))
    return onnxruntime.InferenceSession(model.SerializeToString(), options)


def split(x: np.ndarray, heads: int) -> np.ndarray:
    """[b, s, heads * hd] -> [b, heads, s, hd]"""
    return x.reshape(*x.shape[:2], heads, -1).swapaxes(1, 2)


@NATIVE
@pytest.mark.parametrize("window", [0, 100])
@pytest.mark.parametrize("count", [1, 3, 4, 5, 150])
@pytest.mark.parametrize(
    "case", [(9, 3, 64), (4, 4, 10), (7, 1, 96), (10, 2, 22), (3, 3, 80)], ids=str
)
def test_our_operator_is_attention_over_rounded_keys_and_values(
    case: tuple[int, int, int], count: int, window: int
) -> None:
    """Groups of 1, 3, 5 and 7 queries; head widths that no vector divides; two sequences; NaN wherever
    nothing has been written. With up to 4 queries sums are float32, then products are bfloat16."""
    heads, kv_heads, head_dim = case
    rng, capacity, start = np.random.default_rng(0), 700, np.array([300, 517])

    def draw(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    x = {
        name: draw(2, count, n * head_dim)
        for name, n in (("q", heads), ("k", kv_heads), ("v", kv_heads))
    }
    angles = 3 * draw(2, count, head_dim // 2)
    feed = {**x, "cos": np.cos(angles), "sin": np.sin(angles), "start": start}
    for kind in ("key", "value"):
        feed[f"past.{kind}"], scales = round_rows(draw(2, kv_heads, capacity, head_dim))
        for b in range(2):
            scales[b, :, start[b] :] = np.nan
        feed[f"past.{kind}_scale"] = scales
    session = operator(case, window)
    names = [spec.name for spec in session.get_outputs()]
    found = dict(zip(names, session.run(None, feed), strict=True))

    def rotated(x: np.ndarray) -> np.ndarray:
        cos, sin = (feed[name][:, None] for name in ("cos", "sin"))
        low, high = np.split(x, 2, axis=-1)
        return np.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)

    seen = {}
    for kind, new in (
        ("key", rotated(split(x["k"], kv_heads))),
        ("value", split(x["v"], kv_heads)),
    ):
        values, scales = feed[f"past.{kind}"].copy(), feed[f"past.{kind}_scale"].copy()
        for b in range(2):
            span = slice(start[b], start[b] + count)
            values[b, :, span], scales[b, :, span] = round_rows(new[b])
        off = np.abs(found[f"present.{kind}"].astype(int) - values)
        assert off.max() <= (kind == "key")  # the rotation's last bit may decide a tie
        assert off.mean() < 1e-3
        np.testing.assert_allclose(found[f"present.{kind}_scale"], scales, rtol=1e-6)
        held = found[f"present.{kind}"] * found[f"present.{kind}_scale"]
        seen[kind] = np.where(np.isnan(held), 0, held)
    mask = np.stack(
        [causal_mask(b + np.arange(count), capacity, window or None)[None] for b in start]
    )
    expected = attended(rotated(split(x["q"], heads)), seen["key"], seen["value"], mask)
    error = np.abs(split(found["y"], heads) - expected)
    assert error.max() < (1e-5 if count <= 4 else 0.02)
    assert np.sqrt((error**2).mean() / (expected**2).mean()) < (1e-5 if count <= 4 else 5e-3)


@NATIVE
def test_our_operator_rounds_as_the_graph_does() -> None:
    """Zeros, huge numbers and NaN: each stays with its position."""
    k = np.zeros((1, 4, 4), np.float32)
    k[0, 1], k[0, 2] = 1e-40, [1e38, -3e38, 0, 1]
    k[0, 3, 0] = np.nan
    empty = {
        "key": np.zeros((1, 1, 4, 4), np.int8),
        "key_scale": np.zeros((1, 1, 4, 1), np.float32),
    }
    feed = {
        "q": np.zeros_like(k), "k": k, "v": np.nan_to_num(k), "start": np.array([0]),
        "cos": np.ones((1, 4, 2), np.float32), "sin": np.zeros((1, 4, 2), np.float32),
        **{f"past.{name}": array for name, array in empty.items()},
        **{f"past.{name.replace('key', 'value')}": array for name, array in empty.items()},
    }  # fmt: skip
    y, keys, values, key_scales, value_scales = operator((1, 1, 4), 0).run(None, feed)
    np.testing.assert_array_equal(keys[:, :, :3], values[:, :, :3])
    expected, scales = round_rows(k[:, None, :3])
    np.testing.assert_array_equal(values[:, :, :3], expected)
    np.testing.assert_array_equal(value_scales[:, :, :3], scales)
    assert np.isnan(key_scales[0, 0, 3, 0])
    assert np.isfinite(y[0, :3]).all()
    assert np.isnan(y[0, 3]).all()


@NATIVE
def test_our_operator_names_what_does_not_fit() -> None:
    case = (4, 2, 8)
    cache = empty_cache(DecoderSettings(1, 2, 8, 0, 0, 0, None, True, "int8"), 6)
    feed = {f"past.{name.removesuffix('.0')}": array for name, array in cache.items()}
    feed |= {
        name: np.zeros((1, 1, n * 8), np.float32) for name, n in (("q", 4), ("k", 2), ("v", 2))
    }
    feed |= {name: np.zeros((1, 1, 4), np.float32) for name in ("cos", "sin")}
    session = operator(case, 0)
    with pytest.raises(Exception, match="1 tokens at position 6 do not fit a cache of 6 positions"):
        session.run(None, {**feed, "start": np.array([6])})
    short = {"past.value_scale": feed["past.value_scale"][:, :, :5]}
    with pytest.raises(Exception, match=r"past_value_scale must be \[1, 2, 6, 1\]"):
        session.run(None, {**feed, **short, "start": np.array([0])})


@NATIVE
@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("case", CASES)
def test_our_kernels_keep_the_same_cache(case: str, precision: str, rounded: Make) -> None:
    """Prefill, chunks and steps of both graphs over the same positions. Prefill is in bfloat16, and with
    INT8 weights activations are rounded too: a wrong position or head errs by as much as the logits."""
    folder = rounded(case, precision)
    portable, ours = opened(folder), opened(folder, "cpu-native")
    kinds = {node.op_type for node in _nodes(folder, "cpu-native")}
    assert "CachedAttentionInt8" in kinds
    assert not {"TensorScatter", "Attention", "Round"} & kinds
    x = random(folder, 45)
    spans = [(0, 1), (1, 4), (4, 40), *((i, i + 1) for i in range(40, 45))]
    if not read_manifest(folder).decoder.chunked_prefill:
        spans = [(0, 45)]
    for start, stop in spans:
        expected, found = (d.prefill(x[:, start:stop]).copy() for d in (portable, ours))
        error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
        assert error < (0.02 if precision == "fp32" else 0.15)
    assert ours._caches.keys() == portable._caches.keys()
    for name, array in arrays(ours).items():
        expected = arrays(portable)[name][:, :, :45]
        assert array.dtype == expected.dtype
        if precision == "fp32" and name in ("key.0", "value.0"):
            assert np.abs(array[:, :, :45].astype(int) - expected).max() <= 1


def _nodes(folder: Path, kind: str) -> Any:
    import onnx_ir as ir

    return ir.load(folder / read_manifest(folder).engines["llm"].lowered[kind]).graph


def test_other_lowerings_leave_it(rounded: Make) -> None:
    """GroupQueryAttention has a float cache: the portable form runs."""
    lowered = read_manifest(rounded("clip-llama-v4")).engines["llm"].lowered
    assert "cpu" not in lowered


def test_tensorrt_is_refused_with_a_sentence(rounded: Make, tmp_path: Path) -> None:
    folder = rounded("clip-llama-v4")
    with pytest.raises(EngineFailure, match="TensorRT has no int8 cache .* --kv-cache float32"):
        tensorrt.lower(folder / "llm.onnx", tmp_path, PlanProfile("float32", 48, 16))


def test_masks_and_feeds_fit_the_portable_graph(rounded: Make) -> None:
    """What calibration and verification feed: every input there is, with its dtype and shape."""
    folder = rounded("siglip-qwen2")
    manifest = read_manifest(folder)
    session = open_session(folder / manifest.engines["llm"].graph, "llm", 1)
    feeds = prefill_feeds(manifest.decoder, random(folder, 9))
    assert {spec.name for spec in session.get_inputs()} <= feeds.keys()
    assert set(windows(manifest.decoder)) <= feeds.keys()
    for spec in manifest.engines["llm"].inputs:
        assert feeds[spec.name].dtype == spec.dtype, spec.name
        assert feeds[spec.name].ndim == len(spec.shape), spec.name


# --- export, info and verify


def test_the_command_line(checkpoint: Callable[[str], Path], bundle: Make, tmp_path: Path) -> None:
    out = tmp_path / "b"
    args = ["export", str(checkpoint("clip-llama-v4")), "-o", str(out), "--kv-cache", "int8"]
    done = CliRunner().invoke(cli, args)
    assert done.exit_code == 0, done.output
    assert read_manifest(out).decoder.cache_dtype == "int8"
    said = {}
    for folder in (bundle("clip-llama-v4"), out):
        shown = CliRunner().invoke(cli, ["info", str(folder), "--json"])
        said[folder] = json.loads(shown.stdout)["cache"]
    # 2 layers of 2 heads of 8 channels, keys and values
    assert list(said.values()) == [
        {"dtype": "float32", "bytes_per_token": 2 * 2 * 2 * 8 * 4},
        {"dtype": "int8", "bytes_per_token": 2 * 2 * 2 * (8 + 4)},
    ]
    assert "96 bytes a token (int8)" in CliRunner().invoke(cli, ["info", str(out)]).output


def test_a_wrong_word_is_refused(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    done = CliRunner().invoke(cli, ["export", "--kv-cache", "int4"])
    assert done.exit_code == 2
    assert "'int4' is not one of 'float32', 'int8'" in done.stderr
    with pytest.raises(SettingError, match="cache_dtype = 'fp16'; it should be float32 or int8"):
        export(checkpoint("clip-llama"), tmp_path / "b", cache_dtype="fp16")  # type: ignore[arg-type]
    assert not (tmp_path / "b").exists()


def test_verify_does_not_call_it_exact(
    rounded: Make, checkpoint: Callable[[str], Path], pictures: dict[str, Path]
) -> None:
    """Parts before the language model are still judged, its own figures are reported only."""
    report = verify(
        rounded("clip-llama-v4"), checkpoint("clip-llama-v4"), [pictures["wide.png"]], new_tokens=4
    )
    assert report.ok
    assert report.precision == {"vision": "fp32", "connector": "fp32", "llm": "fp32, int8 cache"}
    judged = {rung.name for rung in report.rungs if rung.ok is not None}
    reported = {rung.name for rung in report.rungs if rung.ok is None}
    assert {"vision", "connector", "embeddings"} <= judged
    assert reported == {"prefill logits", "greedy tokens"}
    assert "quantized stages are reported" in report.sentence()
