"""Graphs for ONNX Runtime's CUDA provider: what they say, and that the GPU has a kernel for all of it.

They run here on the CPU; which operators have kernels was read from the provider's registry
(`lowering/cuda.py`).
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from tensorrt_rtx import CASES
from test_half import BOUND, SIZES, Feeds, error, feeds, portables, run, worst

from vlm_edge.export.lowering import cuda
from vlm_edge.export.lowering.cpu import CONTRIB
from vlm_edge.runtime.feeds import windows
from vlm_edge.runtime.manifest import read_manifest


def of_cuda(portable: Path) -> Path:
    return portable.with_name(f"{portable.stem}.cuda.onnx")


def written(outputs: Feeds) -> Feeds:
    """The cache without its room: the operator does not copy what no step has written."""
    count = SIZES["sequence"]
    return {
        name: value[:, :, :count] if name.startswith("present.") else value
        for name, value in outputs.items()
    }


def kinds(graph: Path) -> Counter[str]:
    return Counter(node.op_type for node in ir.load(graph).graph)


def as_loaded(graph: Path, folder: Path) -> Counter[str]:
    """Operators once ONNX Runtime has optimised the graph."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    return kinds(folder / "optimized.onnx")


@pytest.mark.parametrize("case", CASES)
def test_every_architecture_says_the_same(case: str, bundle: Callable[..., Path]) -> None:
    folder = bundle(case)
    for portable in portables(folder):
        entry = read_manifest(folder).engines[portable.stem]
        graph = folder / entry.lowered["cuda"]
        assert graph == of_cuda(portable)
        onnx.checker.check_model(str(graph), full_check=True)
        given = feeds(portable)
        found, expected = (written(run(path, given)) for path in (graph, portable))
        assert worst(found, expected) < BOUND, portable.stem


@pytest.mark.parametrize(("case", "precision"), [(case, "fp32") for case in CASES] + [
    ("clip-llama-biases", "int8"), ("blip2-t5", "int4"), ("mllama", "int8"),
])  # fmt: skip
def test_every_operator_has_a_kernel(
    case: str,
    precision: str,
    bundle: Callable[..., Path],
) -> None:
    for portable in portables(bundle(case, precision)):
        for node in ir.load(of_cuda(portable)).graph:
            if node.op_type != "Constant":  # an initializer once it is loaded
                assert node.op_type in cuda.KERNELS.get(node.domain, ()), node.name


@pytest.mark.parametrize("case", CASES)
def test_attention_over_a_cache_is_grouped_where_it_can_be(
    case: str,
    bundle: Callable[..., Path],
) -> None:
    """Where the CPU's graph has it, and in float16: the one type for which the provider has the operator."""
    folder = bundle(case)
    layers, of_cpu = read_manifest(folder).decoder.layers, folder / "llm.cpu.onnx"
    graph = ir.load(folder / "llm.cuda.onnx").graph
    grouped = [node for node in graph if node.op_type == "GroupQueryAttention"]
    fits = of_cpu.exists() and kinds(of_cpu)["GroupQueryAttention"] > 0
    assert fits or case not in ("clip-llama-v4", "clip-mistral-window", "siglip-qwen2")
    assert len(grouped) == (layers if fits else 0)
    assert all(node.domain == CONTRIB for node in grouped)
    types = {value.dtype for node in grouped for value in node.inputs[:5] if value is not None}
    assert types <= {ir.DataType.FLOAT16}
    scattered = Counter(node.op_type for node in graph)["TensorScatter"]
    assert scattered == (0 if fits else 2 * layers)


@pytest.mark.parametrize(("case", "precision"), [("clip-llama-biases", "int8"), ("mllama", "int8")])
def test_quantized_weights_without_quantized_activations(
    case: str,
    precision: str,
    bundle: Callable[..., Path],
) -> None:
    """Nearer to full precision than the portable graph, whose activations are rounded too."""
    exact, quantized = bundle(case), bundle(case, precision)
    for portable in portables(quantized):
        graph, given = of_cuda(portable), feeds(portable)
        assert not kinds(graph)["QuantizeLinear"]
        expected, same = run(exact / portable.name, given), run(portable, given)
        for name, value in run(graph, given).items():
            off, cost = (np.linalg.norm(each - expected[name]) for each in (value, same[name]))
            rounded = kinds(portable)["QuantizeLinear"] > 0
            assert off < (1.0 if rounded else 1.05) * cost, (portable.stem, name)
            assert rounded or error(value, same[name]) < BOUND


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_onnx_runtime_fuses_every_quantized_product(
    precision: str, bundle: Callable[..., Path], tmp_path: Path
) -> None:
    """Scales are a Cast of the float32 initializer: it is folded before products are looked for. Of the
    language model one layer's width (70) has no block that the operator takes."""
    folder = bundle("clip-llama", precision)
    for part in ("vision", "connector", "llm"):
        graph = folder / f"{part}.cuda.onnx"
        before, after = kinds(graph), as_loaded(graph, tmp_path)
        odd = sum(
            node.attributes.get_int("block_size", 16) == 70
            for node in ir.load(graph).graph
            if node.op_type == "DequantizeLinear"
        )
        assert bool(odd) == (part == "llm")
        assert after["MatMulNBits"] == before["DequantizeLinear"] - odd > 0
        assert after["DequantizeLinear"] == odd
        assert not after["QuantizeLinear"]


def test_it_shares_the_weights(bundle: Callable[..., Path]) -> None:
    folder = bundle("clip-llama", "int4")
    assert not list(folder.glob("*.cuda.data"))
    for portable in portables(folder):
        graph = of_cuda(portable)
        files = {
            str(value.const_value.location)
            for value in ir.load(graph).graph.initializers.values()
            if isinstance(value.const_value, ir.ExternalTensor)
        }
        assert files == {f"{portable.stem}.data"}
        assert graph.stat().st_size < 1.3 * portable.stat().st_size + 2000


def test_an_int8_cache_has_no_form_there(bundle: Callable[..., Path]) -> None:
    folder = bundle("clip-llama-v4", "fp32", "int8")
    entries = read_manifest(folder).engines
    assert "cuda" not in entries["llm"].lowered
    assert {"vision", "connector"} <= {name for name in entries if "cuda" in entries[name].lowered}
    assert not (folder / "llm.cuda.onnx").exists()


def test_a_window_goes_to_the_operator(bundle: Callable[..., Path], tmp_path: Path) -> None:
    folder = bundle("siglip-qwen2")
    settings = read_manifest(folder).decoder
    for name in ("llm.onnx", "llm.data"):
        shutil.copy(folder / name, tmp_path)
    assert cuda.lower(tmp_path / "llm.onnx", windows(settings)) == "llm.cuda.onnx"
    graph = ir.load(tmp_path / "llm.cuda.onnx").graph
    grouped = [node for node in graph if node.op_type == "GroupQueryAttention"]
    found = [node.attributes.get_int("local_window_size", 0) for node in grouped]
    assert found == [-1, settings.sliding_window]
    inputs = {value.name for value in graph.inputs}
    assert not inputs & {"attention_mask", "sliding_attention_mask", "write_indices"}
