"""Weights as each precision stores them, against numpy written from the definition; and their products."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from small_graph import initializers, ref, run, write, write_product

from vlm_edge.errors import CalibrationError
from vlm_edge.export import checkpoint as checkpoint_module
from vlm_edge.export.quantizers import Float, Observer
from vlm_edge.export.quantizers import weight_only as weight_only_module
from vlm_edge.export.quantizers.rounding import block_size, channel_scales
from vlm_edge.export.quantizers.static_int8 import StaticInt8
from vlm_edge.export.quantizers.weight_only import WeightOnly

# outputs, inputs: a power of two, a multiple of 16 only, none of either, and one that is odd
SHAPES = [(40, 256), (24, 80), (31, 72), (7, 45), (1, 16)]


def weights(outputs: int, inputs: int, dtype: Any = np.float32) -> np.ndarray:
    """[out, in] with a row of zeros, a large value and rows of different sizes."""
    values = np.random.default_rng(outputs * inputs).standard_normal((outputs, inputs))
    values *= np.geomspace(0.01, 3, outputs)[:, None]
    values[outputs // 2] = 0
    values[0, inputs // 3] = 9.5
    return values.astype(dtype)


def activations(inputs: int, rows: int = 11) -> np.ndarray:
    return np.random.default_rng(inputs).standard_normal((rows, inputs)).astype(np.float32)


@pytest.mark.parametrize(
    ("inputs", "longest", "block"),
    [(256, 128, 128), (4096, 128, 128), (192, 128, 64), (96, 128, 32), (80, 128, 16), (72, 128, 72),
     (128, 32, 32), (48, 32, 16), (45, 32, 45), (16, 128, 16), (8, 128, 8)],
)  # fmt: skip
def test_the_block_divides_the_width(inputs: int, longest: int, block: int) -> None:
    assert block_size(inputs, longest) == block


@pytest.mark.parametrize("shape", SHAPES)
def test_float_is_the_weight_itself(shape: tuple[int, int], tmp_path: Path) -> None:
    values = weights(*shape, ml_dtypes.bfloat16)
    path = write_product(tmp_path / "g.onnx", Float().product("l", ref(values)), shape[1], shape[0])
    x = activations(shape[1])
    (found,) = run(path, {"x": x})
    expected = x.astype(np.float64) @ values.T.astype(np.float64)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


# -- weight-only ------------------------------------------------------------------------------


def reference_block(block: np.ndarray, bits: int) -> tuple[np.ndarray, np.floating[Any]]:
    """Integers and scale of one block, from the definition.

    8 bits: the largest magnitude becomes 127. 4 bits: of five scales, between that which makes the
    largest magnitude 7 and 0.76 of it, the one of least squared error.
    """
    peak = np.abs(block).max()
    if bits == 8:
        candidates, low, high = [peak / np.float32(127)], -127, 127
    else:
        shrinks = (1.0, 0.94, 0.88, 0.82, 0.76)
        candidates, low, high = [peak * np.float32(s) / np.float32(7) for s in shrinks], -8, 7
    if peak == 0:
        return np.zeros(block.shape, np.int8), np.float32(0)
    rounded = [np.clip(np.rint(block / scale), low, high) for scale in candidates]
    errors = [np.square(q * s - block).sum() for q, s in zip(rounded, candidates, strict=True)]
    best = int(np.argmin(errors))
    return rounded[best].astype(np.int8), candidates[best]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("bits", "longest"), [(8, 128), (4, 32)])
def test_weight_only_values(
    bits: int, longest: int, shape: tuple[int, int], tmp_path: Path
) -> None:
    (outputs, inputs), values = shape, weights(*shape)
    quantizer = WeightOnly(bits, longest)
    path = write_product(
        tmp_path / "g.onnx", quantizer.product("layer", ref(values)), inputs, outputs
    )
    stored = initializers(path)
    quantized, scales = (
        stored["weight"].astype(np.int8),
        stored["weight_scale"],
    )  # [in, out], [blocks, out]
    block = block_size(inputs, longest)
    assert quantized.shape == (inputs, outputs)
    assert scales.shape == (inputs // block, outputs)
    assert ir.load(path).graph.initializers["weight"].dtype == (
        ir.DataType.INT8 if bits == 8 else ir.DataType.INT4
    )
    for output in range(outputs):
        for index in range(inputs // block):
            part = slice(index * block, (index + 1) * block)
            expected, scale = reference_block(values[output, part], bits)
            np.testing.assert_array_equal(quantized[part, output], expected)
            assert scales[index, output] == pytest.approx(max(scale, 1e-12), rel=1e-6)
    back = quantized.reshape(-1, block, outputs) * scales[:, None]
    off = back.reshape(inputs, outputs).T - values
    relative = np.sqrt(np.square(off).sum() / np.square(values).sum())
    assert quantizer.errors == {"layer": pytest.approx(relative, rel=1e-4)}
    assert not off[outputs // 2].any()  # zeros stay zeros


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("bits", "longest"), [(8, 128), (4, 32)])
def test_weight_only_product(
    bits: int, longest: int, shape: tuple[int, int], tmp_path: Path
) -> None:
    """ONNX Runtime runs it as MatMulNBits, which at its own choice rounds activations to int8 too: per
    block by half a step of max|x| / 127. Told to keep them float, only float32 rounding is left."""
    outputs, inputs = shape
    product = WeightOnly(bits, longest).product("layer", ref(weights(*shape)))
    path = write_product(tmp_path / "g.onnx", product, inputs, outputs)
    stored, block = initializers(path), block_size(inputs, longest)
    weight = (
        stored["weight"].astype(np.float64).reshape(-1, block, outputs)
        * stored["weight_scale"][:, None]
    ).reshape(inputs, outputs)
    x = activations(inputs)
    expected = x.astype(np.float64) @ weight
    rounding = 1e-5 * (np.abs(x) @ np.abs(weight)) + 1e-7
    (exact,) = run(path, {"x": x}, session__qdq_matmulnbits_accuracy_level="0")
    assert (np.abs(exact - expected) <= rounding).all()
    (found,) = run(path, {"x": x})
    step = np.abs(x).reshape(len(x), -1, block).max(axis=2) / 127  # [rows, blocks]
    reach = np.abs(weight).reshape(-1, block, outputs).sum(axis=1)  # [blocks, out]
    assert (np.abs(found - expected) <= step @ reach / 2 * 1.01 + rounding).all()


def test_some_layers_stay_at_8_bits(tmp_path: Path) -> None:
    quantizer = WeightOnly(4, 32, keep8=frozenset({"head"}))
    for path, dtype in (("head", ir.DataType.INT8), ("layer", ir.DataType.INT4)):
        module = quantizer.product(path, ref(weights(8, 64)))
        file = write_product(tmp_path / f"{path}.onnx", module, 64, 8)
        assert ir.load(file).graph.initializers["weight"].dtype == dtype


def quantizer_of(kind: str) -> Any:
    return {
        "float": Float(), "int8": WeightOnly(8, 128), "int4": WeightOnly(4, 32),
        "static": StaticInt8({"layer": 3.0}),
    }[kind]  # fmt: skip


@pytest.mark.parametrize("kind", ["float", "int8", "int4", "static"])
@pytest.mark.parametrize("shape", SHAPES)
def test_chunks_change_no_byte(
    kind: str, shape: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tensor too large for one block is written in many: every chunk size gives the same files."""
    files = []
    for budget in (1, 4000, 10_000, 1 << 26):
        for module in (checkpoint_module, weight_only_module):
            monkeypatch.setattr(module, "CHUNK_BYTES", budget)
        path = tmp_path / str(budget) / "g.onnx"
        path.parent.mkdir()
        product = quantizer_of(kind).product("layer", ref(weights(*shape)))
        write_product(path, product, shape[1], shape[0])
        data = path.with_suffix(".data")
        files.append((path.read_bytes(), data.read_bytes() if data.exists() else b""))
    assert len(set(files)) == 1


def test_large_tensors_never_are_in_memory_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The blocks that reach the file are as small as the budget asks."""
    from vlm_edge.export.tensors import StreamedTensor

    monkeypatch.setattr(checkpoint_module, "CHUNK_BYTES", 20_000)
    monkeypatch.setattr(weight_only_module, "CHUNK_BYTES", 20_000)
    sizes: list[int] = []
    original = StreamedTensor.tofile

    def tofile(self: Any, file: Any) -> None:
        class Counting:
            def write(self, data: Any) -> None:
                sizes.append(memoryview(data).nbytes)
                file.write(data)

        original(self, Counting())

    monkeypatch.setattr(StreamedTensor, "tofile", tofile)
    for kind in ("float", "int8", "int4", "static"):
        sizes.clear()
        product = quantizer_of(kind).product("layer", ref(weights(64, 512)))
        write_product(tmp_path / f"{kind}.onnx", product, 512, 64)
        assert len(sizes) >= 4
        assert max(sizes) <= 20_000


# -- static int8 ------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("budget", [1, 1 << 26])
def test_static_weights_have_one_scale_an_output(
    budget: int, shape: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_module, "CHUNK_BYTES", budget)
    outputs, inputs = shape
    values = weights(*shape)
    expected = np.abs(values).max(axis=1) / np.float32(127)
    even = np.ones(inputs, np.float32)
    np.testing.assert_array_equal(channel_scales(ref(values), even), np.maximum(expected, 1e-12))
    factors = np.linspace(0.5, 2, inputs, dtype=np.float32)
    np.testing.assert_array_equal(
        channel_scales(ref(values), factors), channel_scales(ref(values * factors), even)
    )
    product = StaticInt8({"layer": 2.0}).product("layer", ref(values))
    stored = initializers(write_product(tmp_path / "g.onnx", product, inputs, outputs))
    assert stored["weight"].dtype == np.int8
    live = expected > 0
    np.testing.assert_array_equal(
        stored["weight"].T[live], np.rint(values[live] / expected[live, None])
    )
    assert not stored["weight"].T[~live].any()
    assert np.abs(stored["weight"]).max() == 127  # symmetric: -128 is never used


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("peak", [0.5, 3.0, 0.0])
def test_static_product(peak: float, shape: tuple[int, int], tmp_path: Path) -> None:
    """x is rounded to 255 levels within +-peak and clipped beyond; integers are summed exactly, so only
    float32 scaling is left."""
    outputs, inputs = shape
    product = StaticInt8({"layer": peak}).product("layer", ref(weights(*shape)))
    path = write_product(tmp_path / "g.onnx", product, inputs, outputs)
    stored, x = initializers(path), activations(inputs)
    step = max(peak / 127, 1e-12)
    seen = np.clip(np.rint(x / np.float32(step)), -128, 127) * step
    weight = stored["weight"].astype(np.float64) * stored["weight_scale"]
    (found,) = run(path, {"x": x})
    tolerance = 1e-5 * (np.abs(seen) @ np.abs(weight)) + 1e-9
    assert (np.abs(found - seen @ weight) <= tolerance).all()


def test_layers_that_share_an_input_share_its_pair(tmp_path: Path) -> None:
    quantizer = StaticInt8({"q": 1.0, "o": 2.0})
    q, k = (quantizer.product(name, ref(weights(8, 16), name)) for name in ("q", "k"))
    o = quantizer.product("o", ref(weights(8, 8), "o"))
    for index, module in enumerate((q, k, o)):
        module._set_name(f"m{index}")
    path = write(
        tmp_path / "g.onnx",
        lambda op, x: [o(op, op.Add(q(op, x["x"]), k(op, x["x"])))],
        {"x": ("float32", ("n", 16))},
        {"y": ("float32", ("n", 8))},
    )
    pairs = [node for node in ir.load(path).graph if node.op_type == "QuantizeLinear"]
    scales = sorted(
        float(node.inputs[1].producer().attributes["value_float"].value) for node in pairs
    )
    assert scales == pytest.approx([1 / 127, 2 / 127])


def test_a_layer_without_range_is_named(tmp_path: Path) -> None:
    product = StaticInt8({"other": 1.0}).product("vision.fc1", ref(weights(8, 16)))
    with pytest.raises(CalibrationError, match=r"vision\.fc1"):
        write_product(tmp_path / "g.onnx", product, 16, 8)


def test_the_observer_notes_each_input_once(tmp_path: Path) -> None:
    observer = Observer(lambda op, value: op.ReduceMax(op.Abs(value), keepdims=0))
    q, k = (observer.product(name, ref(weights(8, 16), name)) for name in ("q", "k"))
    o = observer.product("o", ref(weights(8, 8), "o"))
    for index, module in enumerate((q, k, o)):
        module._set_name(f"m{index}")

    def forward(op: Any, x: dict[str, ir.Value]) -> list[ir.Value]:
        y = o(op, op.Add(q(op, x["x"]), k(op, x["x"])))
        return [y, observer.observed["q"], observer.observed["o"]]

    path = write(
        tmp_path / "g.onnx", forward, {"x": ("float32", ("n", 16))},
        {"y": ("float32", ("n", 8)), "at_q": ("float32", ()), "at_o": ("float32", ())},
    )  # fmt: skip
    assert list(observer.observed) == ["q", "o"]
    assert observer.readers == {"q": "q", "k": "q", "o": "o"}
    x = activations(16)
    y, at_q, at_o = run(path, {"x": x})
    inner = x @ (weights(8, 16) + weights(8, 16)).T
    assert at_q == np.abs(x).max()
    np.testing.assert_allclose(at_o, np.abs(inner).max(), rtol=1e-5)
    np.testing.assert_allclose(y, inner @ weights(8, 8).T, rtol=1e-4, atol=1e-4)
