"""The planner's estimates beside what can be counted or measured without a GPU, and the refusals."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
from click.testing import CliRunner
from conftest import Cache
from small_graph import write
from tensorrt_rtx import GATE, needs_tensorrt, profile
from test_tensorrt_rtx import REAL
from tiny import build

from vlm_edge.cli.plan import plan
from vlm_edge.errors import MemoryShort, SettingError
from vlm_edge.export.lowering import tensorrt
from vlm_edge.export.pipeline import export
from vlm_edge.export.precision import PrecisionPlan
from vlm_edge.export.tensorrt import memory, planner
from vlm_edge.export.tensorrt.planner import GB, EngineMemory, Memory, estimate, peak_activations
from vlm_edge.runtime.bundle import Bundle
from vlm_edge.runtime.manifest import read_manifest
from vlm_edge.runtime.plans import PlanProfile

FLOAT16 = PlanProfile("float16", capacity=64, chunk=16)
FLOAT32 = replace(FLOAT16, float_type="float32")


def estimated(folder: Path, room: PlanProfile) -> Memory:
    return estimate(folder, read_manifest(folder), room)


def engine(found: Memory, name: str) -> EngineMemory:
    return next(e for e in found.engines if e.name == name)


# -- what can be counted --------------------------------------------------------------------


def test_float_weights_are_the_files_and_half_of_them(bundle: Callable[..., Path]) -> None:
    folder = bundle("clip-llama")
    file = sum((folder / f"vision.{kind}").stat().st_size for kind in ("data", "onnx"))
    whole, half = estimated(folder, FLOAT32), estimated(folder, FLOAT16)
    assert 0.7 * file < engine(whole, "vision").weights <= file
    halved = engine(half, "vision").weights
    assert engine(whole, "vision").weights == pytest.approx(2 * halved, rel=0.01)  # int64 stays


def test_prefill_and_decode_keep_the_sequences_weights_twice(bundle: Callable[..., Path]) -> None:
    """All but the head's, which both ask for one position."""
    folder = bundle("clip-llama")
    graph = ir.load(folder / "llm.onnx").graph
    sizes = {v.name: 4 * v.shape.numpy()[0] * v.shape.numpy()[1]
             for v in graph.initializers.values() if v.shape and v.shape.rank() == 2}  # fmt: skip
    twice = sum(size for name, size in sizes.items() if "_proj." in str(name))
    once = sum(planner._tensor_bytes(v, FLOAT32) for v in graph.initializers.values())
    assert twice > 0
    assert engine(estimated(folder, FLOAT32), "llm").weights == once + twice


def test_quantized_weights_stay_as_they_are(bundle: Callable[..., Path]) -> None:
    """Of a tiny model much is float: the numbers themselves are 1 and half a byte each."""
    folder = bundle("clip-llama", "int4")
    values = ir.load(folder / "llm.onnx").graph.initializers.values()
    for value in values:
        count = 1
        for axis in value.shape or ():
            assert isinstance(axis, int)
            count *= axis
        by_type = {
            ir.DataType.INT4: count / 2,
            ir.DataType.INT8: count,
            ir.DataType.FLOAT: 2 * count,
        }
        if value.dtype in by_type:
            assert planner._tensor_bytes(value, FLOAT16) == int(by_type[value.dtype])


def test_an_older_tensorrt_holds_int8_weights_as_floats(bundle: Callable[..., Path]) -> None:
    """As many as the full-precision bundle's, and a little of what moved outliers; what is INT8 on both
    sides stays."""
    folder, exact = bundle("clip-llama", "int8"), bundle("clip-llama")
    manifest = read_manifest(folder)
    old, new = estimate(folder, manifest, FLOAT16, unpacked=True), estimated(folder, FLOAT16)
    assert engine(old, "vision") == engine(new, "vision")
    whole = engine(estimated(exact, FLOAT16), "llm").weights
    scales = sum(
        planner._tensor_bytes(value, FLOAT16)
        for value in ir.load(folder / "llm.onnx").graph.initializers.values()
        if str(value.name).endswith("_scale")
    )
    assert engine(old, "llm").weights == pytest.approx(whole + scales, rel=0.01)
    assert engine(old, "llm").weights > 1.2 * engine(new, "llm").weights
    four = bundle("clip-llama", "int4")
    stored = ir.load(four / "llm.onnx").graph.initializers.values()
    more = sum(  # two bytes instead of one, and twice but for the head's; INT4 stays as it is
        planner._tensor_bytes(value, FLOAT16) * (3 if "_proj." in str(value.name) else 1)
        for value in stored
        if value.dtype == ir.DataType.INT8
    )
    old = estimate(four, read_manifest(four), FLOAT16, unpacked=True)
    assert engine(old, "llm").weights == engine(estimated(four, FLOAT16), "llm").weights + more


@pytest.mark.parametrize("case", ["clip-llama-v4", "dinov2-llama"])
def test_the_cache_is_what_the_decoder_takes(case: str, bundle: Callable[..., Path]) -> None:
    """In float32 the CPU's own arrays at that capacity; float16 takes half."""
    from vlm_edge.runtime.ort_decoder import OrtDecoder

    folder = bundle(case)
    decoder = OrtDecoder(Bundle(folder), threads=1)
    arrays = decoder._arrays(FLOAT32.capacity)
    assert estimated(folder, FLOAT32).cache == sum(array.nbytes for array in arrays.values())
    assert estimated(folder, FLOAT32).cache == 2 * estimated(folder, FLOAT16).cache
    decoder.close()


def test_activations_are_what_lives_at_once(tmp_path: Path) -> None:
    """x [s, 4] -> a = x + x, b = a + x, y = a + b: x is held all through, and a, b and y at the end."""
    path = write(
        tmp_path / "sum.onnx",
        lambda op, x: [op.Add(a := op.Add(x["x"], x["x"]), op.Add(a, x["x"]))],
        {"x": ("float32", ("sequence", 4))},
        {"y": ("float32", ("sequence", 4))},
    )
    graph = ir.load(path).graph
    assert (
        peak_activations(graph, FLOAT32, {"sequence": 10}) == 4 * (10 * 4) * 4 - 160
    )  # x is let go
    assert peak_activations(graph, FLOAT16, {"sequence": 10}) == 240


def test_attention_counts_its_scores_twice(tmp_path: Path) -> None:
    spec = ("float32", (1, 2, "sequence", 4))
    path = write(
        tmp_path / "attention.onnx",
        lambda op, x: [op.Attention(x["q"], x["k"], x["v"])],
        {"q": spec, "k": spec, "v": spec},
        {"y": spec},
    )
    room = {"sequence": 100}
    tensors, scores = 4 * (2 * 100 * 4), 2 * (2 * 100 * 100)
    assert peak_activations(ir.load(path).graph, FLOAT16, room) == 2 * (tensors + scores)


def test_more_room_takes_more(bundle: Callable[..., Path]) -> None:
    folder = bundle("clip-llama")
    small = estimated(folder, FLOAT16)
    for wider in (replace(FLOAT16, capacity=512), replace(FLOAT16, chunk=64)):
        assert estimated(folder, wider).running > small.running
    tiles = estimated(folder, replace(FLOAT16, tiles=4))
    assert engine(tiles, "vision").activations > engine(small, "vision").activations


@pytest.mark.parametrize("case", [cases[0] for cases in GATE.values()] + ["blip2-t5"])
def test_every_architecture_is_estimated(case: str, bundle: Callable[..., Path]) -> None:
    """Every axis of every graph is known, and every engine counts."""
    folder = bundle(case)
    found = estimated(folder, profile(media=64))
    assert [e.name for e in found.engines] == list(read_manifest(folder).engines)
    assert all(e.weights > 0 and e.activations > planner.SCRATCH for e in found.engines)
    assert found.running == sum(size for _, size in found.terms())


# -- what TensorRT-RTX's builder says -------------------------------------------------------


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Layers of real width, by precision."""
    root = tmp_path_factory.mktemp("real")
    checkpoint = Cache(lambda: build("real-width", root / "checkpoint", REAL))

    def make(precision: str) -> Path:
        export(checkpoint(), root / precision, precision=PrecisionPlan.uniform(precision))
        return root / precision

    return Cache(make)


def built(folder: Path, part: str, room: PlanProfile, scratch: Path) -> tuple[int, int]:
    """Bytes of weights and of activations, as TensorRT-RTX's own log counts them."""
    import tensorrt_rtx_bindings as trt

    class Log(trt.ILogger):  # type: ignore[misc]  # the bindings have no types
        def __init__(self) -> None:
            super().__init__()
            self.found: dict[str, int] = {}

        def log(self, severity: Any, message: str) -> None:
            said = re.match(r"Total (Weights|Activation) Memory: (\d+) bytes", message)
            if said:
                self.found[said[1]] = max(self.found.get(said[1], 0), int(said[2]))

    scratch.mkdir()
    log = Log()
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    assert parser.parse_from_file(str(tensorrt.lower(folder / f"{part}.onnx", scratch, room)))
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            layer.__class__ = trt.IAttentionInputLayer
            layer.attention.decomposable = True
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM86, 0)
    for shapes in tensorrt.profiles(read_manifest(folder).engines[part].inputs, room, 1):
        made = builder.create_optimization_profile()
        for name, span in shapes.items():
            made.set_shape(name, *span)
        config.add_optimization_profile(made)
    assert builder.build_serialized_network(network, config) is not None
    return log.found["Weights"], log.found["Activation"]


@needs_tensorrt
@pytest.mark.parametrize(
    ("precision", "part"),
    [("int8", "vision"), ("fp32", "llm"), ("int8", "llm")],
)
def test_estimates_hold_what_the_builder_reports(
    precision: str, part: str, real: Callable[[str], Path], tmp_path: Path
) -> None:
    room = PlanProfile("float16", capacity=512, chunk=256)
    weights, activations = built(real(precision), part, room, tmp_path / "build")
    found = engine(estimated(real(precision), room), part)
    assert 0.97 * weights <= found.weights <= 1.25 * weights
    assert activations <= found.activations <= 2 * activations + planner.SCRATCH


@needs_tensorrt
def test_the_process_that_builds_stays_below_the_estimate(
    real: Callable[[str], Path], tmp_path: Path
) -> None:
    from vlm_edge.export.tensorrt import worker

    folder, room = real("fp32"), PlanProfile("float16", capacity=512, chunk=256)
    order = worker.Order(
        device="tensorrt-rtx",
        engine="llm",
        portable=str(folder / "llm.onnx"),
        inputs=read_manifest(folder).engines["llm"].inputs,
        profile=room,
        picture=1,
        compute_capability="8.6",
        workspace=1 << 30,
        timing_cache=str(tmp_path / "timing"),
        plan=str(tmp_path / "engine.plan"),
    )
    done = worker.build(order, lambda steps, total: None)
    estimate_of_it = engine(estimated(folder, room), "llm").building
    assert 0.2 * estimate_of_it < done.peak < estimate_of_it


# -- refusals -------------------------------------------------------------------------------

LARGE = Memory(
    (
        EngineMemory("vision", weights=GB, activations=GB // 10, building=4 * GB),
        EngineMemory("llm", weights=3 * GB, activations=GB // 10, building=11 * GB),
    ),
    cache=GB // 2,
    overhead=GB // 2,
)


def test_what_fits_passes() -> None:
    planner.check(LARGE, 12 * GB, "this machine")


@pytest.mark.parametrize(
    ("found", "free", "sentence"),
    [
        (LARGE, 6 * GB, "building llm takes about 11.0 GB, a board has about 6.0 GB for it; the largest part "
                        "is the weights of llm (3.0 GB): export with --int8 or --int4, or take a smaller model"),
        (LARGE, 2 * GB, "running the engines takes about 5.2 GB, a board has about 2.0 GB for it; the largest "
                        "part is the weights of llm (3.0 GB): export with --int8 or --int4, or take a smaller model"),
        (replace(LARGE, cache=9 * GB), 12 * GB, "running the engines takes about 13.7 GB, a board has about "
                        "12.0 GB for it; the largest part is the keys and values (9.0 GB): lower --capacity"),
    ],
    ids=["building", "running", "cache"],
)  # fmt: skip
def test_what_does_not_fit_is_refused_by_its_largest_part(
    found: Memory, free: int, sentence: str
) -> None:
    with pytest.raises(MemoryShort) as caught:
        planner.check(found, free, "a board")
    assert str(caught.value) == sentence


def test_boards() -> None:
    assert planner.budget("orin-nano-8gb") == 6 * GB
    assert all(
        budget < int(re.sub(r"\D", "", name.split("-")[-1]))
        for name, budget in planner.BOARDS.items()
    )
    with pytest.raises(SettingError, match="orin-nano-4gb, orin-nano-8gb"):
        planner.budget("nano")


# -- free memory ----------------------------------------------------------------------------


def system(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="ascii")
    return root


FREE = {"proc/meminfo": "MemTotal:  8000000 kB\nMemAvailable:  4000000 kB\n"}


def test_free_memory_of_a_board(tmp_path: Path) -> None:
    assert memory.available(system(tmp_path, FREE)) == 4_096_000_000


def test_free_memory_of_a_discrete_gpu_is_its_own(tmp_path: Path) -> None:
    assert memory.available(system(tmp_path, FREE), gpu_free=123) == 123


def test_free_memory_within_a_control_group(tmp_path: Path) -> None:
    """The group has 1000 of 3000 left, and 500 in file pages that it would give up."""
    group = "sys/fs/cgroup/box/"
    files = {
        "proc/self/cgroup": "0::/box\n",
        f"{group}memory.max": "3000\n",
        f"{group}memory.current": "2000\n",
        f"{group}memory.stat": "anon 1500\ninactive_file 500\n",
        "sys/fs/cgroup/memory.max": "max\n",
        "sys/fs/cgroup/memory.current": "2000\n",
    }
    assert memory.available(system(tmp_path, {**FREE, **files})) == 1500


def test_free_memory_within_an_old_control_group(tmp_path: Path) -> None:
    group = "sys/fs/cgroup/memory/memory."
    files = {f"{group}limit_in_bytes": "900\n", f"{group}usage_in_bytes": "1000\n"}
    assert memory.available(system(tmp_path, {**FREE, **files})) == 0


@pytest.mark.parametrize(
    ("free", "workspace"), [(0, 64 << 20), (4 << 30, 1 << 30), (64 << 30, 2 << 30)]
)
def test_workspace_is_a_part_of_what_is_free(free: int, workspace: int) -> None:
    assert memory.workspace_bytes(free) == workspace


# -- the command ----------------------------------------------------------------------------


def test_the_command_prints_what_it_takes(bundle: Callable[..., Path]) -> None:
    result = CliRunner().invoke(plan, [str(bundle("clip-llama")), "--board", "orin-nano-8gb"])
    assert result.exit_code == 0, result.output
    assert "orin-nano-8gb has 6,000 MB for it" in result.stdout
    assert [line for line in result.stdout.splitlines() if "connector" in line]


def test_the_command_as_json(bundle: Callable[..., Path]) -> None:
    folder = bundle("clip-llama")
    result = CliRunner().invoke(plan, [str(folder), "--capacity", "64", "--chunk", "16", "--json"])
    document = json.loads(result.stdout)
    found = estimated(folder, FLOAT16)
    assert document["running"] == found.running
    assert document["engines"]["llm"]["building"] == found.building
    assert document["board"] is None


def test_the_command_refuses_what_does_not_fit(
    bundle: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(planner.BOARDS, "toy", 0.1)
    result = CliRunner().invoke(plan, [str(bundle("clip-llama")), "--board", "toy"])
    assert result.exit_code == 1
    assert (
        "toy has about 0.1 GB for it; the largest part is the CUDA and the process" in result.stderr
    )


@pytest.mark.parametrize("version", ["10", "11.", "x.y", ""])
def test_the_command_wants_a_whole_version(version: str, bundle: Callable[..., Path]) -> None:
    result = CliRunner().invoke(plan, [str(bundle("clip-llama")), "--tensorrt", version])
    assert result.exit_code == 2 and "such as 10.3" in result.stderr


def test_the_command_reads_no_damaged_graph(bundle: Callable[..., Path], tmp_path: Path) -> None:
    copy = Path(shutil.copytree(bundle("clip-llama"), tmp_path / "copy"))
    graph = (copy / "llm.onnx").read_bytes()
    (copy / "llm.onnx").write_bytes(graph.replace(b"llm", b"lln", 1))
    result = CliRunner().invoke(plan, [str(copy)])
    assert result.exit_code == 1 and "llm.onnx differs from the sha256" in result.stderr
