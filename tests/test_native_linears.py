"""Linears (native/): the sums exactly, norm, gate, residual, odd shapes, NaN, threads, mapped weights."""

from __future__ import annotations

import platform
import re
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_graphs import (
    ACTIVATIONS,
    BITS,
    Group,
    Layer,
    model,
    open_group,
    open_layer,
    open_model,
    random_layer,
    run,
    run_all,
)

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
    bits = draw(st.sampled_from(sorted(BITS)))
    k = draw(st.integers(1, 300))
    n = draw(st.integers(1, 200)) * (2 if bits == 4 else 1)
    block = draw(st.sampled_from([None, *(d for d in range(1, k + 1) if k % d == 0)]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    return random_layer(rng, bits, k, n, block, draw(st.booleans())), rng


def test_library_was_built() -> None:
    assert native.library() is not None, "build it: python setup.py build_ext --inplace"


@settings(max_examples=200, deadline=None)
@given(layers(), st.one_of(st.integers(0, 8), st.integers(9, 70)), st.integers(1, 2))
def test_any_shape(layer: tuple[Layer, np.random.Generator], rows: int, threads: int) -> None:
    made, rng = layer
    x = rng.standard_normal((rows, len(made.weight)), dtype=np.float32)
    assert close(run(open_layer(made, threads), x), made.expected(x))


@st.composite
def groups(draw: st.DrawFn) -> tuple[Group, np.random.Generator]:
    k, n = draw(st.integers(1, 300)), 2 * draw(st.integers(1, 100))
    gate = draw(st.sampled_from(["", "silu"]))
    count = 2 if gate else draw(st.integers(1, 3))
    blocks = st.sampled_from([None, *(d for d in range(1, k + 1) if k % d == 0)])
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    layers = [
        random_layer(
            rng,
            draw(st.sampled_from(sorted(BITS))),
            k,
            n if gate else 2 * draw(st.integers(1, 100)),
            draw(blocks),
            draw(st.booleans()),
        )
        for _ in range(count)
    ]
    norm = rng.standard_normal(k, dtype=np.float32) if draw(st.booleans()) else None
    epsilon = draw(st.sampled_from([1e-5, 0.5]))
    norm_bias = None if norm is None or draw(st.booleans()) else np.sin(norm)
    if gate or count == 1:
        # Outputs about where activations bend: far below, silu turns one rounding of its argument into
        # as many of its value as the argument is large.
        scale = np.float32(1 / 127 / np.sqrt(k))
        layers[0] = Layer(layers[0].bits, layers[0].weight, layers[0].scale * scale, layers[0].bias)
    clip = draw(st.sampled_from([0.0, 0.5, 2.5]))
    group = Group(layers, norm, epsilon, gate, norm_bias=norm_bias, clip=clip)
    if count > 1:
        return group, rng
    n = layers[0].weight.shape[1]
    return replace(
        group,
        adds=draw(st.booleans()),
        activation=draw(st.sampled_from(sorted(ACTIVATIONS))),
        factor=rng.standard_normal(n, dtype=np.float32) if draw(st.booleans()) else None,
    ), rng


@settings(max_examples=200, deadline=None)
@given(groups(), st.sampled_from([0, 1, 3, 5, 70]), st.integers(1, 2))
def test_any_group(group: tuple[Group, np.random.Generator], rows: int, threads: int) -> None:
    made, rng = group
    k, n = made.layers[0].weight.shape
    x = rng.standard_normal((rows, k), dtype=np.float32)
    residual = rng.standard_normal((rows, n), dtype=np.float32) if made.adds else None
    found = run_all(open_group(made, threads), x, residual)
    expected = made.expected(x, residual)
    assert len(found) == len(expected)
    assert all(close(*pair) for pair in zip(found, expected, strict=True))


# The groups of a transformer's layer; blocks and bits differ as mixed precision makes them.
def attention_inputs(rng: np.random.Generator) -> Group:
    parts = ((4, 576, 32), (4, 192, 32), (8, 192, None))
    norm = rng.standard_normal(576, dtype=np.float32)
    return Group([random_layer(rng, b, 576, n, block, bias=True) for b, n, block in parts], norm)


def gated(rng: np.random.Generator) -> Group:
    parts = ((8, 64), (4, 32))
    norm = rng.standard_normal(576, dtype=np.float32)
    layers = [random_layer(rng, b, 576, 1536, block, bias=False) for b, block in parts]
    small = [Layer(each.bits, each.weight, each.scale / 3000) for each in layers]
    return Group(small, norm, gate="silu")


def added(rng: np.random.Generator) -> Group:
    return Group([random_layer(rng, 8, 1536, 576, 128, bias=True)], adds=True)


def activated(rng: np.random.Generator) -> Group:
    layer = random_layer(rng, 8, 384, 1536, None, bias=True)
    small = Layer(8, layer.weight, layer.scale / 3000, layer.bias)
    norm, norm_bias = rng.standard_normal((2, 384), dtype=np.float32)
    factor = rng.standard_normal(1536, dtype=np.float32)
    return Group([small], norm, norm_bias=norm_bias, activation="gelu", factor=factor)


@pytest.mark.parametrize("made", [attention_inputs, gated, added, activated])
def test_groups_give_the_same_bits_whatever_the_threads_and_the_other_rows(
    made: Callable[[np.random.Generator], Group],
) -> None:
    rng = np.random.default_rng(13)
    group = made(rng)
    k, n = group.layers[0].weight.shape
    x = rng.standard_normal((50, k), dtype=np.float32)
    residual = rng.standard_normal((50, n), dtype=np.float32) if group.adds else None
    one, two = open_group(group, 1), open_group(group, 2)
    together = run_all(one, x, residual)
    for found, expected in zip(together, group.expected(x, residual), strict=True):
        assert close(found, expected)
    for session, count in ((two, 50), (one, 1), (two, 1), (two, 3), (two, 4), (two, 5)):
        part = None if residual is None else residual[:count]
        for found, all_rows in zip(run_all(session, x[:count], part), together, strict=True):
            assert np.array_equal(found, all_rows[:count])


@pytest.mark.parametrize("made", [attention_inputs, gated, added, activated])
@pytest.mark.parametrize("rows", [2, 30])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_stay_visible_in_groups(
    made: Callable[[np.random.Generator], Group], rows: int, value: float
) -> None:
    rng = np.random.default_rng(14)
    group = made(rng)
    k, n = group.layers[0].weight.shape
    x = rng.standard_normal((rows, k), dtype=np.float32)
    residual = np.ones((rows, n), np.float32) if group.adds else None
    session = open_group(group)
    good = run_all(session, x, residual)
    x[1, k - 1] = value
    for found, before in zip(run_all(session, x, residual), good, strict=True):
        assert np.isnan(found[1]).all()
        assert np.array_equal(np.delete(found, 1, 0), np.delete(before, 1, 0))


@pytest.mark.parametrize("rows", [1, 9])
def test_silu_from_its_smallest_to_its_largest_values(rows: int) -> None:
    """The bias is what goes into silu: the weights are zeros."""
    values = np.concatenate(
        [np.linspace(-86, 86, 4001), np.geomspace(1e-30, 80, 500), [-200, 1e30]]
    )
    a = np.concatenate([values, -values]).astype(np.float32)
    zeros = np.zeros((3, len(a)), np.int8), np.ones(len(a), np.float32)
    one = Layer(8, *zeros, np.ones(len(a), np.float32))
    session = open_group(Group([Layer(8, *zeros, a), one], gate="silu"))
    found = run(session, np.ones((rows, 3), np.float32))[rows - 1].astype(np.float64)
    wide = a.astype(np.float64)
    with np.errstate(over="ignore"):
        expected = wide / (1 + np.exp(-wide))
    assert np.allclose(found, expected, rtol=4e-7, atol=1e-38)


@pytest.mark.parametrize("activation", [name for name in ACTIVATIONS if name])
@pytest.mark.parametrize("rows", [1, 9])
def test_activations_from_their_smallest_to_their_largest_values(
    activation: str, rows: int
) -> None:
    """The bias is what is activated: the weights are zeros."""
    values = [np.linspace(0, 12, 6001), np.geomspace(1e-30, 90, 500), [5.6, 200, 1e18]]
    a = np.concatenate([*values, *(-np.asarray(v) for v in values)]).astype(np.float32)
    layer = Layer(8, np.zeros((3, len(a)), np.int8), np.ones(len(a), np.float32), a)
    session = open_group(Group([layer], activation=activation))
    found = run(session, np.ones((rows, 3), np.float32))[rows - 1].astype(np.float64)
    expected = ACTIVATIONS[activation](a.astype(np.float64))
    # Left of zero an activation is a difference of numbers near x, as in any float32 kernel.
    assert (np.abs(found - expected) <= 3e-7 * np.abs(a) + 1e-37).all()


@pytest.mark.parametrize("k", [1, 15, 64, 577])
@pytest.mark.parametrize("mean", [0, 3, -500])
def test_the_norm_is_onnx_layer_normalization(k: int, mean: float) -> None:
    """Through an identity whose blocks have one row, where rounding is exact: the norm alone is seen."""
    rng = np.random.default_rng(16)
    norm, norm_bias, x = rng.standard_normal((3, k), dtype=np.float32)
    x += np.float32(mean)
    layer = Layer(8, np.eye(k, dtype=np.int8), np.ones((k, k), np.float32))
    found = run(open_group(Group([layer], norm, 1e-3, norm_bias=norm_bias)), x[None])[0]
    wide = x.astype(np.float64)
    centred = wide - wide.mean()
    expected = centred / np.sqrt(np.square(centred).mean() + 1e-3) * norm + norm_bias
    # A float32 mean is what it is to 6e-8.
    assert np.allclose(found, expected, rtol=2e-6, atol=1e-6 + 3e-7 * abs(mean))


def test_the_norm_is_onnx_rms_normalization() -> None:
    """Of ones quantized to 127 / 127: what the layer sees is the norm alone."""
    rng = np.random.default_rng(15)
    norm, x = rng.standard_normal((2, 40), dtype=np.float32)
    layer = Layer(8, np.eye(40, dtype=np.int8), np.ones((40, 40), np.float32))
    found = run(open_group(Group([layer], norm, epsilon=0.25)), x[None])[0]
    expected = x / np.sqrt(np.square(x).mean() + 0.25) * norm
    assert np.allclose(found, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(
    ("k", "n", "block"),
    [(576, 192, 32), (576, 1536, 64), (1536, 576, 128), (4864, 896, None), (70_000, 66, None),
     (1200, 130, 600), (132, 4000, 66)],
)  # fmt: skip
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 200])
def test_real_shapes_and_long_blocks(
    bits: int, k: int, n: int, block: int | None, rows: int
) -> None:
    rng = np.random.default_rng(k + rows)
    layer = random_layer(rng, bits, k, n, block, bias=True)
    x = rng.standard_normal((rows, k), dtype=np.float32)
    assert close(run(open_layer(layer), x), layer.expected(x))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("block", [None, 32])
@pytest.mark.parametrize("rows", [1, 9])
def test_largest_products_do_not_overflow(bits: int, block: int | None, rows: int) -> None:
    """All weights and activations at their ends, the sum as long as it gets."""
    k = 65536 if block is None else 64
    for sign in (1, -1):
        weight = np.full((k, 64), sign * BITS[bits], np.int8)
        scale = np.full(64 if block is None else (k // block, 64), 0.5, np.float32)
        layer = Layer(bits, weight, scale)
        x = np.full((rows, k), 3, np.float32)
        assert close(run(open_layer(layer), x), layer.expected(x))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("block", [None, 32])
@pytest.mark.parametrize("rows", [1, 40])
def test_error_to_float_is_that_of_the_rounding(bits: int, block: int | None, rows: int) -> None:
    rng = np.random.default_rng(5)
    layer = random_layer(rng, bits, 320, 96, block, bias=False)
    x = rng.standard_normal((rows, 320), dtype=np.float32)
    error = np.abs(run(open_layer(layer), x) - x @ layer.real())
    _, scale = layer.quantized(x)
    half_a_step = (scale / 2).repeat(320 // scale.shape[1], axis=1)
    assert (error <= half_a_step @ np.abs(layer.real()) * (1 + 1e-4)).all()
    assert error.max() > 0


@pytest.mark.parametrize("shape", [(64,), (1, 64), (2, 3, 64), (2, 1, 5, 64), (0, 64), (3, 0, 64)])
def test_leading_dimensions(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(6)
    layer = random_layer(rng, 8, 64, 10, 16, bias=True)
    x = rng.standard_normal(shape, dtype=np.float32)
    assert close(run(open_layer(layer, rank=len(shape)), x), layer.expected(x))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("block", [None, 32])
@pytest.mark.parametrize("rows", [2, 30])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_stay_visible(
    bits: int, block: int | None, rows: int, value: float
) -> None:
    rng = np.random.default_rng(7)
    layer = random_layer(rng, bits, 96, 70, block, bias=True)
    x = rng.standard_normal((rows, 96), dtype=np.float32)
    session, good = open_layer(layer), run(open_layer(layer), x)
    for where in (0, 50, 95):
        bad = x.copy()
        bad[1, where] = value
        found = run(session, bad)
        assert np.isnan(found[1]).all()
        assert np.array_equal(np.delete(found, 1, 0), np.delete(good, 1, 0))


@pytest.mark.parametrize("k", [1, 15, 64, 77, 577])
@pytest.mark.parametrize("rows", [1, 3, 9])
@pytest.mark.parametrize("far", [3.0, 1e12, -3e38])
def test_a_channel_far_outside_is_clipped_and_the_others_keep_their_steps(
    k: int, rows: int, far: float
) -> None:
    """far * 127 / clip is no int32, and in float32 it may be infinite."""
    rng = np.random.default_rng(k)
    layer = random_layer(rng, 8, k, 70, None, bias=True)
    x = rng.uniform(-0.5, 0.5, (rows, k)).astype(np.float32)
    session = open_group(Group([layer], clip=0.5))
    for where in {0, k // 2, k - 1}:
        outside, inside = x.copy(), x.copy()
        outside[-1, where], inside[-1, where] = far, np.copysign(0.5, far)
        found = run(session, outside)
        assert np.array_equal(found, run(session, inside))
        assert close(found, layer.expected(inside))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_are_not_clipped(value: float) -> None:
    layer = random_layer(np.random.default_rng(17), 8, 77, 70, None, bias=True)
    x = np.ones((6, 77), np.float32)
    x[1, 76] = value
    found = run(open_group(Group([layer], clip=0.5)), x)
    assert np.isnan(found[1]).all()
    assert np.isfinite(np.delete(found, 1, 0)).all()


@pytest.mark.parametrize("rows", [1, 30])
def test_zeros_and_values_too_small_for_a_scale_give_the_bias(rows: int) -> None:
    layer = random_layer(np.random.default_rng(8), 8, 64, 70, 32, bias=True)
    assert layer.bias is not None
    for value in (0.0, -0.0, 1e-42):
        found = run(open_layer(layer), np.full((rows, 64), value, np.float32))
        assert np.array_equal(found, np.tile(layer.bias, (rows, 1)))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("block", [None, 64])
def test_same_bits_whatever_the_threads_and_the_other_rows(bits: int, block: int | None) -> None:
    """A token's result does not depend on the tokens it is computed with, nor on the threads."""
    rng = np.random.default_rng(9)
    layer = random_layer(rng, bits, 576, 400, block, bias=True)
    x = rng.standard_normal((50, 576), dtype=np.float32)
    one, two = open_layer(layer, 1), open_layer(layer, 2)
    together = run(one, x)
    assert np.array_equal(run(two, x), together)
    for count in (1, 2, 3, 4, 5):
        assert np.array_equal(run(two, x[:count]), together[:count])


def test_sessions_and_runs_at_the_same_time() -> None:
    rng = np.random.default_rng(10)
    made = [random_layer(rng, bits, 512, 300, 64, bias=True) for bits in BITS]
    jobs = []
    for layer in made:
        session = open_layer(layer)
        for rows in (1, 3, 40):
            x = rng.standard_normal((rows, 512), dtype=np.float32)
            jobs.append((session, x, run(session, x)))
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda job: run(job[0], job[1]), jobs * 30))
    assert all(np.array_equal(f, job[2]) for f, job in zip(found, jobs * 30, strict=True))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("offset", [0, 1, 37])
def test_weights_are_read_where_they_lie_in_the_file(
    bits: int, offset: int, tmp_path: Path
) -> None:
    rng = np.random.default_rng(11)
    layer = random_layer(rng, bits, 4096, 4096, 128, bias=False)
    (tmp_path / "weights.data").write_bytes(b"\x55" * offset + layer.stored.tobytes())
    weight = ir.ExternalTensor(
        "weights.data", offset, layer.stored.nbytes, ir.DataType.UINT8,
        shape=ir.Shape(layer.stored.shape), name="weight0", base_dir=str(tmp_path),
    )  # fmt: skip
    path = tmp_path / "model.onnx"
    ir.save(model([(weight, layer.scale, None)], ("rows", 4096), bits=[bits]), path)
    before = anonymous_memory()
    session = open_model(str(path))
    for rows in (1, 40):
        x = rng.standard_normal((rows, 4096), dtype=np.float32)
        found = run(session, x)
        if rows == 1:  # before numpy makes copies of its own; the weights are 16 MB (int4: 8)
            assert anonymous_memory() - before < layer.stored.nbytes * 0.6
        assert close(found, layer.expected(x))


def anonymous_memory() -> int:
    """Bytes of this process's memory that no file stands behind."""
    status = Path("/proc/self/status").read_text()
    found = re.search(r"RssAnon:\s+(\d+) kB", status)
    assert found
    return int(found[1]) * 1024


def test_the_shape_of_the_output_is_known() -> None:
    layer = random_layer(np.random.default_rng(12), 8, 8, 10, None, bias=False)
    assert open_layer(layer, rank=3).get_outputs()[0].shape == ["d0", "d1", 10]
    two = [layer, random_layer(np.random.default_rng(12), 4, 8, 10, 4, bias=True)]
    for gate, outputs in (("", 2), ("silu", 1)):
        found = open_group(Group(two, gate=gate), rank=3).get_outputs()
        assert [each.shape for each in found] == [["d0", "d1", 10]] * outputs


W, S = np.zeros((8, 6), np.uint8), np.ones(6, np.float32)
ONE = [(W, S, None)]
X = (1, 8)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (model([(W, S[:5], None)], X), "differ in the number of columns"),
        (model([(W[0], S, None)], X), "weight must have 2 dimensions"),
        (model([(W[:0], S, None)], X), "a weight must not be empty"),
        (model([(W, np.ones((3, 6), np.float32), None)], X), "must divide"),
        (model([(W, np.ones((1, 1, 6), np.float32), None)], X), r"scale must be \[N\]"),
        (model([(W, S, S[:1])], X), r"bias must be an initializer \[6\], and is \[1\]"),
        (model([(W[:, :3], S[:5], None)], X, bits=[4]), "must be even"),
        (model(ONE, X, bits=[]), "a number for each weight, but there are 0 for 1"),
        (model(ONE * 2, X, bits=[8]), "a number for each weight, but there are 1 for 2"),
        (model(ONE, X, bits=[2]), "bits must be 8 or 4 for each weight, and has 2"),
        (model([*ONE, (W[:4], S, None)], X), "as many rows, but they have 8 and 4"),
        (model(ONE * 2, X, gate="gelu"), 'gate must be "silu" or empty, and is "gelu"'),
        (model(ONE, X, gate="silu"), "a gate takes two weights, and there are 1"),
        (model(ONE * 3, X, gate="silu"), "a gate takes two weights, and there are 3"),
        (model([*ONE, (W[:, :4], S[:4], None)], X, gate="silu"), "columns, but they have 6 and 4"),
        (model(ONE * 2, X, residual=(1, 6)), "the output of one weight, but there are 2"),
        (model(ONE * 2, X, outputs=1), "there must be 2 outputs, and there are 1"),
        (model(ONE * 2, X, gate="silu", outputs=2), "there must be 1 outputs, and there are 2"),
        (model(ONE * 2, X, activation="gelu"), "follows one weight, and there are 2"),
        (model(ONE * 2, X, factor=S), "follows one weight, and there are 2"),
        (model(ONE, X, activation="mish"), 'activation must be "gelu", .* or empty, and is "mish"'),
        (model(ONE, X, clip=-1.0), "clip must not be negative"),
        (model(ONE, X, factor=S[:5]), r"factor must be an initializer \[6\], and is \[5\]"),
        (model(ONE, X, norm_bias=np.ones(8, np.float32)), "norm_bias needs norm"),
        (model(ONE, X, norm=S), r"norm must be an initializer \[8\], and is \[6\]"),
    ],
)  # fmt: skip
def test_a_wrong_node_is_refused(made: ir.Model, message: str) -> None:
    with pytest.raises(Exception, match=message):
        open_model(made)


def test_a_wrong_input_is_refused() -> None:
    session = open_model(model(ONE, ("rows", "k")))
    with pytest.raises(Exception, match=r"x must be \[\.\.\., 8\], and is \[2, 7\]"):
        run(session, np.zeros((2, 7), np.float32))
    session = open_model(model(ONE, ("rows", 8), residual=("others", 6)))
    with pytest.raises(
        Exception, match=r"residual must be \[2, 6\] as the output is, and is \[1, 6\]"
    ):
        run_all(session, np.zeros((2, 8), np.float32), np.zeros((1, 6), np.float32))


@pytest.mark.parametrize("name", ["weight0", "scale0", "bias0", "norm"])
def test_constants_that_are_computed_are_refused(name: str) -> None:
    made = model([(W, S, S)], X, norm=np.ones(8, np.float32))
    value = made.graph.initializers.pop(name)
    value.const_value = None
    made.graph.inputs.append(value)
    with pytest.raises(Exception, match="must be (an initializer|initializers)"):
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
