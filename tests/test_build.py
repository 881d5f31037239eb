"""Building TensorRT engines: what is kept and built anew, room by model, failures and what they leave behind.

Workers are real processes, but most of them do not build: the gate does (test_tensorrt_rtx.py).
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tensorrt_rtx import needs_tensorrt

from vlm_edge.errors import (
    BuildFailed,
    BundleMissing,
    DeviceUnavailable,
    EngineFailure,
    MemoryShort,
    SettingError,
)
from vlm_edge.export.tensorrt import api, build, layers, memory, worker
from vlm_edge.export.tensorrt.build import BuildOptions, BuildTarget, profile_of
from vlm_edge.runtime.manifest import InstructionSettings, Manifest, MediaSettings, read_manifest
from vlm_edge.runtime.plans import PlanKey, PlanStore
from vlm_edge.runtime.tiling.settings import Mllama, Overlap

RTX = "tensorrt-rtx"
TARGET = BuildTarget("tensorrt-rtx 1.7", "8.6", None, here=False, old=False)


@pytest.fixture
def folder(bundle: Callable[..., Path]) -> Path:
    return bundle("clip-llama", "int8")


@pytest.fixture
def manifest(folder: Path) -> Manifest:
    return read_manifest(folder)


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[worker.Order]:
    """Orders of workers that write a plan at once, on a machine without TensorRT."""
    orders: list[worker.Order] = []

    def fake(order: worker.Order, progress: worker.Progress) -> worker.Done:
        orders.append(order)
        Path(order.plan).write_bytes(order.engine.encode())
        return worker.Done(2, 3, 10**6)

    monkeypatch.setattr(worker, "build", fake)
    monkeypatch.setattr(build, "find_target", lambda device, asked: TARGET)
    return orders


# -- what is kept, and what is built ----------------------------------------------------------


def test_plans_are_kept_until_something_changes(
    folder: Path, built: list[worker.Order], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans = tmp_path / "plans"
    report = build.build(folder, RTX, folder=plans)
    assert [order.engine for order in built] == ["vision", "connector", "llm"]
    assert [e.done for e in report.engines] == [worker.Done(2, 3, 10**6)] * 3
    assert [e.changed for e in report.engines] == [{}] * 3
    kinds = sorted(path.suffix for path in plans.iterdir())
    assert kinds == [".json"] * 3 + [".plan"] * 3  # and nothing that was on its way

    built.clear()
    again = build.build(folder, RTX, folder=plans)
    assert not built and [e.done for e in again.engines] == [None] * 3
    assert [e.size for e in again.engines] == [len("vision"), len("connector"), len("llm")]

    other = dataclasses.replace(TARGET, compute_capability="12.0")
    monkeypatch.setattr(build, "find_target", lambda device, asked: other)
    changed = build.build(folder, RTX, folder=plans)
    assert len(built) == 3
    assert [e.changed for e in changed.engines] == [{"compute_capability": ("8.6", "12.0")}] * 3

    more = build.build(folder, RTX, folder=plans, options=BuildOptions(capacity=100))
    ((has, needed),) = more.engines[0].changed.values()
    assert "capacity 640" in has and "capacity 100" in needed
    assert len(list(plans.glob("*.plan"))) == 9  # all of them stay

    any_room = dataclasses.replace(built_key(plans, "llm"), profile=None)
    store = PlanStore(plans)
    assert store.find("llm", any_room, "").key.profile == more.profile
    built.clear()
    build.build(folder, RTX, folder=plans)  # there already: the runtime takes it from now on
    assert not built and store.find("llm", any_room, "").key.profile == changed.profile


@pytest.mark.parametrize("content", [None, b"ll", b"LLM"])
def test_a_damaged_plan_is_built_anew(
    content: bytes | None,
    folder: Path,
    built: list[worker.Order],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As the runtime's refusal of it promises: with the file removed, and without."""
    build.build(folder, RTX, folder=tmp_path)
    (plan,) = tmp_path.glob("llm-*.plan")
    if content is None:
        plan.unlink()
    else:
        plan.write_bytes(content)
    built.clear()
    build.build(folder, RTX, folder=tmp_path)
    assert [order.engine for order in built] == ["llm"] and plan.read_bytes() == b"llm"
    assert f"{plan.name} is damaged" in caplog.text


def built_key(plans: Path, engine: str) -> PlanKey:
    """The key of what was built last."""
    return PlanStore(plans).entries(engine)[0].key


@pytest.mark.parametrize("here", [True, False])
def test_what_memory_does_not_hold_is_refused_before_the_build(
    here: bool,
    folder: Path,
    built: list[worker.Order],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    target = dataclasses.replace(TARGET, here=here)
    monkeypatch.setattr(build, "find_target", lambda device, asked: target)
    monkeypatch.setattr(memory, "available", lambda gpu_free=None: 10**6)
    doing = "running the engines" if here else "building (vision|connector|llm)"
    with pytest.raises(
        MemoryShort, match=rf"{doing} takes about .* this machine has about 0\.0 GB"
    ):
        build.build(folder, RTX, folder=tmp_path / "plans")
    assert not built and not list((tmp_path / "plans").iterdir())
    build.build(folder, RTX, folder=tmp_path / "plans", options=BuildOptions(force=True))
    assert len(built) == 3
    build.build(folder, RTX, folder=tmp_path / "plans")  # all are there: nothing is built


def test_plans_lie_beside_the_bundle(
    folder: Path, built: list[worker.Order], tmp_path: Path
) -> None:
    copy = tmp_path / "llava-int8"
    copy.symlink_to(folder)
    report = build.build(copy, RTX)
    assert (
        report.folder == PlanStore.beside(folder).folder == folder.with_name(f"{folder.name}.plans")
    )
    for path in report.folder.iterdir():
        path.unlink()
    report.folder.rmdir()


def test_the_bundle_is_not_touched(folder: Path, built: list[worker.Order], tmp_path: Path) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    build.build(folder, RTX, folder=tmp_path / "plans")
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    assert {Path(order.portable).parent for order in built} == {folder.resolve()}


def test_workspace(folder: Path, built: list[worker.Order], tmp_path: Path) -> None:
    build.build(folder, RTX, folder=tmp_path / "a", options=BuildOptions(workspace=123))
    assert {order.workspace for order in built} == {123}
    built.clear()
    build.build(folder, RTX, folder=tmp_path / "b")
    assert all(64 << 20 <= order.workspace <= 2 << 30 for order in built)


def test_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleMissing):
        build.build(tmp_path, RTX)


def test_a_folder_that_cannot_be_written(
    folder: Path, built: list[worker.Order], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingError, match="cannot be written"):
        build.build(folder, RTX, folder=tmp_path / "file" / "plans")


# -- room by model ----------------------------------------------------------------------------


def changed(manifest: Manifest, **decoder: Any) -> Manifest:
    return dataclasses.replace(manifest, decoder=dataclasses.replace(manifest.decoder, **decoder))


@pytest.mark.parametrize(
    ("limit", "chunked", "room"),
    [
        (640, True, (640, 256)),
        (100, True, (100, 100)),
        (32768, True, (4096, 256)),
        (None, True, (2048, 256)),
        (640, False, (640, 640)),  # the whole prompt in one call
    ],
)
def test_room_of_a_language_model(
    limit: int | None, chunked: bool, room: tuple[int, int], manifest: Manifest
) -> None:
    found = profile_of(
        changed(manifest, max_positions=limit, chunked_prefill=chunked), BuildOptions()
    )
    assert (found.capacity, found.chunk) == room
    assert (found.float_type, found.tiles, found.words, found.media) == ("float16", 1, 0, 0)


def test_room_that_is_asked_for(manifest: Manifest) -> None:
    asked = BuildOptions("float32", capacity=300, chunk=20, tiles=5)
    found = profile_of(manifest, asked)
    assert found == dataclasses.replace(
        found, float_type="float32", capacity=300, chunk=20, tiles=5
    )


MEDIA = MediaSettings(layers=1, kv_heads=1, head_dim=4, rule="immediate", end_token_id=None)


def test_room_for_pictures_that_a_model_attends_to(manifest: Manifest) -> None:
    flamingo = changed(manifest, media=MEDIA)  # 9 positions a picture
    assert profile_of(flamingo, BuildOptions()).media == 1024 // 9 * 9
    assert profile_of(flamingo, BuildOptions(images=3)).media == 27
    overlap = Overlap("overlap", (3, 3), (2, 2), (1, 1), "crop", "bicubic")
    tiled = dataclasses.replace(flamingo, tiling=overlap)
    assert profile_of(tiled, BuildOptions(images=2)).media == 2 * (1 + 4) * 9
    mllama = dataclasses.replace(flamingo, tiling=Mllama("mllama", 1601, 4, "bilinear"))
    found = profile_of(mllama, BuildOptions())
    assert (found.media, found.tiles) == (4 * 1601, 4)  # one picture at least, all of its tiles


def test_room_for_an_instruction(manifest: Manifest) -> None:
    prompt = dataclasses.replace(manifest.prompt, instruction=InstructionSettings("x.json", 90))
    assert profile_of(dataclasses.replace(manifest, prompt=prompt), BuildOptions()).words == 90


def test_room_that_no_model_has(manifest: Manifest) -> None:
    with pytest.raises(SettingError, match="capacity = 0; it should be at least 1"):
        BuildOptions(capacity=0)
    with pytest.raises(SettingError, match="--capacity 641 is more than the model's 640 positions"):
        profile_of(manifest, BuildOptions(capacity=641))
    with pytest.raises(SettingError, match="--images is for models that attend to pictures"):
        profile_of(manifest, BuildOptions(images=2))
    whole = changed(manifest, chunked_prefill=False)
    with pytest.raises(SettingError, match="--chunk 16: this model reads a prompt in one piece"):
        profile_of(whole, BuildOptions(chunk=16))
    mllama = dataclasses.replace(manifest, tiling=Mllama("mllama", 9, 4, "bilinear"))
    with pytest.raises(SettingError, match="--tiles 5: this model makes at most 4"):
        profile_of(mllama, BuildOptions(tiles=5))


# -- which GPU --------------------------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    class Orin:
        compute_capability, integrated = "8.7", True

        def __init__(self, device: str) -> None: ...

        def close(self) -> None: ...

    monkeypatch.setattr(build, "Gpu", Orin)


class FakeTensorRT:
    def __init__(self, device: str) -> None:
        self.device, self.name = device, f"{device} 1.0"

    def compute_capabilities(self) -> tuple[str, ...]:
        return ("8.6",) if self.device == RTX else ()

    check, old = api.TensorRT.check, True


def test_the_gpu_is_this_machines(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "TensorRT", FakeTensorRT)
    target = BuildTarget("tensorrt 1.0", "8.7", None, here=True, old=True)
    assert build.find_target("tensorrt", None) == build.find_target("tensorrt", "8.7") == target
    with pytest.raises(
        SettingError, match=r"--compute-capability 8.6: .* GPU it runs on, 8.7 here"
    ):
        build.find_target("tensorrt", "8.6")
    assert build.find_target(RTX, "8.6").compute_capability == "8.6"
    with pytest.raises(
        SettingError, match="compute capability 8.7 is not one that .* builds for: 8.6"
    ):
        build.find_target(RTX, None)


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(device: str) -> None:
        raise DeviceUnavailable(device, "there is no GPU")

    monkeypatch.setattr(build, "TensorRT", FakeTensorRT)
    monkeypatch.setattr(build, "Gpu", absent)
    with pytest.raises(
        SettingError, match=r"no GPU here .* --compute-capability 8.6 \(known are 8.6\)"
    ):
        build.find_target(RTX, None)
    assert build.find_target(RTX, "8.6").compute_capability == "8.6"
    with pytest.raises(DeviceUnavailable, match="'tensorrt' is not available: there is no GPU"):
        build.find_target("tensorrt", None)


# -- workers that fail ------------------------------------------------------------------------


@pytest.fixture
def behave(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., build.BuildReport]:
    """behave(code, progress) builds with workers that run `code` instead of theirs."""
    monkeypatch.setattr(build, "find_target", lambda device, asked: TARGET)

    def run(code: str, progress: build.Progress | None = None) -> build.BuildReport:
        monkeypatch.setattr(worker, "COMMAND", (sys.executable, "-c", code))
        return build.build(folder, RTX, folder=tmp_path / "plans", progress=progress)

    return run


def left(tmp_path: Path) -> list[str]:
    return [path.name for path in (tmp_path / "plans").rglob("*")]


@pytest.mark.parametrize(
    ("code", "sentence"),
    [
        (
            "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
            "did not build vision: out of memory: the system killed its process; .*add swap.*--workspace",
        ),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", r"crashed \(SIGSEGV\)"),
        ("raise SystemExit(3)", "ended with status 3"),
    ],
)
def test_a_worker_that_ends_without_an_answer(
    code: str, sentence: str, behave: Callable[..., Any], tmp_path: Path
) -> None:
    with pytest.raises(BuildFailed, match=sentence):
        behave(code)
    assert left(tmp_path) == []


def test_a_workers_error_is_the_same_here(behave: Callable[..., Any], tmp_path: Path) -> None:
    answer = json.dumps({"error": "EngineFailure", "sentence": "as it is", "traceback": "..."})
    with pytest.raises(EngineFailure, match="^as it is$"):
        behave(f"print({answer!r})")
    with pytest.raises(OSError, match="No space left") as raised:
        behave('print(\'{"os": [28, "No space left", "x.plan"]}\')')
    assert (raised.value.errno, raised.value.filename) == (28, "x.plan")
    assert left(tmp_path) == []


def test_an_interrupt_ends_the_worker(behave: Callable[..., Any], tmp_path: Path) -> None:
    pids = tmp_path / "pid"
    code = (
        f"import os, time; open({str(pids)!r}, 'w').write(str(os.getpid()));"
        "print('{\"progress\": [1, 6]}', flush=True); time.sleep(60)"
    )

    def interrupt(step: str, done: int, total: int) -> None:
        if done:
            raise KeyboardInterrupt

    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        behave(code, interrupt)
    assert time.monotonic() - begin < 30
    with pytest.raises(ProcessLookupError):
        os.kill(int(pids.read_text()), 0)
    assert left(tmp_path) == []


@needs_tensorrt
def test_a_real_worker(folder: Path, manifest: Manifest, tmp_path: Path) -> None:
    """An engine built in its process; and a graph that is none."""
    steps: list[tuple[str, int, int]] = []
    report = build.build(
        folder,
        RTX,
        "8.6",
        tmp_path / "plans",
        BuildOptions(capacity=32),
        lambda *s: steps.append(s),
    )
    products = {
        e.engine: (e.done.int8_found, e.done.int8_promised) for e in report.engines if e.done
    }
    layers_ = (manifest.calibration or {})["parts"]
    assert products == {
        "vision": (len(layers_["vision"]["layers"]),) * 2,
        "connector": (len(layers_["connector"]["layers"]),) * 2,
        "llm": (0, 0),  # its INT8 is of weights alone
    }
    assert ("build llm", 6, 6) in steps
    assert all(e.done is not None and e.done.peak > 1e7 for e in report.engines)
    store = PlanStore(tmp_path / "plans")
    entry = manifest.engines["vision"]
    order = worker.Order(
        RTX, "vision", str(tmp_path / "none.onnx"), entry.inputs, report.profile, 9, "8.6", 10**8,
        str(tmp_path / "timing"), str(tmp_path / "plan"),
    )  # fmt: skip
    with pytest.raises(OSError, match="No such file"):
        worker.build(order, lambda done, total: None)
    assert sorted(p.suffix for p in store.folder.iterdir()) == [".json"] * 3 + [".plan"] * 3


# -- versions of TensorRT ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"EXPLICIT_BATCH": 0, "STRONGLY_TYPED": 1}, 3),  # 10
        ({"STRONGLY_TYPED": 1}, 2),  # TensorRT-RTX
        ({}, 0),  # where nothing else exists
    ],
)
def test_networks_are_strongly_typed(flags: dict[str, int], expected: int) -> None:
    trt = SimpleNamespace(NetworkDefinitionCreationFlag=SimpleNamespace(**flags))
    assert api._flags(trt) == expected


@needs_tensorrt
@pytest.mark.parametrize("tf32", [True, False])
def test_flags_of_the_builder(tf32: bool) -> None:
    """A CUDA graph can hold no allocation (TensorRT-RTX refuses to build what needs one); float32 is all of
    it where it was asked for."""
    trt = api.TensorRT(RTX)
    builder = trt._builder()
    config = builder.create_builder_config()
    trt._configure("llm", builder, config, api.BuildSettings((), ("8.6",), tf32=tf32))
    flags = trt._trt.BuilderFlag
    assert config.get_flag(flags.REQUIRE_USER_ALLOCATION)
    assert config.get_flag(flags.TF32) == tf32


class TimingCache:
    """As TensorRT's: named by its GPU, with entries."""

    def __init__(self, text: bytes) -> None:
        self.entries = set(filter(None, text.split(b" ")))

    def combine(self, other: TimingCache, ignore_mismatch: bool) -> bool:
        self.entries |= other.entries
        return True

    def serialize(self) -> bytes:
        return b" ".join(sorted(self.entries))


class Config:
    """The part of IBuilderConfig that holds a timing cache; takes none of another GPU."""

    cache: TimingCache | None = None

    def create_timing_cache(self, text: bytes) -> TimingCache:
        return TimingCache(text)

    def set_timing_cache(self, cache: TimingCache, ignore_mismatch: bool) -> bool:
        if b"other-gpu" in cache.entries:
            return False
        self.cache = cache
        return True


def test_the_timing_cache_grows(tmp_path: Path) -> None:
    path, config = tmp_path / "timing.cache", Config()
    cache = api.load_timing_cache(config, path)
    cache.entries.add(b"mine")
    path.write_bytes(b"theirs")  # another build has ended meanwhile
    api.keep_timing_cache(config, cache, path)
    assert path.read_bytes() == b"mine theirs"
    assert api.load_timing_cache(Config(), path).entries == {b"mine", b"theirs"}
    path.write_bytes(b"other-gpu")
    assert config.set_timing_cache(api.load_timing_cache(config, path), False)
    assert api.load_timing_cache(config, path).entries == set()


@pytest.mark.parametrize(
    ("errors", "sentence"),
    [
        (
            ["[defaultAllocator.cpp::allocate] Error Code 1: Cuda Runtime (out of memory)"],
            "add swap",
        ),
        (["std::bad_alloc"], "add swap"),
        (
            ["no tactics to implement it within workspace limit"],
            "limit; give layers more with --workspace",
        ),
        (["Could not find any implementation for node x."], "for node x.; another version"),
        ([], "it gives no reason; another version"),
    ],
)
def test_build_errors(errors: list[str], sentence: str) -> None:
    assert sentence in api._build_errors(errors)


RTX_LINE = (
    "Name: a_myl0_3, LayerType: gemm, Inputs: [ { Name: x, Dimensions: [-1,17,36], Datatype: Int8, "
    "Format: (Linear) Row major linear format }], Constants: [ { Name: w, Dimensions: [1,36,50], Datatype: "
    "Int8, Format: ... }, { Name: b, Dimensions: [1,50], Datatype: Float, Format: ... }], Outputs: [ { Name: "
    "y, Dimensions: [-1,17,50], Datatype: Half, Format: ... }], TacticName: sm80_int8, StreamId: 0, "
    "Metadata: [ONNX Layer: node_1]\x1f[ONNX Layer: node_2]"
)
TRT_LINE = (
    "Name: conv, LayerType: CaskConvolution, Inputs: [ { Name: data, Location: Device, Dimensions: "
    "[1,3,224,224], Format/Datatype: Row major linear FP32 }], Outputs: [ { Name: c, Location: Device, "
    "Dimensions: [1,64], Format/Datatype: Thirty-two wide channel vectorized row major Int8 format }], "
    "TacticName: t, StreamId: 0, Metadata: [ONNX Layer: Conv_0]"
)


def test_the_list_of_layers_is_read() -> None:
    gemm, conv = layers.parse(f"{layers.HEAD}\n{RTX_LINE}\n{TRT_LINE}\nBindings:\nx")
    assert (gemm.name, gemm.kind, gemm.nodes) == ("a_myl0_3", "gemm", ("node_1", "node_2"))
    assert (gemm.reads, gemm.writes) == (("Int8", "Int8", "Float"), ("Half",))
    assert gemm.int8_product and not conv.int8_product
    assert (conv.nodes, conv.reads, conv.writes) == (("Conv_0",), ("FP32",), ("Int8",))


def test_a_jetson_needs_no_more_than_the_extra_brings() -> None:
    """What building imports, up to TensorRT itself, with nothing installed but vlm-edge[tensorrt]."""
    code = (
        "import sys\n"
        "for name in ('onnxruntime', 'safetensors', 'torch', 'transformers'):\n"
        "    sys.modules[name] = None\n"
        "from vlm_edge.export.tensorrt import api, build, layers, worker\n"
        "from vlm_edge.cli import build\n"
        "from vlm_edge.export.memory import PeakMemory\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
