"""The comparison with other engines, without them: weights' forms, worker protocol, rounds, reports."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from vlm_edge.benchmarks.latency import WorkerFailed
from vlm_edge.benchmarks.peers import environments, measure, models, report, tensorfile
from vlm_edge.benchmarks.peers.__main__ import cli
from vlm_edge.benchmarks.peers.engines import llama_cpp
from vlm_edge.benchmarks.peers.environments import NAMES, OURS, Process
from vlm_edge.benchmarks.peers.limits import Limits, best
from vlm_edge.benchmarks.peers.measure import NOT_INSTALLED, Row, Settings
from vlm_edge.benchmarks.peers.models import MODELS, Model
from vlm_edge.benchmarks.peers.report import Compared
from vlm_edge.benchmarks.peers.tensorfile import TensorFile

LLM = Model("tiny-llm", "Tiny LLM", "language", "LlamaForCausalLM", {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 640, "tie_word_embeddings": True, "rope_theta": 10000.0,
    "hidden_act": "silu",
})  # fmt: skip
QWEN = replace(
    LLM,
    name="tiny-qwen",
    architecture="Qwen2ForCausalLM",
    config={**LLM.config, "model_type": "qwen2"},
)
CLIP = Model("tiny-clip", "Tiny CLIP", "vision", "CLIPVisionModel", {
    "model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 28, "patch_size": 14,
})  # fmt: skip
SIGLIP = replace(CLIP, name="tiny-siglip", architecture="SiglipVisionModel", config={
    **CLIP.config, "model_type": "siglip_vision_model", "vision_use_head": False,
})  # fmt: skip
QUICK = Settings(rounds=2, threads=1, context=6, steps=3)

FAKE = '''
"""A fake engine."""
import sys, time
from vlm_edge.benchmarks.peers.protocol import Generated
TITLE = "{title}"
PACKAGES = ("numpy",)
VARIANTS = {{"language": {{"fp32": "fp32", "int8": "int8"}}, "vision": {{}}}}
def prepare(kind, source, llava, variant, target):
    print("a library's own words")
    if variant == "{refuses}":
        raise ValueError("no such\\nformat")
    (target / "weights").write_text(variant)
class Fake:
    runs = 0
    def __init__(self, target): assert (target / "weights").is_file()
    def generate(self, prompt, steps):
        Fake.runs += 1
        if Fake.runs == {dies}: sys.exit(7)
        return Generated({seconds}, 2 * {seconds}, [sum(prompt) + n for n in range(steps + 1)])
def load_language(target, variant, threads): return Fake(target)
'''


def fake(folder: Path, name: str, **values: Any) -> None:
    text = FAKE.format(**{"title": name, "refuses": "", "dies": 0, "seconds": 1.0, **values})
    (folder / "fake_engines" / f"{name}.py").write_text(text, encoding="utf-8")


@pytest.fixture
def engines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for fake engines, which take the place of the real ones."""
    package = tmp_path / "fake_engines"
    package.mkdir()
    (package / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(environments, "ENGINES", "fake_engines")
    for name in [n for n in sys.modules if n.startswith("fake_engines")]:
        monkeypatch.delitem(sys.modules, name)
    # Every fake runs in this very environment, with vlm_edge as it is installed here.
    worker = environments.worker
    monkeypatch.setattr(
        environments, "worker", lambda program, name: [
            *worker(program, OURS)[:-1], f"fake_engines.{name}"
        ],
    )  # fmt: skip
    monkeypatch.setattr(
        environments,
        "python",
        lambda folder, name: None if name == "absent" else Path(sys.executable),
    )
    return tmp_path


def quiet(step: str, done: int, total: int) -> None:
    pass


def compare(folder: Path, *peers: str, settings: Settings = QUICK) -> Compared:
    rows = measure.rows(LLM, peers)
    measure.prepare(folder, LLM, rows, quiet)
    measure.measure(folder, LLM, rows, settings, quiet)
    return Compared(LLM, rows, LIMITS, settings)


LIMITS = Limits(1e9, {"fp32": 1e9, "bf16": 2e9, "int8": 4e9})

# -- the weights' two forms -------------------------------------------------------------------


@pytest.mark.parametrize("model", [QWEN, CLIP, SIGLIP], ids=lambda m: m.name)
def test_both_forms_hold_the_same_weights(model: Model, tmp_path: Path) -> None:
    """Ours, exported, and transformers on the form for peers give the same answer."""
    import torch
    import transformers

    from vlm_edge import VLM
    from vlm_edge.export.pipeline import export

    source, llava = models.materialize(model, tmp_path)
    export(str(llava), tmp_path / "bundle")
    loaded = getattr(transformers, model.architecture).from_pretrained(source, dtype=torch.float32)
    with VLM.load(tmp_path / "bundle", threads=1) as vlm, torch.no_grad():
        if model.kind == "language":
            ids = models.prompt(model, 9, 0)
            found = vlm.decoder.prefill(vlm.embeddings.rows(np.array(ids))[None])
            expected = loaded(torch.tensor([ids])).logits[0, -1].numpy()
        else:
            size = model.config["image_size"]
            pixels = np.random.default_rng(0).standard_normal((1, 3, size, size), np.float32)
            found = vlm.vision.run({"pixel_values": pixels})["features"]
            states = loaded(torch.from_numpy(pixels), output_hidden_states=True).hidden_states[-1]
            expected = states[:, -found.shape[1] :].numpy()  # ours leaves the class token out
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


def test_forms_are_written_once(tmp_path: Path) -> None:
    source, _ = models.materialize(CLIP, tmp_path)
    before = (source / "model.safetensors").stat().st_mtime_ns
    assert models.materialize(CLIP, tmp_path)[0] == source
    assert (source / "model.safetensors").stat().st_mtime_ns == before


def test_tensor_files_are_read_as_safetensors_reads_them(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    tensors = {
        "a": torch.randn(3, 5),
        "b": torch.randn(7).to(torch.bfloat16),
        "c": torch.randn(2, 2).half(),
    }
    save_file(tensors, tmp_path / "one")
    file = TensorFile(tmp_path / "one")
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(file.array(name), tensor.float().numpy())
    tensorfile.write(tmp_path / "two", {f"new.{name}": (file, name) for name in tensors})
    found = load_file(tmp_path / "two")
    assert {name: t.dtype for name, t in found.items()} == {
        f"new.{name}": t.dtype for name, t in tensors.items()
    }
    assert all(torch.equal(found[f"new.{name}"], tensor) for name, tensor in tensors.items())


def test_prompts_differ_by_round_and_are_the_same_for_all() -> None:
    prompts = [models.prompt(MODELS["smollm2"], 600, seed) for seed in range(-1, 5)]
    assert len({tuple(p[:4]) for p in prompts}) == len(prompts)  # no shared prefix
    assert prompts[2] == models.prompt(MODELS["smollm2"], 600, 1)


def test_interleave_puts_rotary_pairs_side_by_side() -> None:
    weight = np.arange(16, dtype=np.float32).reshape(16, 1)  # two heads of eight
    found = llama_cpp.interleave(weight, 2)[:, 0]
    assert found.tolist() == [0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15]


# -- floors -----------------------------------------------------------------------------------


def test_floors_by_hand() -> None:
    linear = 2 * (32 * 8 * (2 * 4 + 2 * 2) + 3 * 32 * 48)  # two layers
    cache = 2 * 2 * 2 * 8 * 10  # keys and values, layers, heads, their width, positions
    weights = linear + 512 * 32
    assert LIMITS.decode(LLM.config, "int8", 10) == pytest.approx(1e9 / (weights + 2 * cache))
    assert LIMITS.decode(LLM.config, "fp32", 10) == pytest.approx(1e9 / (4 * weights + 4 * cache))
    scores = 4 * 2 * 32 * 10 * 11 / 2  # layers, width, pairs of a query and a key it may see
    head = 2 * 512 * 32
    assert LIMITS.prefill(LLM.config, "fp32", 10) == pytest.approx(
        (20 * linear + head + scores) / 1e9
    )
    assert LIMITS.prefill(LLM.config, "int4", 10) == pytest.approx(
        (20 * linear + head) / 4e9 + scores / 2e9
    )
    image = 2 * 4 * (2 * (4 * 32**2 + 2 * 32 * 48) + 3 * 14**2 * 32)  # four patches
    assert LIMITS.vision(CLIP.config, "bf16") == pytest.approx((image + 4 * 2 * 32 * 16) / 2e9)


def test_the_best_of_several_limits_counts() -> None:
    slow_read = Limits(5.0, {"fp32": 3.0, "int8": 9.0})
    assert best([slow_read, Limits(7.0, {"fp32": 2.0, "int8": 10.0})]) == Limits(
        7.0, {"fp32": 3.0, "int8": 10.0}
    )
    assert best([]) is None


# -- rounds -----------------------------------------------------------------------------------


def test_rounds_fill_the_rows_and_ratios_are_paired(engines: Path) -> None:
    fake(engines, OURS, title="vlm-edge", seconds=0.5)
    fake(engines, "slow", seconds=2.0)
    compared = compare(engines, OURS, "slow")
    slow = compared.rows[2]
    assert (slow.title, slow.variant, slow.problem) == ("slow", "fp32", None)
    assert len(slow.samples) == QUICK.rounds
    assert slow.memory["VmHWM"] > slow.memory["RssAnon"] > 0
    figures = compared.figures(slow)
    assert figures["prefill_tokens_per_s"].median == 6 / 2
    assert figures["decode_tokens_per_s"].median == 3 / 4
    assert figures["decode_tokens_per_s"].ours == 4.0
    assert compared.agreement(slow) == 1.0
    floor = LIMITS.decode(LLM.config, "fp32", QUICK.context)
    assert figures["decode_tokens_per_s"].share == pytest.approx(0.75 / floor)


def test_what_fails_or_is_absent_leaves_the_rest(engines: Path) -> None:
    fake(engines, OURS, title="vlm-edge")
    fake(engines, "absent")
    fake(engines, "refusing", refuses="int8")
    fake(engines, "dying", dies=5)  # in the second round: question, warm-up and two runs a round
    compared = compare(engines, OURS, "absent", "refusing", "dying")
    problems = {(row.title, row.variant): row.problem for row in compared.rows}
    assert problems == {
        ("vlm-edge", "fp32"): None,
        ("vlm-edge", "int8"): None,
        ("absent", "fp32"): NOT_INSTALLED,
        ("absent", "int8"): NOT_INSTALLED,
        ("refusing", "fp32"): None,
        ("refusing", "int8"): "refusing int8: ValueError: no such format",
        ("dying", "fp32"): "dying fp32 ended with code 7",
        ("dying", "int8"): "dying int8 ended with code 7",
    }
    assert not any(path.name.startswith(".") for path in (engines / "models/tiny-llm").iterdir())
    text = report.markdown(compared)
    assert "| absent | fp32 | not installed |" in text
    assert "| **vlm-edge** | **fp32** | 6 ±0% |" in text
    widths = {line.count("|") for line in text.splitlines() if line.startswith("|")}
    assert len(widths) == 1
    assert report.table(compared).row_count == len(compared.rows)


def test_a_prepared_variant_is_used_again(engines: Path) -> None:
    fake(engines, OURS)
    compare(engines, OURS)
    fake(engines, OURS, refuses="int8")  # would fail were it prepared again
    assert all(row.problem is None for row in compare(engines, OURS).rows)


def test_document(engines: Path) -> None:
    fake(engines, OURS, title="vlm-edge")
    fake(engines, "absent")
    document = json.loads(json.dumps(report.document([compare(engines, OURS, "absent")])))
    assert set(document) == {"schema", "date", "machine", "limits", "settings", "models"}
    assert document["settings"] == {"rounds": 2, "threads": 1, "context": 6, "steps": 3}
    assert document["limits"]["compute"]["int8"] == 4e9
    ours, *_, absent = document["models"][0]["rows"]
    assert set(ours) == {
        "peer", "variant", "bits", "problem", "versions", "load_s", "peak_rss_mb",
        "peak_rss_anon_mb", "agreement", "figures", "samples",
    }  # fmt: skip
    assert ours["versions"] == {"numpy": np.__version__}
    assert set(ours["figures"]) == {"prefill_tokens_per_s", "decode_tokens_per_s"}
    assert set(ours["figures"]["decode_tokens_per_s"]) == {
        "median", "low", "high", "share", "ours"
    }  # fmt: skip
    assert absent["problem"] == NOT_INSTALLED and absent["figures"] == {}


def test_class_token_that_ours_leaves_out_is_not_compared() -> None:
    states = np.random.default_rng(0).standard_normal((1, 5, 3), np.float32)
    ours, other = Row(OURS, "", "fp32", "fp32"), Row("transformers", "", "fp32", "fp32")
    ours.samples = other.samples = [{"encode_s": 1.0}]
    ours.states, other.states = states[:, 1:], states
    assert Compared(CLIP, [ours, other], None, QUICK).agreement(ours) == pytest.approx(1)


def test_bf16_is_compared_with_our_full_precision() -> None:
    full, quantized = Row(OURS, "", "fp32", "fp32"), Row(OURS, "", "int8", "int8")
    full.samples = quantized.samples = [{"encode_s": 1.0}]
    other = Row("transformers", "", "bf16", "bf16")
    assert measure.ours_alike(other, [full, quantized, other]) is full
    assert measure.ours_alike(replace(other, bits="int4"), [full, quantized, other]) is None


# -- environments -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_every_peer_is_complete(name: str) -> None:
    engine = measure.engine(name)
    assert engine.TITLE and engine.PACKAGES
    assert set(engine.VARIANTS) == {"language", "vision"}
    assert callable(engine.prepare) and callable(engine.load_language)
    if name != OURS:
        lines = [
            line for path in environments.requirements(name)
            for line in path.read_text().splitlines() if line and line[0] not in "#-"
        ]  # fmt: skip
        assert lines and all("==" in line for line in lines), "every version is pinned"
        assert {line.partition("==")[0] for line in lines} >= set(engine.PACKAGES)


@pytest.mark.parametrize("name", [n for n in NAMES if n != OURS])
def test_a_worker_needs_no_installed_vlm_edge(name: str, tmp_path: Path) -> None:
    """As in a peer's environment: isolated, and vlm_edge known by its folders only."""
    command = environments.worker(Path(sys.executable), name)
    refuse = (
        "import sys; sys.modules.update(ml_dtypes=None, click=None, rich=None, tokenizers=None)\n"
    )
    command[3] = refuse + command[3]  # what only our environment has
    process = Process(command, name, tmp_path / "log")
    try:
        with pytest.raises(WorkerFailed, match=rf"^{name}: \w+Error: "):
            process.ask(load={"kind": "neither", "target": "", "variant": "", "threads": "many"})
    finally:
        process.close()


def test_environment_is_ready_only_with_its_requirements(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert environments.python(tmp_path, "llama_cpp") is None
    place = tmp_path / "environments" / "llama_cpp"
    place.mkdir(parents=True)
    (place / "ready").write_text(environments.fingerprint("llama_cpp"))
    assert environments.python(tmp_path, "llama_cpp") == place / "venv/bin/python"
    monkeypatch.setattr(environments, "REQUIREMENTS", tmp_path)  # other pins
    (tmp_path / "llama_cpp.txt").write_text("llama-cpp-python==9\n")
    assert environments.python(tmp_path, "llama_cpp") is None


def test_setup_says_what_went_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the interpreter fails as pip does, in an error and a last line of advice."""
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\necho Collecting\necho ERROR: No space left\necho Bye\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    result = invoke("setup", tmp_path / "peers", "llama_cpp")
    assert result.exit_code == 1
    assert "setting up llama_cpp failed: ERROR: No space left (see " in result.stderr
    assert "Error: could not set up llama_cpp" in result.stderr
    assert environments.python(tmp_path / "peers", "llama_cpp") is None


# -- command line -----------------------------------------------------------------------------


def invoke(*args: str | Path) -> Result:
    return CliRunner().invoke(cli, [str(a) for a in args])


def test_unknown_peers_are_refused(tmp_path: Path) -> None:
    result = invoke("run", tmp_path, "--peers", "ours,tensorflow")
    assert result.exit_code == 2
    assert "'tensorflow' is no peer; known are ours, llama_cpp" in result.stderr


def test_run_prints_and_writes(
    engines: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in NAMES:
        fake(engines, name)
    monkeypatch.setitem(MODELS, "smollm2", LLM)
    monkeypatch.setattr(measure, "machine_limits", lambda folder, threads: None)
    result = invoke(
        "run", tmp_path, "--model", "smollm2", "--peers", "ours,openvino", "--rounds", "1",
        "--context", "6", "--steps", "3", "--json", tmp_path / "out.json", "--markdown",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("### Tiny LLM\n")
    written = json.loads((tmp_path / "out.json").read_text())
    assert [row["peer"] for row in written["models"][0]["rows"]] == ["ours"] * 2 + ["openvino"] * 2
    assert written["limits"] is None
    share = written["models"][0]["rows"][0]["figures"]["decode_tokens_per_s"]["share"]
    assert share is None
