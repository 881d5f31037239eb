"""The benchmark on a GPU, as far as a CPU can tell: counts, comparisons, steps that fail, the whole in rehearsal."""

from __future__ import annotations

import dataclasses
import json
import shutil
import struct
import subprocess
import sys
import textwrap
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from vlm_edge.benchmarks import gpu, gpu_carry, gpu_limits, gpu_parity, gpu_report, gpu_timings
from vlm_edge.benchmarks.gpu_parity import Along
from vlm_edge.benchmarks.gpu_timings import Timing
from vlm_edge.benchmarks.onnx_bytes import Node, model
from vlm_edge.errors import SettingError
from vlm_edge.runtime.manifest import DecoderSettings

PLAIN = DecoderSettings(
    layers=2, kv_heads=1, head_dim=4, width=8, vocab_size=10, max_positions=64, sliding_window=None,
    chunked_prefill=True,
)  # fmt: skip


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    """A float product, an INT8 one, the product of two activations, and a head."""
    nodes = [
        Node("MatMul", ["x", "float"], ["a"]),
        Node("DequantizeLinear", ["int8", "scale"], ["wide"]),
        Node("MatMul", ["a", "wide"], ["b"]),
        Node("Transpose", ["b"], ["c"]),
        Node("MatMul", ["b", "c"], ["d"]),
        Node("MatMul", ["d", "head"], ["logits"]),
    ]
    constants = {
        "float": np.zeros((8, 6), np.float32),
        "int8": np.zeros((6, 8), np.int8),
        "scale": np.zeros(8, np.float32),
        "head": np.zeros((8, 10), np.float32),
        "table": np.zeros((99, 99), np.float32),  # no product reads it
    }
    content = model(
        nodes,
        {"x": (np.float32, ["n", 8])},
        {"logits": (np.float32, ["n", 10])},
        constants,
        {"": 21},
    )
    path = tmp_path / "llm.onnx"
    path.write_bytes(content)
    return path


# -- counts ---------------------------------------------------------------------------------------


def test_products_with_constants_are_counted(graph: Path) -> None:
    found = [dataclasses.astuple(each) for each in gpu_limits.weights(graph.read_bytes())]
    assert found == [(48, None, 0), (48, 8, 8), (80, None, 0)]


def test_work_by_hand(graph: Path) -> None:
    work = gpu_limits.work(graph, PLAIN, prompt=5, context=7, float_bytes=2)
    cache = 2 * 2 * 1 * 4 * 7 * 2  # keys and values, layers, heads, head_dim, positions, bytes
    assert work.step_bytes == 48 * 2 + 48 + 8 * 2 + 80 * 2 + cache
    attention = 4 * 2 * 8 * (1 + 2 + 3 + 4 + 5)
    assert work.prefill_flops == 2 * 5 * (48 + 48) + 2 * 80 + attention


@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
def test_weights_are_those_that_onnx_ir_finds(bundle: Callable[..., Path], precision: str) -> None:
    import onnx_ir as ir

    path = bundle("clip-llama", precision) / "llm.onnx"
    values = (each.const_value for each in ir.load(path).graph.initializers.values())
    matrices = [each for each in values if each is not None and len(each.shape) == 2]
    sizes = {ir.DataType.FLOAT: None, ir.DataType.INT8: 8, ir.DataType.INT4: 4}
    found = list(gpu_limits.weights(path.read_bytes()))
    for dtype in (ir.DataType.INT8, ir.DataType.INT4):
        expected = sum(each.size for each in matrices if each.dtype == dtype)
        assert sum(each.elements for each in found if each.bits == sizes[dtype]) == expected
    assert all((each.bits is None) == (each.scales == 0) for each in found)
    assert {each.bits for each in found} >= {"fp32": {None}, "int8": {8}, "int4": {4}}[precision]


def test_rates_of_this_machine() -> None:
    pytest.importorskip("torch")
    from vlm_edge.benchmarks import gpu_torch

    *_, found = gpu_torch.rates("cpu", tries=1)
    assert set(found) == {"copy_gb_s", "fp16_tflops", "int8_tops"}
    assert all(value > 0 for value in found.values())


def test_figures_by_hand(graph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = gpu_limits.Work(step_bytes=2_000_000, prefill_flops=3_000_000_000)
    monkeypatch.setattr(gpu_timings, "_work", lambda *_: counted)
    limits = {"copy_gb_s": 2.0, "fp16_tflops": 1.0}
    asked = Timing({"fp32": graph.parent}, None, "cuda", 5, 4, 3, limits)
    runs = [{"prefill_ms": ms, "decode_tokens_per_s": 500.0} for ms in (4.0, 6.0, 100.0)]
    found = gpu_timings.figures(asked, 5, {"fp32": runs})["fp32"]
    assert found["prefill_ms"] == 6.0  # the median
    assert found["decode_gb_s"] == pytest.approx(1.0)  # 2 MB, 500 times a second
    assert found["decode_share"] == pytest.approx(0.5)
    assert found["prefill_tflops"] == pytest.approx(0.5)  # 3 GFLOP in 6 ms
    assert found["prefill_share"] == pytest.approx(0.5)


def test_ratios_pair_runs() -> None:
    ours = [
        {"first_ms": 1.0, "decode_tokens_per_s": 30.0},
        {"first_ms": 2.0, "decode_tokens_per_s": 20.0},
    ]
    eager = [
        {"first_ms": 4.0, "decode_tokens_per_s": 10.0},
        {"first_ms": 4.0, "decode_tokens_per_s": 10.0},
    ]
    found = gpu_timings.ratios({"int8": ours, "eager": eager})
    assert found == {"int8": {"eager": {"first_ms": 3.0, "decode_tokens_per_s": 2.5}}}


# -- answers --------------------------------------------------------------------------------------


def along(*logits: list[float]) -> Along:
    array = np.array(logits, np.float32)
    return Along(array.argmax(1).tolist(), array, np.ones((1, 3, 2), np.float32))


def test_the_first_other_token_is_named() -> None:
    cpu = along([0, 4, 1], [3, 2.5, 0], [0, 0, 5])
    device = along([0, 4, 1], [2.4, 2.5, 0], [5, 0, 0])
    found = gpu_parity.compare({"case": (cpu, device)})
    assert (found.same, found.tokens) == (1, 3)
    (first,) = found.first
    assert (first.index, first.cpu, first.device) == (1, 0, 1)
    assert first.margin == pytest.approx((3 - 2.5) / 3)
    assert found.largest == pytest.approx(1.0)
    # [0, 0, 5] became [5, 0, 0]; without its mean 5/3 the CPU's is [-5, -5, 10] / 3
    assert found.logit_error == pytest.approx(np.sqrt(50) / (np.sqrt(150) / 3))


def test_equal_logits_agree() -> None:
    one = along([0, 4, 1], [3, 2.5, 0])
    found = gpu_parity.compare({"case": (one, one)})
    assert (found.same, found.first, found.logit_error, found.kl) == (2, [], 0.0, 0.0)
    assert gpu_parity.verdict(found, {}, 1e-3) == ""


def test_a_tie_is_no_fault_and_a_clear_token_is() -> None:
    cpu = along([4.000, 3.999, -4])
    near = gpu_parity.compare({"case": (cpu, along([3.999, 4.000, -4]))})
    assert near.first
    assert gpu_parity.verdict(near, {}, 1e-2) == ""
    far = gpu_parity.compare({"case": (along([4.0, 3.6, -4]), along([3.7, 3.8, -4]))})
    assert "logits differ" in gpu_parity.verdict(far, {}, 1e-2)
    assert "token 0 of case is 1 instead of 0" in gpu_parity.verdict(
        dataclasses.replace(far, logit_error=0.0), {}, 1e-2
    )


def test_nan_is_never_within() -> None:
    found = gpu_parity.compare({"case": (along([0, 4.0]), along([0, float("nan")]))})
    assert gpu_parity.verdict(found, {}, 1.0)
    assert gpu_parity.verdict(found, {"cpu": 0.1, "device": float("nan")}, 1.0)


def test_a_quantized_bundle_is_judged_by_full_precision() -> None:
    found = gpu_parity.compare({"case": (along([0, 4.0]), along([1, 4.0]))})
    assert gpu_parity.verdict(found, {"cpu": 0.20, "device": 0.21}, 1e-2) == ""
    assert "full precision" in gpu_parity.verdict(found, {"cpu": 0.20, "device": 0.30}, 1e-2)


def test_greedy_tokens_are_those_of_generate(bundle: Callable[..., Path]) -> None:
    from vlm_edge import VLM

    with VLM.load(bundle("clip-llama"), threads=1) as vlm:
        prompt, image = next(iter(gpu_parity.cases().values()))
        built = gpu_parity.build(vlm, prompt, image)
        found = gpu_parity.along(vlm, built, None, 6)
        template = vlm.template is not None
        text = prompt if template else f"{vlm.manifest.prompt.image_token}\n{prompt}"
        expected = vlm.generate(text, [image], template, max_new_tokens=6, ignore_eos=True)
        assert found.tokens == expected.token_ids
        again = gpu_parity.along(vlm, built, found.tokens, 6)
        np.testing.assert_array_equal(again.logits, found.logits)


def test_a_device_that_errs_is_found(
    bundle: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from vlm_edge import VLM

    load = VLM.load

    def erring(path: Path, device: str = "cpu") -> VLM:
        vlm = load(path, threads=1)
        if device == "wrong":
            decode = vlm.decoder.decode
            vlm.decoder.decode = lambda row: decode(row) + 3 * np.eye(len(decode(row)))[1]
        return vlm

    monkeypatch.setattr(gpu_parity.VLM, "load", erring)
    monkeypatch.setattr(gpu_parity, "PROMPTS", ("What is it?",))
    for device, within in (("cpu", True), ("wrong", False)):
        (found,) = gpu_parity.parity({"fp32": bundle("clip-llama")}, device, 4)
        assert found["fp32"]["within"] == within
        assert bool(found["fp32"]["why"]) != within


def test_transformers_answers_as_we_do(
    bundle: Callable[..., Path], checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    from vlm_edge.benchmarks.gpu_peers import Ours
    from vlm_edge.benchmarks.gpu_torch import Transformers, float16_error
    from vlm_edge.benchmarks.latency import Settings

    saved = str(tmp_path / "request.npz")
    request = Settings(prompt_tokens=60, new_tokens=6, threads=1).request()
    ours = Ours(str(bundle("clip-llama")), request, saved)
    source = str(checkpoint("clip-llama"))
    peer = Transformers(source, saved, 6, "cpu", compiled=False, dtype="float32")
    tokens = ours.tokens(6)
    assert peer.tokens(6) == tokens
    assert peer.logits(tokens).argmax(1).tolist() == tokens
    assert set(peer.run()) < set(ours.run())
    assert 0 < float16_error(source, saved, tokens, "cpu") < 0.05


# -- steps ----------------------------------------------------------------------------------------


def settings(work: Path, **changes: Any) -> gpu.Settings:
    asked = gpu.Settings("cpu", work, ("llava",), ("parity",), 5.0, None, 40, 4, 1)
    return dataclasses.replace(asked, **changes)


@pytest.fixture
def steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> gpu.Run:
    """A run whose processes know three more steps."""
    (tmp_path / "more_steps.py").write_text(
        textwrap.dedent("""
            import os, time
            from vlm_edge.benchmarks import gpu_steps
            def slow(order):
                yield {"figure": 1}
                time.sleep(600)
            def dying(order):
                yield {"figure": 2}
                os._exit(7)
            def silent(order):
                os._exit(9)
                yield {}
            gpu_steps.STEPS |= {"slow": slow, "dying": dying, "silent": silent}
            if __name__ == "__main__":
                gpu_steps.main()
        """)
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(gpu, "PROCESS", "more_steps")
    return gpu.Run(settings(tmp_path / "work"), tmp_path / "gpu.json")


@pytest.mark.parametrize(
    ("kind", "seconds", "found", "why"),
    [
        ("slow", 10.0, {"figure": 1}, "stopped after 10 s; what it had found is kept"),
        ("dying", 60.0, {"figure": 2}, "its process ended with code 7; what it had found is kept"),
        ("silent", 60.0, {}, "its process ended with code 9"),
        ("no-step", 60.0, {}, "unexpected KeyError: 'no-step'"),
    ],
)
def test_a_step_that_ends_badly_keeps_what_it_found(
    steps: gpu.Run, kind: str, seconds: float, found: dict[str, int], why: str
) -> None:
    outcome = steps.step(gpu.Step(kind, seconds))
    assert (outcome.status, outcome.why, outcome.found) == ("failed", why, found)
    after = steps.step(gpu.Step("environment", 60))
    assert after.status == "ok"
    written = json.loads(steps.output.read_text())
    assert [each["status"] for each in written["steps"]] == ["failed", "ok"]


def test_no_step_begins_when_the_time_is_spent(tmp_path: Path) -> None:
    run = gpu.Run(settings(tmp_path, minutes=0.0), tmp_path / "gpu.json")
    run.all()
    (outcome,) = run.outcomes
    assert outcome.status == "not tried"
    assert "of the 0 minutes is spent" in str(outcome.why)


def test_without_a_gpu_its_steps_are_not_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vlm_edge.benchmarks import gpu_steps

    if gpu_steps.gpu() is not None:
        pytest.skip("this machine has one")
    run = gpu.Run(
        settings(tmp_path, device="cuda", groups=("environment", "limits", "parity")),
        tmp_path / "r.json",
    )
    run.all()
    assert [(each.kind, each.status) for each in run.outcomes] == [
        ("environment", "ok"), ("limits", "not tried"), ("parity", "not tried"),
    ]  # fmt: skip
    assert "no GPU" in str(run.outcomes[1].why)


def test_the_whole_in_rehearsal(bundle: Callable[..., Path], tmp_path: Path) -> None:
    work = tmp_path / "work"
    for precision in ("fp32", "int8"):
        shutil.copytree(bundle("clip-llama", precision), work / "bundles" / f"llava-{precision}")
    report = tmp_path / "gpu.json"
    arguments = [
        *("run", "--work", str(work), "--device", "cpu", "--models", "llava,blip2", "--runs", "2"),
        *("--only", "environment,parity,timings", "--prompt-tokens", "60", "--new-tokens", "4"),
        *("--output", str(report)),
    ]
    done = CliRunner().invoke(gpu.main, arguments, catch_exceptions=False)
    assert done.exit_code == 0
    found = json.loads(report.read_text())
    assert set(found) == {"schema", "date", "device", "minutes", "seconds", "settings", "steps"}
    by_name = {each["name"]: each for each in found["steps"]}
    status = {name: (each["status"], each["why"]) for name, each in by_name.items()}
    none = ("not tried", "there is no bundle of this model")
    assert status == {
        "environment": ("ok", None),
        "parity llava cpu": ("ok", None),
        "parity blip2 cpu": none,
        "timings llava cpu": ("ok", None),
        "timings blip2 cpu": none,
    }
    answers = by_name["parity llava cpu"]["found"]["bundles"]
    assert all(
        each["same"] == each["tokens"] == 4 * len(gpu_parity.cases()) for each in answers.values()
    )
    times = by_name["timings llava cpu"]["found"]
    assert (times["prompt_tokens"], times["runs"], times["failed"]) == (60, 2, {})
    assert times["same_tokens"]["fp32"] == gpu_timings.COMPARED
    for figures in times["subjects"].values():
        assert figures["decode_gb_s"] > 0 and figures["prefill_tflops"] > 0
    assert "rehearsal on the CPU" in done.output
    assert str(tmp_path) not in report.read_text()  # no path of the machine


def test_no_arguments_run_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[gpu.Settings] = []
    monkeypatch.setattr(gpu.Run, "all", lambda run: seen.append(run.settings))
    monkeypatch.chdir(tmp_path)
    assert CliRunner().invoke(gpu.main, [], catch_exceptions=False).exit_code == 0
    (found,) = seen
    assert (found.device, found.groups) == ("cuda", gpu.GROUPS)
    assert found.models == ("llava", "qwen2-0.5b", "blip2", "flamingo")


def test_a_report_of_failures_prints() -> None:
    outcome = {
        "name": "timings llava cuda", "kind": "timings", "model": "llava", "device": "cuda",
        "status": "failed", "why": "stopped after 3 s", "seconds": 3.0, "found": {},
    }  # fmt: skip
    tables = gpu_report.tables({"device": "cuda", "steps": [outcome]})
    assert len(tables) == 1


@pytest.mark.parametrize(
    ("option", "value"), [("--models", "llama"), ("--only", "party"), ("--device", "tpu")]
)
def test_unknown_names_are_refused(option: str, value: str) -> None:
    done = CliRunner().invoke(gpu.main, ["run", option, value])
    assert done.exit_code == 2
    assert value in done.output


# -- what travels ---------------------------------------------------------------------------------


def fat_binary(**codes: bytes) -> bytes:
    """As the CUDA toolkit writes one: `sm90=b"..."`."""
    entries = b""
    for name, code in codes.items():
        about = struct.pack("<HHIQIIHHI", 2, 257, 64, len(code), len(code), 0, 8, 1, int(name[2:]))
        entries += about.ljust(64, b"\1") + code
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(entries)) + entries


def test_code_of_other_gpus_is_blanked() -> None:
    stray = struct.pack("<IHHQ", 0xBA55ED50, 3, 0, 1 << 40)  # the number in code, no header
    parts = (
        b"text" * 9,
        stray,
        fat_binary(sm80=b"\7" * 24, sm90=b"\5" * 16),
        b"data",
        fat_binary(sm80=b"\6" * 8),
    )
    library = bytearray(b"".join(parts))
    assert gpu_carry.blank(library, 90) == 16
    expected = b"".join(parts).replace(b"\7" * 24, bytes(24)).replace(b"\6" * 8, bytes(8))
    assert bytes(library) == expected


def test_code_that_is_missing_is_an_error() -> None:
    with pytest.raises(SettingError, match="no code for compute capability 87"):
        gpu_carry.blank(bytearray(fat_binary(sm80=b"\7" * 24)), 87)


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    """A package whose wheel has a CUDA library."""
    path = tmp_path / "onnxruntime_gpu-1.0-py3-none-any.whl"
    about = "onnxruntime_gpu-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("onnxruntime/__init__.py", "name = 'carried'\n")
        file.writestr(gpu_carry.CUDA_LIBRARY, fat_binary(sm80=b"\7" * 999, sm90=b"\5" * 16))
        file.writestr("onnxruntime/tools/x.py", "")
        file.writestr(
            f"{about}/METADATA", "Metadata-Version: 2.1\nName: onnxruntime-gpu\nVersion: 1.0\n"
        )
        file.writestr(
            f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        file.writestr(f"{about}/RECORD", "")
    return path


def test_a_repacked_wheel_installs(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the step that installs carried wheels, with CUDA's libraries where ONNX Runtime looks for them."""
    library = tmp_path / "packages" / "nvidia" / "cu13" / "lib" / "libcublas.so.13"
    library.parent.mkdir(parents=True)
    library.touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "packages"))
    carried = tmp_path / "wheels"
    carried.mkdir()
    gpu_carry.repack(wheel, carried / wheel.name, 90)
    run = gpu.Run(settings(tmp_path / "work", wheels=carried, groups=()), tmp_path / "gpu.json")
    run.all()
    assert [(each.kind, each.status) for each in run.outcomes] == [("wheels", "ok")]
    site = tmp_path / "work" / "site"
    code = (site / gpu_carry.CUDA_LIBRARY).read_bytes()
    assert b"\5" * 16 in code and b"\7" not in code
    assert (site / library.relative_to(tmp_path / "packages")).samefile(library)
    assert not (site / "onnxruntime" / "tools").exists()


def test_pieces_come_together_again(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    top = tmp_path / "repository"
    for name in ("src/vlm_edge", *"benchmarks calibration export runtime training".split()):
        (top / name).mkdir(parents=True)
    (top / ".gitignore").write_text("/out/\n")
    subprocess.run(["git", "init", "-q", str(top)], check=True)
    (top / "kept").write_bytes(bytes(1000))
    monkeypatch.setattr(
        gpu_carry, "_download", lambda name, folder, python: Path(shutil.copy(wheel, folder))
    )
    room = 1 << 20
    monkeypatch.setattr(
        gpu_carry, "repack", lambda old, new, target: new.write_bytes(b"wheel" * (room // 3))
    )
    folder = top / "out" / "carry"
    pieces = gpu_carry.pack(folder, ["cuda"], "9.0", "3.12", room + 1000 + len("/out/\n"))
    assert [piece.size for piece in pieces] == [room, 5 * (room // 3) - room]
    text = gpu_carry.instructions(pieces)
    assert 'carry=["out/carry/1"]' in text and 'carry=["out/carry/2"]' in text
    assert "--wheels /tmp/wheels" in text
    commands = [
        line.split('run(command="')[1].split('", carry=')[0]
        for line in text.splitlines()
        if "run(" in line
    ]
    assert all(len(command) <= 2000 for command in commands)
    # The machine there, in a folder of this one: what brings the pieces, then what unpacks them.
    elsewhere = tmp_path / "there"
    elsewhere.mkdir()
    for command in (*commands[:2], commands[2].split(" && python3 ")[0]):
        subprocess.run(
            ["bash", "-c", command.replace("/tmp/", f"{elsewhere}/")], cwd=top, check=True
        )
    assert (elsewhere / "wheels" / wheel.name).read_bytes() == b"wheel" * (room // 3)
    assert (elsewhere / "link" / "vlm_edge" / "runtime").is_dir()


@pytest.mark.parametrize(
    ("folder", "parts", "budget", "why"),
    [
        ("out/x", ["cudo"], 10**9, "--parts cudo; known are cuda, demo, rtx"),
        ("docs", ["cuda"], 10**9, "not ignored by git"),
        ("out/x", ["cuda"], 1000, "leaves"),
    ],
)
def test_what_cannot_be_carried_is_refused(
    folder: str, parts: list[str], budget: int, why: str, tmp_path: Path
) -> None:
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    (tmp_path / ".gitignore").write_text("/out/\n")
    with pytest.raises(SettingError, match=why):
        gpu_carry.pack(tmp_path / folder, parts, "9.0", "3.12", budget)


def test_the_script_imports_no_engine() -> None:
    code = (
        "import sys; sys.modules |= dict.fromkeys(('torch', 'onnxruntime', 'onnx_ir', 'transformers'));"
        "import vlm_edge.benchmarks.gpu"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
