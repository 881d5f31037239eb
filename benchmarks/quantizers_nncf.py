"""NNCF and OpenVINO in a process of their own: their packages need other versions than ours.

Started by `quantizers.py` with the Python that has openvino, nncf and numpy, and nothing of this project.
Orders come as JSON lines on stdin, answers go to stdout; arrays go through files.

    {"make": recipe, "graph", "output", "feeds": [.npz files], "shape": list or null, "to": .xml}
                                                   -> {"seconds"}
    {"load": key, "model": .xml, "math", "threads"} -> {"math"}
    {"run": key, "feeds": .npz, "to": .npy or null} -> {"ms"}

An error is answered with {"error": one sentence, "traceback": text} and ends the process.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

import nncf
import numpy as np
import openvino
from openvino.frontend.onnx import ConversionExtension

Recipe = Callable[[Any, Any, int], Any]  # (model, nncf.Dataset, how many feeds) -> quantized model


def static(strength: float) -> Recipe:
    """nncf.quantize for transformers with SmoothQuant of this strength; below 0 it is off."""
    alphas = nncf.AdvancedSmoothQuantParameters(matmul=strength)

    def make(model: Any, data: Any, count: int) -> Any:
        return nncf.quantize(
            model,
            data,
            subset_size=count,
            model_type=nncf.ModelType.TRANSFORMER,
            advanced_parameters=nncf.AdvancedQuantizationParameters(smooth_quant_alphas=alphas),
        )

    return make


def weights(mode: str, **settings: Any) -> Recipe:
    """nncf.compress_weights; blocks of 32 at 4 bits, as ours. The output head stays at 8 bits."""
    if mode.startswith("INT4"):
        settings = {"group_size": 32, "ratio": 1.0, **settings}

    def make(model: Any, data: Any, count: int) -> Any:
        calibrated = any(settings.get(kind) for kind in ("awq", "scale_estimation", "gptq"))
        extra = {"dataset": data, "subset_size": count} if calibrated else {}
        return nncf.compress_weights(
            model, mode=nncf.CompressWeightsMode[mode], **settings, **extra
        )

    return make


RECIPES: dict[str, dict[str, Recipe]] = {
    "features": {
        "full precision": lambda model, data, count: model,
        "W8A8, SmoothQuant": static(0.95),  # its default
        "W8A8, SmoothQuant 0.65": static(0.65),
        "W8A8, no SmoothQuant": static(-1),
    },
    "logits": {
        "full precision": lambda model, data, count: model,
        "INT8": weights("INT8_ASYM"),
        "INT4 nearest": weights("INT4_SYM"),
        "INT4 AWQ": weights("INT4_SYM", awq=True),
        "INT4 scale estimation": weights("INT4_SYM", scale_estimation=True),
        "INT4 AWQ, scale estimation": weights("INT4_SYM", awq=True, scale_estimation=True),
        "INT4 GPTQ": weights("INT4_SYM", gptq=True),
    },
}


class Server:
    """The models made and loaded so far."""

    def __init__(self) -> None:
        self.core = openvino.Core()
        # OpenVINO 2026.4 has no TensorScatter. A prompt fills the whole cache from the start, and
        # there what was written is the cache.
        self.core.add_extension(
            ConversionExtension("TensorScatter", lambda node: [node.get_input(1)])
        )
        self.loaded: dict[str, Any] = {}

    def answer(self, order: dict[str, Any]) -> dict[str, Any]:
        if "make" in order:
            return self.make(**order)
        if "load" in order:
            return self.load(**order)
        return self.run(**order)

    def make(
        self,
        make: str,
        graph: str,
        output: str,
        feeds: list[str],
        shape: dict[str, list[int]] | None,
        to: str,
    ) -> dict[str, Any]:
        model = self.read(graph, output)
        if shape is not None:
            model.reshape(shape)
        begin = time.perf_counter()
        arrays = [dict(np.load(file)) for file in feeds]
        kind = "features" if shape is not None else "logits"
        made = RECIPES[kind][make](model, nncf.Dataset(arrays), len(arrays))
        openvino.save_model(made, to, compress_to_fp16=False)
        return {"seconds": time.perf_counter() - begin}

    def read(self, graph: str, output: str) -> Any:
        """The model with one output and without the caches, which nothing reads here."""
        model = self.core.read_model(graph)
        (result,) = (r for r in model.get_results() if output in r.output(0).get_names())
        used = [p for p in model.get_parameters() if not p.friendly_name.startswith("past.")]
        return openvino.Model([result], used, output)

    def load(self, load: str, model: str, math: str | None, threads: int) -> dict[str, Any]:
        settings: dict[str, Any] = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": threads,
        }
        if math is not None:
            # Without this weight-only layers would round their activations to INT8.
            settings |= {"INFERENCE_PRECISION_HINT": math, "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
        compiled = self.core.compile_model(model, "CPU", settings)
        self.loaded[load] = compiled.create_infer_request()
        return {"math": compiled.get_property("INFERENCE_PRECISION_HINT").to_string()}

    def run(self, run: str, feeds: str, to: str | None) -> dict[str, Any]:
        request, arrays = self.loaded[run], dict(np.load(feeds))
        begin = time.perf_counter()
        request.infer(arrays, share_inputs=True, share_outputs=True)
        spent = time.perf_counter() - begin
        if to is not None:
            np.save(to, request.get_output_tensor(0).data)
        return {"ms": 1000 * spent}


def main() -> None:
    """Answer orders until stdin ends."""
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever else prints must not get between the answers

    def answer(**values: Any) -> None:
        channel.write(json.dumps(values) + "\n")
        channel.flush()

    try:
        server = Server()
        answer(
            openvino=openvino.__version__.split("-")[0],
            nncf=nncf.__version__,
            recipes={kind: list(recipes) for kind, recipes in RECIPES.items()},
        )
        for line in sys.stdin:
            answer(**server.answer(json.loads(line)))
    except Exception as error:  # all are told to the parent
        answer(error=f"{type(error).__name__}: {error}", traceback=traceback.format_exc())
        sys.exit(1)


if __name__ == "__main__":
    main()
