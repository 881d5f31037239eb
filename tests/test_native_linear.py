"""LinearInt8 and LinearInt4 (native/): the sums exactly, odd shapes, NaN, threads, mapped weights."""

from __future__ import annotations

import platform
import re
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_graphs import KINDS, Layer, model, open_layer, open_model, random_layer, run

from vlm_edge.runtime import native

EXACT = 1e-5  # of the largest output: sums of integers are exact, sums of blocks are float32


def obstacle() -> str:
    """Why the library cannot be built or used here; empty where it must be there."""
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "AMD64"):
        return "the kernels are for Linux on x86-64"
    if not {"avx512_vnni", "avx512_bf16"} <= set(Path("/proc/cpuinfo").read_text().split()):
        return "this CPU lacks AVX-512 with VNNI and BF16"
    return "" if shutil.which("g++") or native.library() else "there is no C++ compiler"


pytestmark = pytest.mark.skipif(bool(obstacle()), reason=obstacle())


def close(found: np.ndarray, expected: np.ndarray) -> bool:
    assert found.shape == expected.shape and found.dtype == np.float32
    room = EXACT * max(float(np.abs(expected).max(initial=0)), 1e-30)
    return bool(np.abs(found - expected).max(initial=0) <= room)


@st.composite
def layers(draw: st.DrawFn) -> tuple[Layer, np.random.Generator]:
    kind = draw(st.sampled_from(sorted(KINDS)))
    k = draw(st.integers(1, 300))
    n = draw(st.integers(1, 200)) * (2 if kind == "LinearInt4" else 1)
    block = draw(st.sampled_from([None, *(d for d in range(1, k + 1) if k % d == 0)]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    return random_layer(rng, kind, k, n, block, draw(st.booleans())), rng


def test_library_was_built() -> None:
    assert native.library() is not None, "build it: python setup.py build_ext --inplace"


@settings(max_examples=200, deadline=None)
@given(layers(), st.one_of(st.integers(0, 8), st.integers(9, 70)), st.integers(1, 2))
def test_any_shape(layer: tuple[Layer, np.random.Generator], rows: int, threads: int) -> None:
    made, rng = layer
    x = rng.standard_normal((rows, len(made.weight)), dtype=np.float32)
    assert close(run(open_layer(made, threads), x), made.expected(x))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("k", "n", "block"),
    [(576, 192, 32), (576, 1536, 64), (1536, 576, 128), (4864, 896, None), (70_000, 66, None),
     (1200, 130, 600), (132, 4000, 66)],
)  # fmt: skip
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 200])
def test_real_shapes_and_long_blocks(
    kind: str, k: int, n: int, block: int | None, rows: int
) -> None:
    rng = np.random.default_rng(k + rows)
    layer = random_layer(rng, kind, k, n, block, bias=True)
    x = rng.standard_normal((rows, k), dtype=np.float32)
    assert close(run(open_layer(layer), x), layer.expected(x))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("block", [None, 32])
@pytest.mark.parametrize("rows", [1, 9])
def test_largest_products_do_not_overflow(kind: str, block: int | None, rows: int) -> None:
    """All weights and activations at their ends, the sum as long as it gets."""
    k = 65536 if block is None else 64
    for sign in (1, -1):
        weight = np.full((k, 64), sign * KINDS[kind], np.int8)
        scale = np.full(64 if block is None else (k // block, 64), 0.5, np.float32)
        layer = Layer(kind, weight, scale)
        x = np.full((rows, k), 3, np.float32)
        assert close(run(open_layer(layer), x), layer.expected(x))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("block", [None, 32])
@pytest.mark.parametrize("rows", [1, 40])
def test_error_to_float_is_that_of_the_rounding(kind: str, block: int | None, rows: int) -> None:
    rng = np.random.default_rng(5)
    layer = random_layer(rng, kind, 320, 96, block, bias=False)
    x = rng.standard_normal((rows, 320), dtype=np.float32)
    error = np.abs(run(open_layer(layer), x) - x @ layer.real())
    _, scale = layer.quantized(x)
    half_a_step = (scale / 2).repeat(320 // scale.shape[1], axis=1)
    assert (error <= half_a_step @ np.abs(layer.real()) * (1 + 1e-4)).all()
    assert error.max() > 0


@pytest.mark.parametrize("shape", [(64,), (1, 64), (2, 3, 64), (2, 1, 5, 64), (0, 64), (3, 0, 64)])
def test_leading_dimensions(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(6)
    layer = random_layer(rng, "LinearInt8", 64, 10, 16, bias=True)
    x = rng.standard_normal(shape, dtype=np.float32)
    assert close(run(open_layer(layer, rank=len(shape)), x), layer.expected(x))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("block", [None, 32])
@pytest.mark.parametrize("rows", [2, 30])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_stay_visible(
    kind: str, block: int | None, rows: int, value: float
) -> None:
    rng = np.random.default_rng(7)
    layer = random_layer(rng, kind, 96, 70, block, bias=True)
    x = rng.standard_normal((rows, 96), dtype=np.float32)
    session, good = open_layer(layer), run(open_layer(layer), x)
    for where in (0, 50, 95):
        bad = x.copy()
        bad[1, where] = value
        found = run(session, bad)
        assert np.isnan(found[1]).all()
        assert np.array_equal(np.delete(found, 1, 0), np.delete(good, 1, 0))


@pytest.mark.parametrize("rows", [1, 30])
def test_zeros_and_values_too_small_for_a_scale_give_the_bias(rows: int) -> None:
    layer = random_layer(np.random.default_rng(8), "LinearInt8", 64, 70, 32, bias=True)
    assert layer.bias is not None
    for value in (0.0, -0.0, 1e-42):
        found = run(open_layer(layer), np.full((rows, 64), value, np.float32))
        assert np.array_equal(found, np.tile(layer.bias, (rows, 1)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("block", [None, 64])
def test_same_bits_whatever_the_threads_and_the_other_rows(kind: str, block: int | None) -> None:
    """A token's result does not depend on the tokens it is computed with, nor on the threads."""
    rng = np.random.default_rng(9)
    layer = random_layer(rng, kind, 576, 400, block, bias=True)
    x = rng.standard_normal((50, 576), dtype=np.float32)
    one, two = open_layer(layer, 1), open_layer(layer, 2)
    together = run(one, x)
    assert np.array_equal(run(two, x), together)
    for count in (1, 2, 3, 4, 5):
        assert np.array_equal(run(two, x[:count]), together[:count])


def test_sessions_and_runs_at_the_same_time() -> None:
    rng = np.random.default_rng(10)
    made = [random_layer(rng, kind, 512, 300, 64, bias=True) for kind in KINDS]
    jobs = []
    for layer in made:
        session = open_layer(layer)
        for rows in (1, 3, 40):
            x = rng.standard_normal((rows, 512), dtype=np.float32)
            jobs.append((session, x, run(session, x)))
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda job: run(job[0], job[1]), jobs * 30))
    assert all(np.array_equal(f, job[2]) for f, job in zip(found, jobs * 30, strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("offset", [0, 1, 37])
def test_weights_are_read_where_they_lie_in_the_file(
    kind: str, offset: int, tmp_path: Path
) -> None:
    rng = np.random.default_rng(11)
    layer = random_layer(rng, kind, 4096, 4096, 128, bias=False)
    (tmp_path / "weights.data").write_bytes(b"\x55" * offset + layer.stored.tobytes())
    dtype = ir.DataType.INT8 if kind == "LinearInt8" else ir.DataType.UINT8
    weight = ir.ExternalTensor(
        "weights.data", offset, layer.stored.nbytes, dtype, shape=ir.Shape(layer.stored.shape),
        name="weight", base_dir=str(tmp_path),
    )  # fmt: skip
    path = tmp_path / "model.onnx"
    ir.save(model(kind, weight, layer.scale, x=("rows", 4096)), path)
    before = anonymous_memory()
    session = open_model(str(path))
    for rows in (1, 40):
        x = rng.standard_normal((rows, 4096), dtype=np.float32)
        assert close(run(session, x), layer.expected(x))
        if rows == 1:
            # numpy's own copies are gone by now; the weights are 16 MB (int4: 8).
            assert anonymous_memory() - before < layer.stored.nbytes * 0.6


def anonymous_memory() -> int:
    """Bytes of this process's memory that no file stands behind."""
    status = Path("/proc/self/status").read_text()
    found = re.search(r"RssAnon:\s+(\d+) kB", status)
    assert found
    return int(found[1]) * 1024


def test_the_shape_of_the_output_is_known() -> None:
    layer = random_layer(np.random.default_rng(12), "LinearInt8", 8, 10, None, bias=False)
    assert open_layer(layer, rank=3).get_outputs()[0].shape == ["d0", "d1", 10]


W, S = np.zeros((8, 6), np.int8), np.ones(6, np.float32)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (model("LinearInt8", W, S[:5], x=(1, 8)), "differ in the number of columns"),
        (model("LinearInt8", W[0], S, x=(1, 8)), "weight must have 2 dimensions"),
        (model("LinearInt8", W, np.ones((3, 6), np.float32), x=(1, 8)), "must divide"),
        (model("LinearInt8", W, np.ones((1, 1, 6), np.float32), x=(1, 8)), r"scale must be \[N\]"),
        (model("LinearInt8", W, S, S[:1], x=(1, 8)), r"bias must be an initializer \[6\]"),
        (model("LinearInt4", W[:, :3].view(np.uint8), S[:5], x=(1, 8)), "must be even"),
    ],
)  # fmt: skip
def test_a_wrong_node_is_refused(made: ir.Model, message: str) -> None:
    with pytest.raises(Exception, match=message):
        open_model(made)


def test_a_wrong_input_is_refused() -> None:
    session = open_model(model("LinearInt8", W, S, x=("rows", "k")))
    with pytest.raises(Exception, match=r"x must be \[\.\.\., 8\], and is \[2, 7\]"):
        run(session, np.zeros((2, 7), np.float32))


def test_weights_that_are_computed_are_refused() -> None:
    made = model("LinearInt8", W, S, x=(1, 8))
    weight = made.graph.initializers.pop("weight")
    weight.const_value = None
    made.graph.inputs.append(weight)
    with pytest.raises(Exception, match="weight and scale must be initializers"):
        open_model(made)


def test_the_environment_turns_it_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(native.SWITCH, "0")
    native.library.cache_clear()
    try:
        assert native.library() is None
    finally:
        monkeypatch.undo()
        native.library.cache_clear()
    assert native.library() is not None
