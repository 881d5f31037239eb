"""TensorRT's runtime without a GPU: on stand-ins that run the lowered graphs, every architecture answers as on
the CPU, and what a GPU would not forgive is found (`fake_cuda.py`, `fake_trt.py`)."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fake_trt
import numpy as np
import pytest
from conftest import Cache
from fake_cuda import CUresult
from trt_plans import VERSIONS, Machine, machine

from vlm_edge import VLM
from vlm_edge.errors import (
    CapacityExceeded,
    DeviceUnavailable,
    DriverTooOld,
    EngineFailure,
    GpuFailure,
    OutOfDeviceMemory,
    PlanDamaged,
    PlanMismatch,
    PlanMissing,
)
from vlm_edge.runtime import trt
from vlm_edge.runtime.cuda import Gpu
from vlm_edge.runtime.trt_decoder import TrtDecoder
from vlm_edge.runtime.trt_engine import Context
from vlm_edge.runtime.trt_memory import LayerCache, NewPositions, pack

SETTINGS: dict[str, Any] = {"max_new_tokens": 8, "ignore_eos": True}
FLOAT16 = 0.01  # relative error of logits; up to 0.004 here
# GQA; MQA and scaled RoPE; a window; two masks and tied weights; rotations that depend on the whole call.
LLAVA = ["clip-llama-v4", "clip-llama-native", "clip-mistral-window", "siglip-qwen2", "clip-padded-square"]  # fmt: skip
FAMILIES = [
    *LLAVA, "next-clip-mistral", "smolvlm-small-tiles", "blip2-opt", "blip2-t5", "instructblip-vicuna",
    "instructblip-t5", "idefics", "idefics-plain", "mllama", "mllama-native", "gpt_neox", "mpt",
    "llama-every",
]  # fmt: skip
INTEGRATED = {"tensorrt": False, "tensorrt-rtx": False, "tensorrt-10.3": True}  # as it mostly is
NATIVE = "clip-llama-native"
ANSWERS = [(family, kind) for family in FAMILIES for kind in ("tensorrt-rtx", "tensorrt-10.3")]
ANSWERS += [(NATIVE, "tensorrt"), ("idefics", "tensorrt")]
Bundles = Callable[..., Path]
Make = Callable[..., Machine]


@pytest.fixture(scope="module")
def on_cpu(bundle: Bundles) -> Callable[[str], VLM]:
    return Cache(lambda case: VLM.load(bundle(case), threads=1, check=False))


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Make:
    """make(kind, **gpu) -> a machine with that TensorRT."""

    def here(kind: str = "tensorrt", **gpu: Any) -> Machine:
        return machine(monkeypatch, tmp_path, kind, **{"integrated": INTEGRATED[kind], **gpu})

    return here


@pytest.fixture
def llava(bundle: Bundles) -> Path:
    return bundle(NATIVE)


def room_of(vlm: VLM) -> dict[str, Any]:
    """What engines for the prompts below are built with: prefill in several calls, where the model can."""
    limit = vlm.manifest.decoder.max_positions or 400
    room: dict[str, Any] = {"capacity": min(limit, 800)}
    if vlm.manifest.decoder.chunked_prefill:
        room["chunk"] = 9
    if vlm.manifest.decoder.media is not None:
        room["images"] = 3
    return room


def prompts(pictures: dict[str, Path]) -> list[list[Path | str]]:
    wide, tall, small = (pictures[name] for name in ("wide.png", "tall.png", "small.png"))
    return [[wide, "what is the color?"], [small, tall, "what?"], ["this and that"], [small, "a"]]


@pytest.mark.parametrize(("case", "kind"), ANSWERS)
def test_answers_are_those_of_the_cpu(
    case: str,
    kind: str,
    make: Make,
    bundle: Bundles,
    on_cpu: Callable[[str], VLM],
    pictures: dict[str, Path],
) -> None:
    cpu, here = on_cpu(case), make(kind)
    with here.load(bundle(case), **room_of(cpu)) as vlm:
        for prompt in prompts(pictures):
            expected = cpu.generate(prompt, **SETTINGS)
            found = vlm.generate(prompt, **SETTINGS)
            assert found.token_ids == expected.token_ids
            assert found.prompt_tokens == expected.prompt_tokens
        decoder = vlm.manifest.decoder
        varies = decoder.media is not None or decoder.start_token_id is not None
        # Kernels of TensorRT-RTX for shapes that vary are exchanged: then the graph is its own.
        theirs = kind == "tensorrt-rtx" and varies
        assert ("cuGraphLaunch" in here.gpu.calls) == (not theirs)
        inner = vlm.decoder if isinstance(vlm.decoder, TrtDecoder) else vlm.decoder.decoder
        context = inner._steps[1]._context._context
        if kind == "tensorrt-rtx":
            graphs = fake_trt.CudaGraphStrategy
            found = context.config.cuda_graph_strategy
            assert found is (graphs.WHOLE_GRAPH_CAPTURE if theirs else graphs.DISABLED)
    assert here.gpu.clean


@pytest.mark.parametrize("integrated", [False, True], ids=["discrete", "integrated"])
@pytest.mark.parametrize("kind", VERSIONS)
def test_turns_of_a_chat_share_the_cache(
    kind: str, integrated: bool, make: Make, llava: Path, on_cpu: Any, pictures: dict[str, Path]
) -> None:
    cpu, here = on_cpu(NATIVE), make(kind, integrated=integrated)
    with here.load(llava, capacity=500, chunk=16) as vlm:
        chat, before = vlm.chat(), 0
        for text, names in (("what is this?", ["wide.png"]), ("and?", []), ("that?", ["tall.png"])):
            answer = chat.ask(text, [pictures[name] for name in names], **SETTINGS)
            assert answer.token_ids == cpu.generate(chat.messages[:-1], **SETTINGS).token_ids
            assert answer.timings.prefilled_tokens <= answer.prompt_tokens - before + 6
            before = answer.prompt_tokens
        assert ("cuMemHostGetDevicePointer" in here.gpu.calls) == integrated


@pytest.mark.parametrize("case", [NATIVE, "clip-mistral-window", "blip2-t5", "idefics"])
@pytest.mark.parametrize("kind", ["tensorrt-rtx", "tensorrt-10.3"])
def test_float16_engines_take_and_give_float32(
    kind: str,
    case: str,
    make: Make,
    bundle: Bundles,
    on_cpu: Any,
    pictures: dict[str, Path],
) -> None:
    cpu, here = on_cpu(case), make(kind)
    built = cpu.build_prompt([pictures["wide.png"], "what is the color?"])
    with here.load(bundle(case), float_type="float16", **room_of(cpu)) as vlm:
        inner = vlm.decoder if isinstance(vlm.decoder, TrtDecoder) else vlm.decoder.decoder
        assert inner._loaded.inputs["past.key.0"].dtype == np.float16
        expected, found = logits_of(cpu, built), logits_of(vlm, built)
    assert found.dtype == np.float32
    errors = np.linalg.norm(found - expected, axis=1) / np.linalg.norm(expected, axis=1)
    assert 0 < errors.max() < FLOAT16


def logits_of(vlm: VLM, built: Any) -> np.ndarray:
    """[4, vocab]: behind a prompt, and behind three more tokens."""
    read = vlm.inputs(built)
    vlm.decoder.length = 0
    if read.media is not None:
        vlm.decoder.attend(read.media)
    found = [vlm.decoder.prefill(read.embeds).copy()]
    found += [vlm.decoder.decode(vlm.embeddings.row(token)).copy() for token in (5, 9, 4)]
    return np.stack(found)


# -- room --------------------------------------------------------------------------------------------


def embeds_of(vlm: VLM, count: int) -> np.ndarray:
    width = vlm.manifest.decoder.width
    return np.random.default_rng(0).standard_normal((1, count, width)).astype(np.float32)


@pytest.mark.parametrize("kind", VERSIONS)
def test_the_whole_capacity_is_used_and_no_more(
    kind: str, make: Make, llava: Path, on_cpu: Any
) -> None:
    cpu, here = on_cpu(NATIVE), make(kind)
    with here.load(llava, capacity=17, chunk=5) as vlm:
        assert vlm.decoder.capacity == 17
        for decoder in (vlm.decoder, cpu.decoder):
            decoder.length = 0
        embeds = embeds_of(vlm, 13)
        found = [d.prefill(embeds).copy() for d in (vlm.decoder, cpu.decoder)]
        np.testing.assert_allclose(*found, atol=1e-4)
        for token in (3, 8, 5, 7):
            row = vlm.embeddings.row(token)
            found = [d.decode(row).copy() for d in (vlm.decoder, cpu.decoder)]
            np.testing.assert_allclose(*found, atol=1e-4)
        before = len(here.gpu.calls)
        with pytest.raises(CapacityExceeded, match=r"takes 18, .* built for 17; .*--capacity 18"):
            vlm.decoder.decode(row)
        with pytest.raises(CapacityExceeded, match="takes 20"):
            vlm.decoder.prefill(embeds_of(vlm, 3))
        assert len(here.gpu.calls) == before
        assert vlm.decoder.length == 17
        vlm.decoder.length = 16  # what was decoded last is forgotten
        np.testing.assert_array_equal(vlm.decoder.decode(row), found[0])


@pytest.mark.parametrize("case", ["clip-llama", "blip2-t5"])
def test_an_answer_without_room_is_refused_before_it_begins(
    case: str, make: Make, bundle: Bundles
) -> None:
    here = make()
    with here.load(bundle(case), capacity=24) as vlm:
        ask = {"prompt": "a b", "template": False, "ignore_eos": True}
        count = len(vlm.build_prompt("a b", template=False).token_ids)
        read = 1 if case == "blip2-t5" else count  # by the decoder, an encoder's prompt is not
        most = 24 - read + 1
        before = len(here.gpu.calls)
        with pytest.raises(
            CapacityExceeded, match=rf"{most + 1} new ones takes 25, .*--capacity 25"
        ):
            vlm.stream(**ask, max_new_tokens=most + 1)
        assert len(here.gpu.calls) == before
        assert len(vlm.generate(**ask, max_new_tokens=most).token_ids) == most


def test_a_prompt_that_must_be_one_call_needs_a_chunk_as_long(make: Make, bundle: Bundles) -> None:
    here = make()
    with here.load(bundle("clip-padded-square"), capacity=40) as vlm:
        assert not vlm.decoder.keeps_prefix
        longest = vlm.decoder._loaded.inputs["inputs_embeds"]
        vlm.decoder._loaded.inputs["inputs_embeds"] = fake_trt.shortened(longest, 8)
        with pytest.raises(CapacityExceeded, match=r"takes 9, .* built for 8; .*--chunk 9"):
            vlm.decoder.prefill(embeds_of(vlm, 9))


def test_more_pictures_than_there_is_room_for(
    make: Make, bundle: Bundles, pictures: dict[str, Path]
) -> None:
    here, wide = make(), pictures["wide.png"]
    with here.load(bundle("idefics"), capacity=90, images=2) as vlm:
        with pytest.raises(CapacityExceeded, match=r"takes 3, .* built for 2; .*--images 3"):
            vlm.generate([wide, "a", pictures["tall.png"], "b", pictures["small.png"]], **SETTINGS)
        vlm.generate([wide, "a", wide], **SETTINGS)


def test_a_prompt_longer_than_an_encoder_takes(make: Make, bundle: Bundles) -> None:
    with make().load(bundle("blip2-t5"), capacity=12) as vlm:
        with pytest.raises(
            CapacityExceeded, match=r"inputs_embeds of engine llm_encoder takes 13, .*--capacity 13"
        ):
            vlm.decoder.prefill(embeds_of(vlm, 13))
        vlm.decoder.prefill(embeds_of(vlm, 12))


def test_engines_that_do_not_fit(make: Make, llava: Path) -> None:
    here = make(total=30_000)
    with pytest.raises(OutOfDeviceMemory, match=r"GPU Fake GPU has no room for .* MB are free"):
        here.load(llava, capacity=600)
    assert here.gpu.clean


# -- what is kept, and what is not ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", VERSIONS)
def test_clearing_forgets_values_that_are_no_numbers(
    kind: str, make: Make, llava: Path, pictures: dict[str, Path]
) -> None:
    here = make(kind)
    with here.load(llava, capacity=60, chunk=16) as vlm:
        expected = vlm.generate("what is this?", **SETTINGS).token_ids
        here.gpu.device[vlm.decoder._memory.address].fill(0xFF)
        vlm.decoder.clear()
        assert vlm.decoder.length == 0
        assert vlm.generate("what is this?", **SETTINGS).token_ids == expected


@pytest.mark.parametrize("kind", VERSIONS)
def test_another_thread_may_ask(kind: str, make: Make, llava: Path) -> None:
    here = make(kind)
    vlm = here.load(llava, capacity=60)
    expected = vlm.generate("what is this?", **SETTINGS).token_ids
    with ThreadPoolExecutor(1) as thread:
        found = thread.submit(lambda: vlm.generate("what is this?", **SETTINGS).token_ids)
        assert found.result() == expected
    with ThreadPoolExecutor(1) as thread:
        thread.submit(vlm.close).result()
    assert here.gpu.clean


def test_one_graph_serves_all_prompts(make: Make, llava: Path) -> None:
    here = make()
    with here.load(llava, capacity=60) as vlm:
        vlm.generate("what is this?", **SETTINGS)
        vlm.generate("what?", **SETTINGS)
        steps = here.gpu.calls.count("cuGraphLaunch")
        assert here.gpu.calls.count("cuStreamBeginCapture") == 1
        assert steps == 2 * (SETTINGS["max_new_tokens"] - 1) - 1  # the first step prepares it


def test_pictures_of_another_size_are_another_graph(
    make: Make, bundle: Bundles, pictures: dict[str, Path]
) -> None:
    here, wide = make(), pictures["wide.png"]
    with here.load(bundle("idefics"), capacity=90, images=2) as vlm:
        for prompt in ([wide, "a"], [wide, "the"], [wide, "a", pictures["tall.png"]]):
            vlm.generate(prompt, **SETTINGS)
        assert here.gpu.calls.count("cuStreamBeginCapture") == 2
        assert len(here.gpu.executables) == 1


def test_an_engine_that_no_graph_can_hold(make: Make, llava: Path, on_cpu: Any) -> None:
    here = make(uncapturable=True)
    with here.load(llava, capacity=60) as vlm:
        found = vlm.generate("what is this?", **SETTINGS).token_ids
    assert found == on_cpu(NATIVE).generate("what is this?", **SETTINGS).token_ids
    assert here.gpu.calls.count("cuStreamBeginCapture") == 1  # it is not tried again
    assert "cuGraphLaunch" not in here.gpu.calls


def test_what_was_closed_is_closed(make: Make, llava: Path) -> None:
    here = make()
    vlm = here.load(llava, capacity=40)
    logits = vlm.decoder.prefill(embeds_of(vlm, 3))
    kept = logits.copy()
    vlm.close()
    vlm.close()
    assert here.gpu.clean
    np.testing.assert_array_equal(logits, kept)
    with pytest.raises(EngineFailure, match="llm failed: it is closed"):
        vlm.decoder.decode(np.zeros(vlm.manifest.decoder.width, np.float32))
    with pytest.raises(EngineFailure, match="vision failed: it is closed"):
        vlm.vision.run({})


def test_feeds_that_are_not_the_inputs(make: Make, llava: Path) -> None:
    with make().load(llava, capacity=40) as vlm:
        with pytest.raises(EngineFailure, match="vision failed: images, pixel_values: not what"):
            vlm.vision.run({"images": np.zeros(1)})
        with pytest.raises(EngineFailure, match=r"pixel_values has shape \[3, 4\]"):
            vlm.vision.run({"pixel_values": np.zeros((3, 4), np.float32)})
        image = vlm.manifest.image
        pixels = np.zeros((2, 3, image.height, image.width), np.float32)
        with pytest.raises(CapacityExceeded, match=r"engine vision takes 2, .* for 1; .*--tiles 2"):
            vlm.vision.run({"pixel_values": pixels})


def test_a_model_that_was_not_told_what_to_attend_to(make: Make, bundle: Bundles) -> None:
    vlm = make().load(bundle("idefics"), capacity=40, images=1)
    with vlm, pytest.raises(EngineFailure, match="not told what to attend to"):
        vlm.decoder.prefill(embeds_of(vlm, 3))


def test_a_failure_of_the_gpu_is_told(make: Make, llava: Path) -> None:
    here = make()
    with here.load(llava, capacity=40) as vlm:
        here.gpu.failing["cuStreamSynchronize"] = CUresult.CUDA_ERROR_ILLEGAL_ADDRESS
        with pytest.raises(GpuFailure, match="CUDA_ERROR_ILLEGAL_ADDRESS"):
            vlm.generate("what?", **SETTINGS)
        here.gpu.failing.clear()


@pytest.mark.parametrize(("row", "copies"), [(128, 1), (24, 3)], ids=["even", "uneven"])
def test_new_positions_of_all_layers_are_one_copy_if_they_lie_so(
    row: int, copies: int, make: Make
) -> None:
    here = make("tensorrt-10.3", integrated=False)
    gpu, heads, capacity, count = Gpu("tensorrt"), 2, 6, 4
    offsets, size = pack({f"{n}": heads * capacity * row for n in range(3)})
    memory = gpu.allocate(size, "the cache")
    gpu.zero(memory)
    caches = [
        LayerCache(n, memory.address + at, True, heads, capacity, row) for n, at in offsets.items()
    ]
    new = NewPositions(gpu, caches, count)
    gpu.synchronize()
    rng, expected = np.random.default_rng(0), []
    for cache in caches:
        values = rng.integers(0, 255, (heads, count, row), np.uint8)
        here.gpu.view(new.address(cache), values.size)[...] = values.reshape(-1)
        expected.append(np.pad(values, ((0, 0), (2, 0), (0, 0))))
    new.append(start=2, size=count)
    assert here.gpu.calls.count("cuMemcpy2DAsync") == copies
    gpu.synchronize()
    for cache, values in zip(caches, expected, strict=True):
        found = here.gpu.view(cache.address, cache.bytes(capacity))
        np.testing.assert_array_equal(found.reshape(heads, capacity, row), values)
    new.close()
    gpu.close()
    assert here.gpu.clean


# -- plans ---------------------------------------------------------------------------------------------


def test_plans_are_looked_for_beside_the_bundle(make: Make, llava: Path, tmp_path: Path) -> None:
    here, folder = make(), Path(shutil.copytree(llava, tmp_path / "copy"))
    with pytest.raises(
        PlanMissing, match=rf"vision; make it with `vlm build {folder} --device tensorrt`"
    ):
        VLM.load(folder, device="tensorrt", check=False)
    (tmp_path / "copy.plans").symlink_to(here.build(folder, capacity=40))
    with VLM.load(folder, device="tensorrt", check=False) as vlm:
        vlm.decoder.prefill(embeds_of(vlm, 3))


def test_a_plan_for_another_gpu(make: Make, llava: Path) -> None:
    here = make()
    plans = here.build(llava, capacity=40)
    here.gpu.capability = (8, 7)
    with pytest.raises(
        PlanMismatch, match=r"compute_capability is 8.7, the plan's is 8.6; .*vlm build"
    ):
        VLM.load(llava, device="tensorrt", plans=plans, check=False)
    assert here.gpu.clean


def test_kernels_that_were_compiled_are_kept(make: Make, llava: Path) -> None:
    here = make("tensorrt-rtx")
    plans = here.build(llava, capacity=40)
    kept = plans / "kernels-8.6.cache"

    def kernels() -> Any:
        with VLM.load(llava, device="tensorrt-rtx", plans=plans, check=False) as vlm:
            cache = vlm.decoder._loaded.kernels._cache
            cache.kernels.add("of a shape that came")
            return cache

    kernels()
    first = kept.read_bytes()
    assert b"of a shape that came" in first and b"pixel_values" in first and b"past.key.0" in first
    kept.write_text('["an earlier one"]')
    assert "an earlier one" in kernels().kernels
    kept.write_bytes(b"of another version")
    kernels()
    assert kept.read_bytes() == first
    with VLM.load(llava, device="tensorrt-rtx", plans=plans, check=False) as vlm:
        vlm.decoder._loaded.kernels._cache.serialize = lambda: None  # as where it fails
    assert kept.read_bytes() == first
    with make("tensorrt").load(llava, capacity=40) as vlm:
        folder = vlm.decoder._loaded.kernels._path.parent
    assert not list(folder.glob("kernels-*"))  # TensorRT's plans are finished


# TensorRT's own words: 10.3's, 10.3's, TensorRT-RTX 1.7's, and TensorRT-RTX 1.7's on a machine without a driver
REFUSALS: list[tuple[str, type[Exception], str]] = [
    ("IRuntime::deserializeCudaEngine: Error Code 1: Serialization (Serialization assertion stdVersionRead == "
     "kSERIALIZATION_VERSION failed.Version tag does not match. Note: Current Version: 236, Serialized Engine "
     "Version: 239)", EngineFailure, r"does not take its plan \(.*Version tag.*make it again with `vlm build .*`"),
    ("The engine plan file is generated on an incompatible device, expecting compute 8.7 got compute 8.6, please "
     "rebuild.", EngineFailure, r"expecting compute 8.7.*make it again with"),
    ("IRuntime::deserializeCudaEngine: Error Code 1: Serialization (Serialization assertion header.magicTag == "
     "kEXPECTED_MAGIC_TAG failed.)", EngineFailure, "make it again with"),
    ("Error Code 1: Cuda Runtime (In catchCudaError at checkMacros.cpp:250 (cudaError 35: CUDA driver version is "
     "insufficient for CUDA runtime version))", DriverTooOld, "serves CUDA 12.6, this library needs"),
    ("Error Code 2: OutOfMemory (Requested size was 4 bytes.)", OutOfDeviceMemory, "no room for engine vision"),
    ("Error Code 6: something else", EngineFailure, r"its plan does not load \(Error Code 6"),
]  # fmt: skip


@pytest.mark.parametrize(("said", "error", "sentence"), REFUSALS)
def test_a_plan_that_tensorrt_refuses(
    said: str, error: type[Exception], sentence: str, make: Make, llava: Path
) -> None:
    here = make()
    plans = here.build(llava, refusal=said, capacity=40)
    with pytest.raises(error, match=sentence):
        VLM.load(llava, device="tensorrt", plans=plans, check=False)
    assert here.gpu.clean


def test_the_command_that_makes_a_plan_names_its_folder(
    make: Make, llava: Path, tmp_path: Path
) -> None:
    make()
    (plans := tmp_path / "my plans").mkdir()
    with pytest.raises(PlanMissing, match=rf"`vlm build .* --device tensorrt -o '{plans}'`"):
        VLM.load(llava, device="tensorrt", plans=plans, check=False)


def test_a_plan_that_was_changed(make: Make, llava: Path) -> None:
    here = make()
    plans = here.build(llava, capacity=40)
    (plan,) = plans.glob("llm-*.plan")
    plan.write_bytes(plan.read_bytes().replace(b"profiles", b"profileS"))
    with pytest.raises(PlanDamaged, match="llm-.*differs from its sha256"):
        VLM.load(llava, device="tensorrt", plans=plans)
    assert here.gpu.clean


def test_a_decoder_needs_both_profiles(make: Make, llava: Path) -> None:
    here = make()
    with pytest.raises(EngineFailure, match="llm failed: it has 1 profiles instead of 2"):
        VLM.load(llava, device="tensorrt", plans=here.build(llava, profiles=1, capacity=40))
    assert here.gpu.clean


def test_a_profile_that_is_refused(make: Make, llava: Path) -> None:
    here = make()
    with here.load(llava, capacity=40) as vlm:
        loaded, gpu = vlm.vision._loaded, vlm.vision._gpu
        scratch = gpu.allocate(fake_trt.SCRATCH, "activations")
        sentence = r"vision failed: profile 1 is refused \(Profile index 1 is out"
        with pytest.raises(EngineFailure, match=sentence):
            Context(loaded, gpu, scratch, profile=1, fixed=False)


def test_without_tensorrt(llava: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> Any:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(trt.importlib, "import_module", absent)
    with pytest.raises(DeviceUnavailable, match="tensorrt is not installed; it comes with JetPack"):
        VLM.load(llava, device="tensorrt")
    with pytest.raises(DeviceUnavailable, match="tensorrt_rtx is not installed; run: pip install"):
        VLM.load(llava, device="tensorrt-rtx")


# -- the stand-in is like the real module ----------------------------------------------------------------

CLASSES = {
    "ILogger": fake_trt.ILogger, "Runtime": fake_trt.Runtime, "ICudaEngine": fake_trt.RtxEngine,
    "IExecutionContext": fake_trt.RtxContext, "IRuntimeConfig": fake_trt.RuntimeConfig,
    "IRuntimeCache": fake_trt.RuntimeCache,
}  # fmt: skip


def test_the_real_module_has_every_name() -> None:
    real = pytest.importorskip(
        "tensorrt_rtx_bindings",
        reason="TensorRT-RTX is not installed (requirements/tensorrt-rtx.txt)",
    )
    module = fake_trt.module(Any, "tensorrt-rtx")
    for name, value in vars(module).items():
        theirs = getattr(real, name)
        for member in getattr(value, "__members__", ()):
            assert hasattr(theirs, member)
    count = 0
    for name, ours in CLASSES.items():
        for attribute in {n for each in ours.__mro__[:-1] for n in vars(each)} - fake_trt.OWN:
            if not attribute.startswith("_"):
                assert hasattr(getattr(real, name), attribute), f"{name}.{attribute}"
                count += 1
    assert count >= 25
    assert real.nptype(real.DataType.HALF) is np.float16
