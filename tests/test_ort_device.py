"""device="cuda": the CUDA provider is there or an error says why; what a step sends; the same answers.

There is no GPU here. The answers are those of the runtime on `fake_cuda_provider.FakeCuda`, which keeps ONNX
Runtime's rules of binding; the messages below are what onnxruntime-gpu 1.31.1 said on machines without a
GPU, without CUDA's libraries and with a driver that reported each error.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
from fake_cuda_provider import PROVIDER, FakeCuda, RealSession

from vlm_edge import VLM
from vlm_edge.errors import DeviceUnavailable, DriverTooOld, EngineFailure
from vlm_edge.runtime import ort, ort_cuda, ort_decoder
from vlm_edge.runtime.bundle import Bundle
from vlm_edge.runtime.encoder_decoder import EncoderDecoder
from vlm_edge.runtime.ort_decoder import OrtDecoder

# a mask and its growing steps; GroupQueryAttention with a window; an encoder-decoder; OPT; pictures that
# are attended to, as IDEFICS and as Llama 3.2 Vision do
FAMILIES = [
    "clip-llama",
    "siglip-qwen2",
    "blip2-t5",
    "instructblip-vicuna",
    "blip2-opt",
    "idefics",
    "mllama",
]
NEW_TOKENS = 24
QUESTION = "what is the color of this and that thing?"

Make = Callable[..., Path]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts in several chunks, and caches that grow while an answer is given."""
    for name, value in (("CHUNK", 7), ("STEP", 8), ("ROOM", 16)):
        monkeypatch.setattr(ort_decoder, name, value)


def same_graphs(patch: pytest.MonkeyPatch, *kinds: str) -> None:
    """Every device runs the graphs of one of `kinds`, of none the portable ones: what differs is where
    their arrays are."""
    patch.setattr(ort, "graph_of", lambda bundle, name, device="cpu": bundle.graph(name, *kinds))


def answers(vlm: VLM, pictures: dict[str, Path]) -> list[list[int]]:
    """Token ids of a few prompts, one after the other in the same caches."""
    settings: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "ignore_eos": True}
    found = [
        vlm.generate(QUESTION, [pictures["wide.png"]], **settings).token_ids,
        vlm.generate("what is this", **settings).token_ids,
        vlm.generate("what?", [pictures["tall.png"]], **settings).token_ids,
    ]
    if vlm.template is not None:
        chat = vlm.chat()
        for images in ([pictures["small.png"]], [], [pictures["wide.png"]]):
            found.append(chat.ask(QUESTION, images, **settings).token_ids)
    return found


def decoder_of(vlm: VLM) -> OrtDecoder:
    decoder = vlm.decoder
    if isinstance(decoder, EncoderDecoder):
        decoder = decoder.decoder
    assert isinstance(decoder, OrtDecoder)
    return decoder


# -- the same answers ---------------------------------------------------------------------------


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("graphs", ["portable", "cuda"])
@pytest.mark.parametrize("case", FAMILIES)
def test_answers_are_those_of_the_cpu(
    case: str,
    graphs: str,
    bundle: Make,
    pictures: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same graphs, with all that they read and write on the device; those for CUDA have keys and
    values in float16, from engine to engine too."""
    same_graphs(monkeypatch, graphs)
    with VLM.load(bundle(case), threads=1) as vlm:
        expected = answers(vlm, pictures)
    assert max(len(set(tokens)) for tokens in expected) >= 4
    gpu = FakeCuda(monkeypatch)
    with VLM.load(bundle(case), device="cuda", threads=1) as vlm:
        assert answers(vlm, pictures) == expected
        assert "inputs_embeds" in decoder_of(vlm)._remote
        kind = np.dtype("float16" if graphs == "cuda" else "float32")
        assert {value.numpy().dtype for value in decoder_of(vlm)._caches.values()} == {kind}
    assert gpu.uploads
    assert gpu.downloads


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("host", [{"write_indices"}, {"positions", "logit_positions"}], ids=str)
def test_what_the_session_reads_from_the_host_stays_there(
    host: set[str], bundle: Make, pictures: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shapes are computed on the CPU, from inputs that are never copied to the device."""
    same_graphs(monkeypatch)
    with VLM.load(bundle("clip-llama"), threads=1) as vlm:
        expected = answers(vlm, pictures)
    FakeCuda(monkeypatch, host)
    with VLM.load(bundle("clip-llama"), device="cuda", threads=1) as vlm:
        assert not decoder_of(vlm)._remote & host
        assert answers(vlm, pictures) == expected


@pytest.mark.parametrize("wrong", [set(), {"all"}], ids=["nothing remote", "all remote"])
def test_an_input_in_the_wrong_memory_would_show(
    wrong: set[str], bundle: Make, pictures: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the two tests above rest on: the copy made while binding is never renewed."""
    same_graphs(monkeypatch)
    with VLM.load(bundle("clip-llama"), threads=1) as vlm:
        expected = answers(vlm, pictures)
    FakeCuda(monkeypatch, {"write_indices"})
    names = {"inputs_embeds", "positions", "write_indices", "logit_positions", "attention_mask"}
    monkeypatch.setattr(ort_decoder, "device_inputs", lambda _: names if wrong else set())
    with VLM.load(bundle("clip-llama"), device="cuda", threads=1) as vlm:
        try:
            found = answers(vlm, pictures)
        except EngineFailure:  # or logits that are not finite
            return
        assert found != expected


# -- what a step sends --------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["clip-llama", "blip2-t5", "idefics", "siglip-qwen2"])
def test_a_step_sends_one_block_up_and_its_logits_down(
    case: str, bundle: Make, pictures: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    same_graphs(monkeypatch)
    gpu = FakeCuda(monkeypatch)
    with VLM.load(bundle(case), device="cuda", threads=1) as vlm:
        pieces = iter(
            vlm.stream(QUESTION, [pictures["wide.png"]], max_new_tokens=9, ignore_eos=True)._pieces
        )
        next(pieces)  # the prefill's
        next(pieces)  # the first step binds
        decoder = decoder_of(vlm)
        capacity, made = decoder.capacity, gpu.made
        addresses = [value.data_ptr() for value in decoder._caches.values()]
        gpu.uploads.clear(), gpu.downloads.clear()
        for _ in range(5):
            next(pieces)
        assert decoder.capacity == capacity
        assert gpu.made == made, "a step allocates nothing"
        assert [value.data_ptr() for value in decoder._caches.values()] == addresses
        assert decoder._step is not None
        assert gpu.uploads == [decoder._step._inputs._block.nbytes] * 5
        assert gpu.downloads == [4 * vlm.manifest.decoder.vocab_size] * 5


def test_a_prompt_s_pictures_go_up_once(
    bundle: Make, pictures: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys and values that every step reads: none of them goes up again with a chunk or a step."""
    same_graphs(monkeypatch)
    monkeypatch.setattr(ort_decoder, "CHUNK", 7)
    gpu = FakeCuda(monkeypatch)
    with VLM.load(bundle("idefics"), device="cuda", threads=1) as vlm:
        vlm.generate(QUESTION, [pictures["wide.png"]], max_new_tokens=6, ignore_eos=True)
        decoder = decoder_of(vlm)
        assert decoder._constants
        sizes = [value.real.tensor_size_in_bytes() for value in decoder._constants.values()]
        assert len(set(sizes)) == 1
        assert gpu.uploads.count(sizes[0]) == len(sizes)


def test_growing_keeps_what_was_written(bundle: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    same_graphs(monkeypatch)
    gpu = FakeCuda(monkeypatch)
    bundle = Bundle(bundle("clip-llama"))
    decoder = OrtDecoder(bundle, 1, "cuda")
    width = bundle.manifest.decoder.width
    embeds = np.random.default_rng(0).standard_normal((1, 20, width)).astype(np.float32)
    decoder.prefill(embeds)
    assert gpu.downloads == [4 * bundle.manifest.decoder.vocab_size], "nothing to copy yet"
    decoder.length = 5
    before = decoder._caches["key.1"].numpy()
    decoder._reserve(ort_decoder.STEP + 1)
    after = decoder._caches["key.1"].numpy()
    np.testing.assert_array_equal(after[:, :, :5], before[:, :, :5])
    assert not after[:, :, 5:].any()
    decoder.clear()
    assert (decoder.capacity, decoder.length) == (0, 0)
    decoder.close()
    with pytest.raises(EngineFailure, match="it is closed"):
        decoder.decode(embeds[0, 0])


# -- the provider is there, or an error ---------------------------------------------------------


def test_a_provider_that_did_not_load_is_an_error(
    bundle: Make, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    same_graphs(monkeypatch)
    FakeCuda(monkeypatch, loads=False)
    monkeypatch.setattr(ort_cuda, "_load_error", lambda: LIBRARY)
    with pytest.raises(DeviceUnavailable, match=r"'cuda' is not available: .*libcublasLt.so.13"):
        VLM.load(bundle("clip-llama"), device="cuda")
    assert capfd.readouterr().out == "", "a library prints nothing"


@pytest.mark.skipif(
    PROVIDER in onnxruntime.get_available_providers(), reason="onnxruntime-gpu is installed"
)
def test_the_package_for_the_cpu_is_named(bundle: Make) -> None:
    graph = Bundle(bundle("clip-llama")).graph("connector")
    with pytest.raises(DeviceUnavailable, match=r"for the CPU alone; run: .*'vlm-edge\[gpu\]'"):
        ort.open_session(graph, "connector", 1, device="cuda")


def test_a_bundle_without_graphs_for_it_is_refused(
    bundle: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    FakeCuda(monkeypatch)
    opened = Bundle(bundle("clip-llama"))
    for entry in opened.manifest.engines.values():
        entry.lowered.pop("cuda", None)
    with pytest.raises(DeviceUnavailable, match=r"no graph of vision for it; export it again$"):
        ort.OrtEngine(opened, "vision", 1, "cuda")
    with pytest.raises(DeviceUnavailable, match=r"no graph of llm for it; .* --kv-cache float32"):
        VLM.load(bundle("clip-llama", cache="int8"), device="cuda")


def test_work_on_the_cpu_is_an_error(bundle: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what ONNX Runtime itself records of a session: of this one all nodes are on the CPU."""

    def session(graph: Any, options: Any, **_: Any) -> Any:
        real = RealSession(graph, options, providers=["CPUExecutionProvider"])
        return SimpleNamespace(
            get_providers=lambda: [PROVIDER],
            get_provider_graph_assignment_info=real.get_provider_graph_assignment_info,
        )

    FakeCuda(monkeypatch)
    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    graph = Bundle(bundle("clip-llama")).graph("connector")
    with pytest.raises(EngineFailure, match=r"would run .*\d+ MatMul.* on the CPU; install"):
        ort.open_session(graph, "connector", 1, device="cuda")


def test_what_the_runtime_asks_of_a_session_is_there(bundle: Make) -> None:
    """The fake's names are ONNX Runtime's own, and on the CPU every input is the host's."""
    session = ort.open_session(Bundle(bundle("clip-llama")).graph("llm"), "llm", 1)
    assert ort_decoder.device_inputs(session) == set()
    for fake in ("get_providers", "get_provider_graph_assignment_info", "run_with_iobinding"):
        assert hasattr(session, fake)
    assert {"bind_input", "bind_ortvalue_input", "bind_ortvalue_output"} <= set(
        dir(session.io_binding())
    )
    assert isinstance(onnxruntime.cuda_version, str)


SOURCE = "/onnxruntime_src/onnxruntime/core/providers/cuda/cuda_call.cc"
CALL = (
    "std::conditional_t<THRW, void, onnxruntime::common::Status> onnxruntime::CudaCall(ERRTYPE, const "
    "char*, const char*, SUCCTYPE, const char*, const char*, int) [with ERRTYPE = cudaError; bool THRW = "
    "true; SUCCTYPE = cudaError; std::conditional_t<THRW, void, common::Status> = void]"
)
LIBRARY = "libcublasLt.so.13: cannot open shared object file: No such file or directory"


def said(error: str) -> RuntimeError:
    return RuntimeError(
        f"{SOURCE}:154 {CALL} {SOURCE}:146 {CALL} CUDA failure {error} ; GPU=-1 ; hostname=vm ; "
        "file=/onnxruntime_src/onnxruntime/core/providers/cuda/cuda_execution_provider.cc ; line=355 ; "
        "expr=cudaSetDevice(info_.device_id); \n\n"
    )


@pytest.mark.parametrize(
    ("message", "kind", "sentence"),
    [
        ("100: no CUDA-capable device is detected", DeviceUnavailable,
         "there is no NVIDIA GPU, or CUDA_VISIBLE_DEVICES hides it"),
        ("35: CUDA driver version is insufficient for CUDA runtime version", DriverTooOld,
         "its driver serves CUDA 12.4, this library needs 13.0; update the driver"),
        ("209: no kernel image is available for execution on the device", DeviceUnavailable,
         "no code for this GPU"),
        ("803: system has unsupported display driver / cuda driver combination", DeviceUnavailable,
         "'system has unsupported display driver / cuda driver combination' (error 803)"),
        ("999: unknown error", DeviceUnavailable, "nvidia-smi"),
        ("2: out of memory", EngineFailure, "the GPU's memory is full"),
    ],
)  # fmt: skip
def test_what_cuda_says(
    message: str, kind: Any, sentence: str, bundle: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def session(*_: Any, **__: Any) -> Any:
        raise said(message)

    FakeCuda(monkeypatch)
    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    monkeypatch.setattr(onnxruntime, "cuda_version", "13.0")
    monkeypatch.setattr(ort_cuda, "_driver_version", lambda: "12.4")
    with pytest.raises(kind) as caught:
        ort.open_session(Path("any.onnx"), "llm", 1, device="cuda")
    assert sentence in str(caught.value)
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)
    assert "onnxruntime_src" not in str(caught.value)


@pytest.mark.parametrize(
    ("message", "version", "kind", "sentence"),
    [
        (LIBRARY, "13.0", DeviceUnavailable,
         "install CUDA 13.0, or run: pip install nvidia-cublas nvidia-cuda-nvrtc nvidia-cuda-runtime "
         "nvidia-cufft nvidia-curand nvidia-cudnn-cu13"),
        ("libcurand.so.10: cannot open shared object file: No such file or directory", "12.8",
         DeviceUnavailable, "pip install nvidia-cublas-cu12 nvidia-cuda-nvrtc-cu12"),
        ("libcuda.so.1: cannot open shared object file: No such file or directory", "13.0",
         DeviceUnavailable, "there is no NVIDIA driver (libcuda.so.1)"),
        ("libonnxruntime_providers_cuda.so: undefined symbol: cuTensorMapEncodeTiled", "13.0",
         DriverTooOld, "this library needs 13.0"),
    ],
)  # fmt: skip
def test_what_the_provider_s_library_says(
    message: str, version: str, kind: Any, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnxruntime, "cuda_version", version)
    error = ort_cuda.absence(message)
    assert type(error) is kind
    assert sentence in str(error)


def test_a_failing_run_is_told_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    failed = ort.failure("llm", said("700: an illegal memory access was encountered"))
    assert str(failed) == (
        "engine llm failed: CUDA failure 700: an illegal memory access was encountered"
    )
    monkeypatch.setattr(onnxruntime, "cuda_version", "13.0")
    # A text in the library of 1.31.1; its first words are those of any failing node.
    missing = "Non-zero status code returned while running Conv node. Status Message: cuDNN is unavailable"
    failed = ort.failure("vision", RuntimeError(f"{missing} for CUDA Execution Provider: "))
    assert str(failed).endswith("cuDNN was not found; run: pip install nvidia-cudnn-cu13")
    assert str(ort.failure("llm", RuntimeError("one\ntwo"))) == "engine llm failed: one"
    assert str(ort.failure("llm", ValueError())) == "engine llm failed: ValueError"


@pytest.mark.skipif(os.name != "posix", reason="the driver is a library of this name on Linux")
def test_the_driver_s_version_is_unknown_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ort_cuda.ctypes, "CDLL", missing)
    assert ort_cuda._driver_version() == "of an unknown version"
