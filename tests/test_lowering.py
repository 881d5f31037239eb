"""The CPU lowering: the same values as the portable graph over the same weights, no int8 activation left."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from small_graph import run
from tiny import CASES

from vlm_edge.export.lowering import cpu
from vlm_edge.runtime import native
from vlm_edge.runtime.manifest import read_manifest
from vlm_edge.runtime.ort import open_session

# What the operator takes in: the two dequantized sides, and the bias.
PRODUCT = {"Constant", "DequantizeLinear", "MatMul", "MatMulIntegerToFloat", "Add"}


def external_files(path: Path) -> set[str]:
    values = ir.load(path).graph.initializers.values()
    tensors = [value.const_value for value in values]
    return {str(t.location) for t in tensors if isinstance(t, ir.ExternalTensor)}


@pytest.mark.parametrize("part", ["vision", "connector"])
@pytest.mark.parametrize("case", CASES)
def test_the_lowered_graph_gives_the_same_values(
    case: str, part: str, bundle: Callable[..., Path]
) -> None:
    """int8 q and uint8 q + 128 stand for the same number, and integers are summed exactly; where ONNX
    Runtime keeps the portable form in float, each linear layer's sum is rounded to float32 once more."""
    folder = bundle(case, "int8")
    (spec,) = read_manifest(folder).engines[part].inputs
    shape = [3 if isinstance(size, str) else size for size in spec.shape]
    values = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    (portable,) = run(folder / f"{part}.onnx", {spec.name: values})
    (lowered,) = run(folder / f"{part}.cpu.onnx", {spec.name: values})
    # A value that rounding moves over the edge of a step moves by that step: the last bit of the
    # result would not survive, most of the results must.
    close = np.isclose(lowered, portable, rtol=1e-4, atol=1e-4)
    assert close.mean() > 0.98
    scale = np.abs(portable).max()
    np.testing.assert_allclose(lowered, portable, rtol=0, atol=0.05 * scale)
    # And the float graph shows what the quantization itself costs: many times more.
    (exact,) = run(bundle(case) / f"{part}.onnx", {spec.name: values})
    assert np.abs(lowered - portable).mean() < np.abs(exact - portable).mean() / 20


@pytest.mark.skipif(native.library() is None, reason="our kernels are not there")
@pytest.mark.parametrize("part", ["vision", "connector"])
@pytest.mark.parametrize("case", CASES)
def test_our_kernels_are_nearer_to_full_precision_than_the_portable_graph(
    case: str, part: str, bundle: Callable[..., Path]
) -> None:
    """They round activations to a scale for each token instead of one for all pictures; and random
    features have channels far outside what was calibrated, which must not spoil their token."""
    folder = bundle(case, "int8")
    (spec,) = read_manifest(folder).engines[part].inputs
    shape = [3 if isinstance(size, str) else size for size in spec.shape]
    values = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    lowered = folder / read_manifest(folder).engines[part].lowered["cpu-native"]
    paths = (bundle(case) / f"{part}.onnx", folder / f"{part}.onnx", lowered)
    exact, portable, own = (
        open_session(path, part, 1).run(None, {spec.name: values})[0] for path in paths
    )
    error = np.linalg.norm(portable - exact)
    assert 0 < np.linalg.norm(own - exact) < 1.1 * error
    assert np.linalg.norm(own - portable) < 2 * error
    graph = ir.load(lowered).graph
    kinds = {node.op_type for node in graph}
    assert "Linears" in kinds
    assert not kinds & {"QuantizeLinear", "DequantizeLinear", "MatMulIntegerToFloat", "Gelu"}


@pytest.mark.parametrize("part", ["vision", "connector"])
def test_it_shares_the_weights_and_nothing_else_differs(
    part: str, bundle: Callable[..., Path]
) -> None:
    folder = bundle("dinov2-swiglu", "int8")
    portable, lowered = folder / f"{part}.onnx", folder / f"{part}.cpu.onnx"
    assert external_files(lowered) == external_files(portable) == {f"{part}.data"}
    assert not (folder / f"{part}.cpu.data").exists()
    assert lowered.stat().st_size < 1.2 * portable.stat().st_size + 1000
    onnx.checker.check_model(str(lowered), full_check=True)
    before, after = ir.load(portable).graph, ir.load(lowered).graph
    assert [(v.name, v.dtype) for v in before.inputs] == [(v.name, v.dtype) for v in after.inputs]
    assert [v.name for v in before.outputs] == [v.name for v in after.outputs]
    kinds = [
        [node.op_type for node in graph if node.op_type not in PRODUCT] for graph in (before, after)
    ]
    assert kinds[0] == kinds[1]
    linears = sum(
        node.op_type == "DequantizeLinear" and node.inputs[0].is_initializer() for node in before
    )
    assert sum(node.op_type == "MatMulIntegerToFloat" for node in after) == linears > 0


@pytest.mark.parametrize("part", ["vision", "connector"])
def test_activations_are_uint8_and_weights_int8(part: str, bundle: Callable[..., Path]) -> None:
    graph = ir.load(bundle("siglip-qwen2", "int8") / f"{part}.cpu.onnx").graph
    products = [node for node in graph if node.op_type == "MatMulIntegerToFloat"]
    assert products
    for node in products:
        quantize = node.inputs[0].producer()
        assert quantize.op_type == "QuantizeLinear"
        zero = ir.convenience.get_const_tensor(node.inputs[4]).numpy()
        assert zero.dtype == np.uint8
        assert zero == 128
        assert node.inputs[4] is quantize.inputs[2]
        assert node.inputs[2] is quantize.inputs[1]  # one scale
        assert node.inputs[1].dtype == ir.DataType.INT8
        assert node.inputs[1].is_initializer()
        assert node.inputs[5] is None  # the weights' zero-point is 0
    readers = [len(node.inputs) == 7 for node in products]
    assert all(readers)  # every layer of this case has a bias, and none is added apart


@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
def test_a_graph_without_int8_activations_is_run_as_it_is(
    precision: str, bundle: Callable[..., Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(bundle("clip-llama", precision), tmp_path / "bundle")
    assert cpu.lower(folder / "llm.onnx") is None
    assert not (folder / "llm.cpu.onnx").exists()


def test_lowering_leaves_the_portable_graph_alone(
    bundle: Callable[..., Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(bundle("clip-llama", "int8"), tmp_path / "bundle")
    before = [(folder / name).read_bytes() for name in ("vision.onnx", "vision.data")]
    (folder / "vision.cpu.onnx").unlink()
    assert cpu.lower(folder / "vision.onnx") == "vision.cpu.onnx"
    assert before == [(folder / name).read_bytes() for name in ("vision.onnx", "vision.data")]
    made = (bundle("clip-llama", "int8") / "vision.cpu.onnx").read_bytes()
    assert (folder / "vision.cpu.onnx").read_bytes() == made
