"""OpenVINO: GenAI's pipeline for language models, the bare runtime for vision encoders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlm_edge.benchmarks.peers.protocol import Bits, Generated, Kind, LanguageModel, VisionEncoder

TITLE = "OpenVINO"
PACKAGES = (
    "openvino", "openvino-genai", "openvino-tokenizers", "optimum-intel", "nncf", "torch",
    "transformers",
)  # fmt: skip
VARIANTS: Mapping[Kind, Mapping[str, Bits]] = {
    "language": {"int8": "int8", "int4": "int4"},
    "vision": {"W8A8": "int8", "int8 weights": "int8", "bf16": "bf16", "fp32": "fp32"},
}
GROUP = 64  # of INT4: SmolLM2's width of 576 is no multiple of the default 128
PICTURES = 4  # random ones calibrate W8A8: enough for speed, which is all that is measured
FILE = "openvino_model.xml"


def prepare(kind: Kind, source: Path, llava: Path, variant: str, target: Path) -> None:
    if kind == "language":
        prepare_language(source, variant, target)
    else:
        prepare_vision(source, variant, target)


def prepare_language(source: Path, variant: str, target: Path) -> None:
    """optimum-intel's export with NNCF's symmetric weight compression, and the tokenizer GenAI wants."""
    import openvino
    from openvino_tokenizers import convert_tokenizer
    from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig
    from transformers import AutoTokenizer

    int4 = {"bits": 4, "group_size": GROUP, "ratio": 1.0}
    options: dict[str, Any] = int4 if variant == "int4" else {"bits": 8}
    OVModelForCausalLM.from_pretrained(
        source,
        export=True,
        compile=False,
        quantization_config=OVWeightQuantizationConfig(sym=True, **options),
    ).save_pretrained(target)
    tokenizer = AutoTokenizer.from_pretrained(source)
    for name, model in zip(
        ("tokenizer", "detokenizer"),
        convert_tokenizer(tokenizer, with_detokenizer=True),
        strict=True,
    ):
        openvino.save_model(model, target / f"openvino_{name}.xml")


def prepare_vision(source: Path, variant: str, target: Path) -> None:
    """The torch encoder converted and, but for the float variants, compressed by NNCF."""
    import nncf
    import openvino
    import torch

    from vlm_edge.benchmarks.peers.engines import transformers

    model = transformers.load(source, "fp32", torch.get_num_threads())
    size = model.config.image_size

    class LastState(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, pixels: Any) -> Any:
            return self.model(pixels, output_hidden_states=True).hidden_states[-1]

    shape = (1, 3, size, size)
    with torch.no_grad():
        converted = openvino.convert_model(
            LastState(), example_input=torch.zeros(shape), input=[shape]
        )
    if variant == "W8A8":
        random = np.random.default_rng(0)
        pictures = [random.standard_normal(shape, dtype=np.float32) for _ in range(PICTURES)]
        converted = nncf.quantize(
            converted,
            nncf.Dataset(pictures),
            model_type=nncf.ModelType.TRANSFORMER,
            subset_size=PICTURES,
        )
    elif variant == "int8 weights":
        converted = nncf.compress_weights(converted, mode=nncf.CompressWeightsMode.INT8_SYM)
    openvino.save_model(converted, target / FILE, compress_to_fp16=False)


def load_language(target: Path, variant: str, threads: int) -> LanguageModel:
    return Pipeline(target, threads)


def load_vision(target: Path, variant: str, threads: int) -> VisionEncoder:
    return Encoder(target, variant, threads)


class Pipeline:
    """GenAI's LLMPipeline. It keeps the prefixes of earlier prompts: repeat none."""

    def __init__(self, folder: Path, threads: int) -> None:
        import openvino_genai

        self._api = openvino_genai
        self._pipeline = openvino_genai.LLMPipeline(folder, "CPU", INFERENCE_NUM_THREADS=threads)

    def generate(self, prompt: Sequence[int], steps: int) -> Generated:
        import openvino

        ids = np.array([prompt], np.int64)
        inputs = self._api.TokenizedInputs(openvino.Tensor(ids), openvino.Tensor(np.ones_like(ids)))
        config = self._api.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = 1 + steps, True, False
        result = self._pipeline.generate(inputs, config)
        metrics = result.perf_metrics
        # Both in ms; the second is the mean of the steps after the first token.
        prefill, step = metrics.get_ttft().mean / 1e3, metrics.get_tpot().mean / 1e3
        return Generated(prefill, step * steps, [int(token) for token in result.tokens[0]])


class Encoder:
    """A compiled vision encoder."""

    def __init__(self, folder: Path, variant: str, threads: int) -> None:
        import openvino

        precision = "f32" if variant == "fp32" else "bf16"
        settings = {
            "INFERENCE_NUM_THREADS": threads,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": precision,
        }
        compiled = openvino.Core().compile_model(folder / FILE, "CPU", settings)
        self._request = compiled.create_infer_request()

    def encode(self, pixels: np.ndarray) -> np.ndarray:
        found: np.ndarray = self._request.infer([pixels], share_inputs=True)[0]
        return found
