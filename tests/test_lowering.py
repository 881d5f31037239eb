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

from vlm_edge.export.lowering import cpu
from vlm_edge.runtime.manifest import read_manifest

CASES = ["clip-llama", "clip-llama-native", "siglip-qwen2", "dinov2-swiglu"]


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
        [node.op_type for node in graph if node.op_type != "Constant"] for graph in (before, after)
    ]
    assert kinds[0] == kinds[1]


@pytest.mark.parametrize("part", ["vision", "connector"])
def test_no_int8_activation_is_left(part: str, bundle: Callable[..., Path]) -> None:
    folder = bundle("siglip-qwen2", "int8")
    counts = []
    for name, dtype in ((f"{part}.onnx", np.int8), (f"{part}.cpu.onnx", np.uint8)):
        graph = ir.load(folder / name).graph
        pairs = [node for node in graph if node.op_type == "QuantizeLinear"]
        counts.append(len(pairs))
        for node in pairs:
            readers = [use.node for use in node.outputs[0].uses()]
            assert readers
            assert {reader.op_type for reader in readers} == {"DequantizeLinear"}
            for each in (node, *readers):
                zero = ir.convenience.get_const_tensor(each.inputs[2]).numpy()
                assert zero.dtype == dtype
                assert zero == (0 if dtype == np.int8 else 128)
                assert each.inputs[1] is node.inputs[1]  # one scale
    assert counts[0] == counts[1] > 0


def test_weights_stay_int8_with_zero_point_0(bundle: Callable[..., Path]) -> None:
    graph = ir.load(bundle("clip-llama", "int8") / "vision.cpu.onnx").graph
    weights = [
        node for node in graph
        if node.op_type == "DequantizeLinear" and node.inputs[0].is_initializer()
    ]  # fmt: skip
    assert len(weights) == 2 * 6  # the layers up to the one selected, six linear layers each
    for node in weights:
        assert node.inputs[0].dtype == ir.DataType.INT8
        assert len(node.inputs) == 2 or node.inputs[2] is None


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
