"""Graphs in float16 say what the float32 ones say, within float16's rounding, for every architecture."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator
from small_graph import ref, write, write_product
from tensorrt_rtx import CASES

from vlm_edge.export.lowering import half as lowering
from vlm_edge.export.lowering import masks
from vlm_edge.export.lowering.half import FLOAT, HALF, KEPT, half
from vlm_edge.export.quantizers.static_int8 import StaticInt8
from vlm_edge.export.quantizers.weight_only import WeightOnly
from vlm_edge.runtime.feeds import MASKED
from vlm_edge.runtime.media import ALIKE

U = 2.0**-11  # what rounding to float16 changes at most
# Some tens of roundings lie between input and output, of either sign: over all cases below up to 19 U in numpy,
# 13 U in ONNX Runtime. What a wrong cast does is many times more (tests below).
BOUND = 32 * U
SIZES = {
    "batch": 1, "sequence": 7, "capacity": 10, "asked": 7, "tiles": 3, "source": 11, "media": 5,
    "tokens": 6, "instruction": 4,
}  # fmt: skip
Feeds = dict[str, np.ndarray]


def portables(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.onnx") if len(path.suffixes) == 1)


def in_half(portable: Path, folder: Path, name: str | None = None) -> Path:
    """The graph in float16, beside a copy of its weights."""
    model = ir.load(portable)
    assert half(model) > 0
    data = folder / f"{portable.stem}.data"
    if not data.exists():
        shutil.copy(portable.with_suffix(".data"), data)  # onnx follows no link
    path = folder / (name or portable.name)
    ir.save(model, path)
    return path


def feeds(portable: Path, first: int = 0, seed: int = 0) -> Feeds:
    """Random inputs; positions from `first` on, as many keys in the cache."""
    rng = np.random.default_rng(seed)
    count, found = SIZES["sequence"], Feeds()
    capacity = first + SIZES["capacity"]
    sizes = {**SIZES, "capacity": capacity}
    queries = first + np.arange(count)
    for value in ir.load(portable).graph.inputs:
        assert value.shape is not None and value.dtype is not None and value.name is not None
        shape = [d if isinstance(d, int) else sizes[str(d.value)] for d in value.shape]
        values = rng.standard_normal(shape)
        if value.name == "positions":
            values = queries[None]
        elif value.name == "write_indices":
            values = np.array([first])
        elif value.name == "logit_positions":
            values = np.arange(count)
        elif value.name == "media_mask":
            values = media_mask(rng, *shape[2:])[None, None]
        elif value.name == "media_gate":
            values = np.ones(shape)
            values[0, 0] = 0  # the row that sees nothing
        elif value.name.endswith("attention_mask"):
            seen = np.arange(capacity) <= queries[:, None]
            values = np.where(seen, np.float32(0), MASKED)[None, None]
        elif value.dtype == ir.DataType.INT64:
            values = rng.integers(1, 4, shape)
        elif value.dtype == ir.DataType.INT8:
            values = rng.integers(-127, 128, shape)
        elif "scale" in value.name:
            values = 0.01 * np.abs(values)
        found[value.name] = values.astype(value.dtype.numpy())
    return found


def media_mask(rng: np.random.Generator, rows: int, media: int) -> np.ndarray:
    """A row that sees nothing and is shut, two whose scores count alike, and some that see some."""
    mask = np.where(rng.random((rows, media)) < 0.5, np.float32(0), MASKED)
    mask[:, 0] = 0
    mask[0], mask[1:3] = MASKED, ALIKE
    return mask


def run(graph: Path, given: Feeds) -> Feeds:
    """All outputs by ONNX Runtime's CPU provider, which computes much of float16 in float32; nothing is
    fused, as far as it can be told."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    kinds = {"tensor(float16)": np.float16}
    mine = {
        spec.name: given[spec.name].astype(kinds.get(spec.type, given[spec.name].dtype))
        for spec in session.get_inputs()
    }
    names = [spec.name for spec in session.get_outputs()]
    return dict(zip(names, session.run(names, mine), strict=True))


def run_strictly(graph: Path, given: Feeds) -> Feeds:
    """All outputs by onnx's reference in numpy, where every float16 operator rounds (and overflows)."""
    types = {value.name: value.dtype for value in ir.load(graph).graph.inputs}
    mine = {
        str(name): given[str(name)].astype(dtype.numpy()) for name, dtype in types.items() if dtype
    }
    reference = ReferenceEvaluator(str(graph))
    with np.errstate(all="ignore"):
        return dict(zip(reference.output_names, reference.run(None, mine), strict=True))


def error(found: np.ndarray, expected: np.ndarray) -> float:
    """Relative, of the row (last axis) that is off most; all-zero rows aside. NaN and infinity are infinite."""
    found, expected = found.astype(np.float64), expected.astype(np.float64)
    size = np.linalg.norm(expected, axis=-1)
    off = np.linalg.norm(found - expected, axis=-1) / np.maximum(size, 0.1 * size.mean() + 1e-30)
    return float(off.max()) if np.isfinite(off).all() else np.inf


def worst(found: Feeds, expected: Feeds) -> float:
    assert found.keys() == expected.keys()
    return max(error(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("case", CASES)
def test_every_architecture_says_the_same(
    case: str, bundle: Callable[..., Path], tmp_path: Path
) -> None:
    for portable in portables(bundle(case)):
        graph = in_half(portable, tmp_path)
        onnx.checker.check_model(str(graph), full_check=True)
        given = feeds(portable)
        expected = run(portable, given)
        assert worst(run(graph, given), expected) < BOUND, portable.stem
        assert worst(run_strictly(graph, given), expected) < BOUND, portable.stem


@pytest.mark.parametrize(
    ("case", "precision"), [("clip-llama-biases", "int8"), ("blip2-t5", "int4"), ("mllama", "int8")]
)
def test_quantized_graphs_say_the_same(
    case: str, precision: str, bundle: Callable[..., Path], tmp_path: Path
) -> None:
    """Where activations are rounded to int8, float16's rounding moves some of them by a whole step; that
    must be little beside what the steps themselves cost."""
    for portable in portables(bundle(case, precision)):
        graph = in_half(portable, tmp_path)
        given = feeds(portable)
        found, same = run(graph, given), run(portable, given)
        if not any(node.op_type == "QuantizeLinear" for node in ir.load(portable).graph):
            assert worst(found, same) < BOUND, portable.stem
            continue
        exact = run(bundle(case) / portable.name, given)
        for name, value in exact.items():
            cost = np.linalg.norm(same[name] - value)
            assert np.linalg.norm(found[name] - same[name]) < 0.8 * cost, portable.stem
            assert np.linalg.norm(found[name] - value) < 1.15 * cost, portable.stem


@pytest.mark.parametrize("case", ["siglip-qwen2", "blip2-t5", "idefics"])
def test_interface_and_weights(case: str, bundle: Callable[..., Path], tmp_path: Path) -> None:
    """Only keys and values change their type; no tensor of size is written again."""
    for portable in portables(bundle(case)):
        before, after = ir.load(portable).graph, ir.load(in_half(portable, tmp_path)).graph
        for old, new in ((before.inputs, after.inputs), (before.outputs, after.outputs)):
            assert [(v.name, v.shape) for v in old] == [(v.name, v.shape) for v in new]
            for was, now in zip(old, new, strict=True):
                kept = str(now.name).startswith(KEPT)
                assert now.dtype == (HALF if kept else was.dtype), now.name
        for value in after.initializers.values():
            tensor = value.const_value
            assert tensor is not None
            if not isinstance(tensor, ir.ExternalTensor):
                assert tensor.nbytes <= 1024, value.name
            else:
                assert tensor.location == f"{portable.stem}.data" and tensor.dtype == FLOAT
    assert not list(tmp_path.glob("*.onnx.data"))


def test_products_are_float16_and_norms_are_not(
    bundle: Callable[..., Path], tmp_path: Path
) -> None:
    graph = ir.load(in_half(bundle("siglip-qwen2") / "llm.onnx", tmp_path)).graph
    types: dict[str, set[Any]] = {}
    for node in graph:
        types.setdefault(node.op_type, set()).add(node.outputs[0].dtype)
    for kind in ("MatMul", "Attention", "TensorScatter", "Sigmoid"):
        assert types[kind] == {HALF}, kind
    for kind in ("RMSNormalization", "Cos", "Sin"):
        assert types[kind] == {FLOAT}, kind


def far(portable: Path) -> Feeds:
    """Positions above 2048, which float16 counts in twos."""
    return feeds(portable, first=3001)


@pytest.mark.parametrize("case", ["clip-llama-v4", "gpt_neox", "blip2-t5", "mpt"])
def test_far_positions_are_exact(case: str, bundle: Callable[..., Path], tmp_path: Path) -> None:
    portable = bundle(case) / "llm.onnx"
    given = far(portable)
    assert worst(run(in_half(portable, tmp_path), given), run(portable, given)) < BOUND


def test_angles_in_float16_would_be_seen(bundle: Callable[..., Path], tmp_path: Path) -> None:
    portable = bundle("clip-llama-v4") / "llm.onnx"
    path = in_half(portable, tmp_path)
    model = ir.load(path)
    for node in [node for node in model.graph if node.op_type in ("Cos", "Sin")]:
        x = node.inputs[0]
        assert x is not None
        there = ir.node("Cast", [x], {"to": HALF})
        back = ir.node("Cast", [there.outputs[0]], {"to": FLOAT})
        model.graph.insert_before(node, [there, back])
        node.replace_input_with(0, back.outputs[0])
    ir.save(model, path)
    given = far(portable)
    assert worst(run(path, given), run(portable, given)) > 4 * BOUND


@pytest.mark.parametrize("case", ["llama", "idefics", "mllama"])
def test_rows_that_see_nothing_are_a_mean(
    case: str, bundle: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores of tens: added to a mask of float16 they would still count."""
    portable = bundle(case) / "llm.onnx"
    given = feeds(portable)
    for name in [name for name in given if name.startswith("media.key")]:
        given[name] *= 30
    expected = run(portable, given)
    loose = 2 * BOUND  # sharp attention: a score of 100 is rounded by 0.05
    assert worst(run(in_half(portable, tmp_path), given), expected) < loose
    monkeypatch.setattr(masks, "MEDIA_MASK", "no such input")
    naive = in_half(portable, tmp_path, "naive.onnx")
    assert worst(run(naive, given), expected) > 2 * loose


def scaled(portable: Path, folder: Path, factors: dict[str, float]) -> Path:
    """A copy with initializers multiplied, those whose names hold a key."""
    model = ir.load(portable)
    for name, value in model.graph.initializers.items():
        factor = next((f for part, f in factors.items() if part in name), None)
        if factor is not None and value.const_value is not None:
            array = value.const_value.numpy() * np.float32(factor)
            value.const_value = ir.Tensor(array, name=name)
    path = folder / portable.name
    ir.save(model, path, external_data=f"{portable.stem}.data", size_threshold_bytes=1024)
    return path


@pytest.fixture
def large_t5(bundle: Callable[..., Path], tmp_path: Path) -> Path:
    """An encoder whose feed-forwards give hundreds of thousands, as those of Flan-T5 do."""
    return scaled(bundle("blip2-t5") / "llm_encoder.onnx", tmp_path, {".feed_forward.wo.": 2e5})


def test_a_t5_does_not_overflow(large_t5: Path) -> None:
    given = feeds(large_t5)
    graph = in_half(large_t5, large_t5.parent, "half.onnx")
    assert worst(run_strictly(graph, given), run(large_t5, given)) < BOUND


def test_a_t5_in_float16_throughout_would(large_t5: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowering, "WIDE", "no such weight")
    given = feeds(large_t5)
    graph = in_half(large_t5, large_t5.parent, "half.onnx")
    assert worst(run_strictly(graph, given), run(large_t5, given)) == np.inf


@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_a_t5_s_wide_product_stays_float32(
    precision: str, bundle: Callable[..., Path], tmp_path: Path
) -> None:
    for part in ("llm", "llm_encoder"):
        graph = ir.load(in_half(bundle("blip2-t5", precision) / f"{part}.onnx", tmp_path)).graph
        products = [node for node in graph if node.op_type == "MatMul"]
        wide = [node for node in products if "/wo/" in str(node.name)]
        assert wide and {node.outputs[0].dtype for node in wide} == {FLOAT}
        assert {n.outputs[0].dtype for n in products if n not in wide} == {HALF}


def test_sums_of_squares_do_not_overflow(bundle: Callable[..., Path], tmp_path: Path) -> None:
    portable = bundle("siglip-qwen2") / "llm.onnx"
    given = feeds(portable)
    given["inputs_embeds"] *= 3000  # its squares are 10^7
    graph = in_half(portable, tmp_path)
    assert worst(run_strictly(graph, given), run(portable, given)) < BOUND


def test_an_int8_cache_stays(bundle: Callable[..., Path], tmp_path: Path) -> None:
    portable = bundle("clip-llama-v4", "fp32", "int8") / "llm.onnx"
    graph = in_half(portable, tmp_path)
    types = [
        [(v.name, v.dtype) for v in g.inputs] for g in (ir.load(p).graph for p in (portable, graph))
    ]
    assert types[0] == types[1]
    given = feeds(portable)
    found, expected = run(graph, given), run(portable, given)
    for name, value in expected.items():
        if value.dtype == np.int8:
            off = np.abs(found[name].astype(int) - value)
            assert off.max() <= 3 and (off > 0).mean() < 0.2, name
        else:
            assert error(found[name], value) < 5 * BOUND, (
                name
            )  # one step of 127 where a value is between two


# -- scales that float16 would spoil --------------------------------------------------------------

RANGE = 4.0  # of the activations of a W8A8 product
KINDS: dict[str, Callable[[], Any]] = {
    "int8": lambda: WeightOnly(8, 32),
    "int4": lambda: WeightOnly(4, 32),
    "w8a8": lambda: StaticInt8({"layer": RANGE}),
}


def product(path: Path, kind: str, size: float) -> Path:
    """x [rows, 64] @ a quantized weight of that magnitude."""
    weight = size * np.random.default_rng(0).standard_normal((48, 64)).astype(np.float32)
    return write_product(path, KINDS[kind]().product("layer", ref(weight)), 64, 48)


def product_error(path: Path) -> float:
    steps = np.random.default_rng(1).integers(-127, 128, (5, 64))
    given = {"x": (steps * RANGE / 127).astype(np.float32)}  # no value between two steps
    model = ir.load(path)
    half(model)
    ir.save(model, path.with_name("half.onnx"))
    return worst(run(path.with_name("half.onnx"), given), run(path, given))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("size", "scales"), [(0.05, HALF), (2e-5, FLOAT)])
def test_small_scales_stay_float32(size: float, scales: Any, kind: str, tmp_path: Path) -> None:
    path = product(tmp_path / "product.onnx", kind, size)
    assert product_error(path) < BOUND
    graph = ir.load(tmp_path / "half.onnx").graph
    found = [node.inputs[1].dtype for node in graph if node.op_type in lowering.QUANTIZED]
    assert set(found) == {scales}
    assert len(found) == (3 if kind == "w8a8" else 1)  # one type on both sides of a product


@pytest.mark.parametrize("kind", ["int8", "w8a8"])
def test_small_scales_in_float16_would_be_seen(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lowering, "_finely_scaled", lambda _: ())
    assert product_error(product(tmp_path / "product.onnx", kind, 2e-5)) > BOUND


def test_layers_that_share_an_activation_share_a_type(tmp_path: Path) -> None:
    rng, quantizer = np.random.default_rng(0), StaticInt8(dict.fromkeys("abc", RANGE))
    modules = {}
    for name, size in {"a": 1.0, "b": 5e-5, "c": 1.0}.items():
        weight = ref(size * rng.standard_normal((16, 16)).astype(np.float32), name)
        modules[name] = quantizer.product(name, weight)
        modules[name]._set_name(name)

    def forward(op: Any, x: dict[str, ir.Value]) -> list[ir.Value]:
        a, b = modules["a"](op, x["x"]), modules["b"](op, x["x"])
        return [a, b, modules["c"](op, op.Relu(a))]

    spec = ("float32", ("rows", 16))
    model = ir.load(write(tmp_path / "abc.onnx", forward, {"x": spec}, dict.fromkeys("yzw", spec)))
    half(model)
    types = {
        node.inputs[0].name: node.inputs[1].dtype
        for node in model.graph
        if node.op_type == "DequantizeLinear" and node.inputs[0].is_initializer()
    }
    assert [types[f"{name}.weight"] for name in "abc"] == [FLOAT, FLOAT, HALF]
