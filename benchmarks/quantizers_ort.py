"""ONNX Runtime's own quantizers, set as its documentation advises, on the graphs we export.

https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html: pre-processing, QDQ format,
unsigned activations and signed weights with a scale a channel; MatMulNBits for language models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlm_edge.errors import ExtraMissing

Feeds = dict[str, np.ndarray]
Make = Callable[[Path, Sequence[Feeds], Path], None]  # (float graph, calibration feeds, output)

try:
    from onnxruntime import quantization
    from onnxruntime.quantization import matmul_nbits_quantizer as nbits
    from onnxruntime.quantization.quant_utils import load_model_with_shape_infer
    from onnxruntime.quantization.shape_inference import quant_pre_process
except ImportError as error:
    raise ExtraMissing("export", error.name or "onnx", "ONNX Runtime's quantizer") from error


class _Reader(quantization.CalibrationDataReader):
    def __init__(self, feeds: Sequence[Feeds]) -> None:
        self._feeds: Iterator[Feeds] = iter(feeds)

    def get_next(self) -> Feeds | None:
        return next(self._feeds, None)


def static(method: str, operators: Sequence[str] | None = None) -> Make:
    """quantize_static with ranges by `method`; `operators` None quantizes all it can."""

    def make(graph: Path, feeds: Sequence[Feeds], out: Path) -> None:
        quantization.quantize_static(
            _prepared(graph, out),
            out,
            _Reader(feeds),
            quant_format=quantization.QuantFormat.QDQ,
            op_types_to_quantize=operators,
            per_channel=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            calibrate_method=quantization.CalibrationMethod[method],
        )

    return make


def dynamic(graph: Path, feeds: Sequence[Feeds], out: Path) -> None:
    """quantize_dynamic: weights beforehand, activations by what each run brings."""
    quantization.quantize_dynamic(
        _prepared(graph, out),
        out,
        op_types_to_quantize=["MatMul"],  # its Attention is another operator than the standard's
        per_channel=True,
        weight_type=quantization.QuantType.QInt8,
    )


def blockwise(bits: int, block: int, **settings: Any) -> Make:
    """MatMulNBits by rounding to nearest; activations are rounded to INT8 in the run, as in ours."""

    def make(graph: Path, feeds: Sequence[Feeds], out: Path) -> None:
        _save(
            nbits.MatMulNBitsQuantizer(str(graph), bits, block, accuracy_level=4, **settings), out
        )

    return make


def k_quant(graph: Path, feeds: Sequence[Feeds], out: Path) -> None:
    """MatMulNBits with scales and zero-points searched as llama.cpp's k-quants do."""
    config = nbits.KQuantWeightOnlyQuantConfig()
    whole = load_model_with_shape_infer(
        graph
    )  # given a path, it leaves other weights where they are
    settings = dict(is_symmetric=False, accuracy_level=4, algo_config=config)
    _save(nbits.MatMulNBitsQuantizer(whole, 4, 32, **settings), out)


def _save(quantizer: Any, out: Path) -> None:
    quantizer.process()
    quantizer.model.save_model_to_file(str(out), use_external_data_format=True)


def _prepared(graph: Path, out: Path) -> Path:
    """The graph after ONNX Runtime's pre-processing, which loses weights that are beside a graph: it is
    given one file. Its symbolic shape inference knows no operator of opset 24; onnx's does."""
    prepared = out.with_name(f"{graph.stem}.prepared.onnx")
    if not prepared.is_file():
        whole = out.with_name(f"{graph.stem}.whole.onnx")
        whole.write_bytes(load_model_with_shape_infer(graph).SerializeToString())
        quant_pre_process(whole, prepared, skip_symbolic_shape=True)
        whole.unlink()
    return prepared


RECIPES: dict[str, dict[str, Make]] = {
    "features": {
        "static, MinMax": static("MinMax"),
        "static, MinMax, MatMul only": static("MinMax", ["MatMul"]),
        "static, Entropy, MatMul only": static("Entropy", ["MatMul"]),
        "static, Percentile, MatMul only": static("Percentile", ["MatMul"]),
        "dynamic, MatMul only": dynamic,
    },
    "logits": {
        "INT8 nearest, block 128": blockwise(8, 128, is_symmetric=True),
        "INT4 nearest, block 32": blockwise(4, 32, is_symmetric=True),
        "INT4 nearest, zero-points, block 32": blockwise(4, 32, is_symmetric=False),
        "INT4 k-quant, block 32": k_quant,
    },
}
