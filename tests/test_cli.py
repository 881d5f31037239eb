"""The command line: what reaches the library, what is printed where, and every exit code."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result
from tiny import CASES, build

import vlm_edge
from vlm_edge import errors
from vlm_edge.cli.guard import Command
from vlm_edge.cli.main import cli
from vlm_edge.runtime.timings import Timings

CASE = "clip-llama"
TIMINGS = Timings(
    preprocess_ms=1.0,
    vision_ms=20.0,
    connector_ms=3.0,
    prefill_ms=50.0,
    decode_ms=40.0,
    ttft_ms=75.0,
    prompt_tokens=100,
    prefilled_tokens=100,
    new_tokens=5,
    images=1,
)


@dataclass
class Answer:
    """A Stream that says two pieces."""

    pieces: Sequence[str] = ("a red ", "circle")

    def __iter__(self) -> Iterator[str]:
        return iter(self.pieces)

    @property
    def result(self) -> Any:
        class Said:
            text = "a red circle"
            token_ids = (5, 6, 7)
            prompt_tokens = 100
            visual_tokens = 64
            finish_reason = "stop"
            timings = TIMINGS

        return Said()


@dataclass
class Stub:
    """Stands for a loaded bundle where a test is about the command line alone."""

    calls: list[tuple[Any, ...]] = field(default_factory=list)
    answers: list[Any] = field(default_factory=list)
    load_s: float = 0.5
    closed: bool = False

    def load(self, bundle: str, **settings: Any) -> Stub:
        self.calls.append(("load", bundle, settings))
        return self

    def stream(self, prompt: str, **settings: Any) -> Any:
        self.calls.append(("stream", prompt, settings))
        answer = self.answers.pop(0) if self.answers else Answer()
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def chat(self, system: str | None = None) -> Stub:
        self.calls.append(("chat", system))
        return self

    def close(self) -> None:
        self.closed = True

    def asked(self) -> list[tuple[str, tuple[str, ...]]]:
        return [(c[1], tuple(c[2]["images"])) for c in self.calls if c[0] == "stream"]


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Stub:
    stub = Stub()
    monkeypatch.setitem(vars(vlm_edge), "VLM", stub)
    return stub


def vlm(*args: str, stdin: str = "") -> Result:
    return CliRunner().invoke(cli, list(args), input=stdin)


def process(*args: str, **settings: Any) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, as a shell starts it."""
    command = [sys.executable, "-c", "from vlm_edge.cli.main import main; main()", *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **settings)


# -- help -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(cli.commands))
def test_help_of_every_command(name: str) -> None:
    result = vlm(name, "--help")
    assert result.exit_code == 0
    for option in cli.commands[name].params:
        if isinstance(option, click.Option):
            assert option.help, f"{name} {option.opts[0]} has no help"
    assert "--debug" in result.output


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from vlm_edge.cli.main import cli\n"
        "try: cli(['--help'])\n"
        "except SystemExit: pass\n"
        "print(sorted({'numpy', 'PIL', 'rich', 'onnxruntime', 'onnx_ir', 'torch'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert "export" in done.stdout


def test_version() -> None:
    assert vlm_edge.__version__ in vlm("--version").output


# -- usage errors: exit 2, and the allowed values are named -----------------------------------


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["nonsense"], "No such command 'nonsense'"),
        (["run"], "Missing argument 'BUNDLE'"),
        (["run", "b", "--device", "gpu"], "'cpu', 'cuda', 'tensorrt'"),
        (["run", "b", "--temperature", "-1"], "x>=0"),
        (["run", "b", "--top-p", "0"], "0.0<x<=1.0"),
        (["run", "b", "--threads", "0"], "x>=1"),
        (["run", "b", "--json"], "--json needs a prompt"),
        (["run", "b", "--no-template"], "--no-template needs a prompt"),
        (["run", "b", "-p", "x", "--no-template", "--system", "y"], "excludes --no-template"),
        (["export", "--int8", "--int4"], "exclude each other"),
        (["export", "--int8", "--precision", "llm=int4"], "exclude each other"),
        (["export", "--method", "entropy"], "'auto', 'percentile', 'minmax'"),
        (["export", "--precision", "llm=int3"], "int4"),
        (["export", "--precision", "int8"], "PART=PRECISION"),
        (["bench", "b", "--new-tokens", "1"], "x>=2"),
        (["bench", "b", "--image", "a.png", "--no-image"], "exclude each other"),
        (["bench", "b", "--json", "no/where.json"], "there is no folder no"),
        (["info", "b", "--image-size", "640"], "672x1008"),
    ],
)
def test_usage_errors(args: list[str], said: str) -> None:
    result = vlm(*args)
    assert result.exit_code == 2, result.output
    assert said in result.stderr
    assert "Traceback" not in result.stderr


# -- errors: one sentence on stderr and exit 1 -----------------------------------------------


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (errors.BundleMissing("x"), "x is not a bundle"),
        (errors.EmptyPrompt(), "the prompt is empty"),
        (errors.ExtraMissing("cpu", "onnxruntime", "the CPU engine"), "vlm-edge[cpu]"),
        (ModuleNotFoundError("no", name="torch.nn"), "vlm-edge[verify]"),
        (
            OSError(errno.ENOSPC, "No space left on device", "out/x"),
            "no space left on the disk: out/x",
        ),
        (FileNotFoundError(errno.ENOENT, "No such file", "a.png"), "no such file: a.png"),
        (MemoryError(), "out of memory"),
        (ZeroDivisionError("division\nby zero"), "unexpected ZeroDivisionError: division by zero"),
    ],
)
def test_an_error_is_one_line(stub: Stub, error: Exception, said: str) -> None:
    stub.answers = [error]
    result = vlm("run", "b", "-p", "what?")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert said in result.stderr
    assert result.stderr.count("\n") == 1
    assert stub.closed


def test_an_unexpected_error_names_debug(stub: Stub) -> None:
    stub.answers = [ZeroDivisionError("x")]
    assert "--debug" in vlm("run", "b", "-p", "what?").stderr


@pytest.mark.parametrize("args", [["--debug", "run", "b"], ["run", "b", "--debug"]])
def test_debug_shows_the_traceback(stub: Stub, args: list[str]) -> None:
    stub.answers = [errors.EmptyPrompt()]
    result = vlm(*args, "-p", "what?")
    assert result.exit_code == 1
    assert "Traceback" in result.stderr
    assert result.stderr.endswith("error: the prompt is empty; give a text, an image or both\n")


def test_interrupt_exits_with_130(stub: Stub) -> None:
    stub.answers = [KeyboardInterrupt()]
    result = vlm("run", "b", "-p", "what?")
    assert result.exit_code == 130
    assert "Traceback" not in result.output
    assert stub.closed


def test_a_missing_bundle_in_a_real_process(tmp_path: Path) -> None:
    done = process("run", str(tmp_path / "none"), "-p", "what?")
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


def test_a_closed_pipe_is_quiet() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    code = (
        "import click; from vlm_edge.cli.guard import Command\n"
        "@click.command(cls=Command)\n"
        "def talk():\n"
        "    for _ in range(100000): click.echo('x' * 100)\n"
        "talk()"
    )
    with os.fdopen(writing, "w") as pipe:
        done = subprocess.run(
            [sys.executable, "-c", code], stdout=pipe, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode != 0
    assert done.stderr == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_on_stdout_is_one_sentence() -> None:
    code = "from vlm_edge.cli.guard import Command; import click\n"
    code += "click.command(cls=Command)(lambda: click.echo('x', nl=False))()"
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 1
    assert done.stderr.splitlines()[0].startswith("error: no space left")


def test_every_command_is_guarded() -> None:
    assert all(isinstance(command, Command) for command in cli.commands.values())


# -- run ------------------------------------------------------------------------------------


def test_run_streams_the_answer_to_stdout(stub: Stub) -> None:
    result = vlm("run", "b", "a.png", "c.png", "-p", "what?", "--threads", "2")
    assert result.exit_code == 0
    assert result.stdout == "a red circle\n"
    assert stub.calls[0] == ("load", "b", {"device": "cpu", "threads": 2})
    assert stub.asked() == [("what?", ("a.png", "c.png"))]
    assert stub.closed


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ([], {"temperature": 0.0, "max_new_tokens": 128, "template": True, "ignore_eos": False}),
        (["--no-template"], {"template": False}),
        (["--ignore-eos", "--max-new-tokens", "7"], {"ignore_eos": True, "max_new_tokens": 7}),
        (["--stop", "a", "--stop", "b"], {"stop": ("a", "b")}),
        (["--temperature", "0.7", "--seed", "3"], {"temperature": 0.7, "seed": 3}),
        (["--top-p", "0.9", "--top-k", "40"], {"top_p": 0.9, "top_k": 40}),
        (["--repetition-penalty", "1.2"], {"repetition_penalty": 1.2}),
    ],
)
def test_run_passes_settings(stub: Stub, args: list[str], expected: dict[str, Any]) -> None:
    assert vlm("run", "b", "-p", "what?", *args).exit_code == 0
    settings = stub.calls[-1][2]
    assert {k: settings[k] for k in expected} == expected


def test_run_json_is_one_object(stub: Stub) -> None:
    result = vlm("run", "b", "-p", "what?", "--json")
    said = json.loads(result.stdout)
    assert said["text"] == "a red circle"
    assert said["token_ids"] == [5, 6, 7]
    assert said["finish_reason"] == "stop"
    assert said["load_s"] == 0.5
    assert said["timings"]["vision_ms"] == 20.0
    assert said["timings"]["decode_tokens_per_s"] == TIMINGS.decode_tokens_per_s


def test_run_with_a_system_message(stub: Stub) -> None:
    assert vlm("run", "b", "-p", "what?", "--system", "be brief").exit_code == 0
    assert ("chat", "be brief") in stub.calls


def test_a_truncated_answer_is_not_an_error_and_blank_lines_stay_one(stub: Stub) -> None:
    stub.answers = [Answer(("line\n",))]
    assert vlm("run", "b", "-p", "what?").stdout == "line\n"


# -- chat -----------------------------------------------------------------------------------


def test_chat_answers_every_line(stub: Stub) -> None:
    result = vlm(
        "run", "b", "first.png", stdin="what?\n\n/image my cat.png\nand this?\n/exit\nnever\n"
    )
    assert result.exit_code == 0
    assert result.stdout == "a red circle\na red circle\n"
    assert stub.asked() == [("what?", ("first.png",)), ("and this?", ("my cat.png",))]


def test_chat_reset_starts_afresh(stub: Stub) -> None:
    assert vlm("run", "b", "a.png", stdin="/reset\nwhat?").exit_code == 0
    assert [c for c in stub.calls if c[0] == "chat"] == [("chat", None)] * 2
    assert stub.asked() == [("what?", ())]


def test_a_failed_question_leaves_the_chat_going_but_fails_a_script(stub: Stub) -> None:
    stub.answers = [errors.EmptyPrompt(), Answer()]
    result = vlm("run", "b", stdin="first?\nsecond?\n")
    assert result.exit_code == 1
    assert result.stdout == "a red circle\n"
    assert result.stderr == "error: the prompt is empty; give a text, an image or both\n"


def test_an_unknown_order_is_not_a_question(stub: Stub) -> None:
    result = vlm("run", "b", stdin="/pciture a.png\n")
    assert result.exit_code == 1
    assert "no such order: /pciture" in result.stderr
    assert stub.asked() == []


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_chat_at_a_terminal(bundle: Callable[..., Path]) -> None:
    """A prompt, an answer, and Ctrl-D ends it."""
    import pty

    parent, child = pty.openpty()
    command = [sys.executable, "-c", "from vlm_edge.cli.main import main; main()", "run"]
    command += [str(bundle(CASE)), "--max-new-tokens", "2"]
    running = subprocess.Popen(command, stdin=child, stdout=child, stderr=child)
    os.close(child)
    shown = b""
    for typed in (b"what is this?\n", b"\x04"):  # each once the prompt is there
        before = shown.count(b"> ")
        while shown.count(b"> ") == before:
            shown += os.read(parent, 4096)
        os.write(parent, typed)
    assert running.wait(timeout=60) == 0
    os.close(parent)
    assert b"/image PATH" in shown
    assert shown.count(b"> ") == 2


# -- with a real bundle ---------------------------------------------------------------------


def test_the_streamed_text_is_the_json_text(
    bundle: Callable[..., Path], pictures: dict[str, Path]
) -> None:
    args = ("run", str(bundle(CASE)), str(pictures["wide.png"]), "-p", "what is this?")
    args += ("--max-new-tokens", "6", "--threads", "1")
    said = json.loads(vlm(*args, "--json").stdout)
    assert vlm(*args).stdout == said["text"] + "\n"
    assert said["timings"]["images"] == 1
    assert len(said["token_ids"]) <= 6


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["none.png", "-p", "x"], "image none.png cannot be read"),
        ([__file__, "-p", "x"], "cannot be read"),
        (["-p", " "], "the prompt is empty"),
        (["-p", "x", "--max-new-tokens", "100000"], "positions"),
        (["-p", "<image>", "--no-template"], "1 image place(s)"),
        (["-p", "x", "--device", "tensorrt"], "tensorrt"),
    ],
)
def test_bad_input_of_run(bundle: Callable[..., Path], args: list[str], said: str) -> None:
    result = vlm("run", str(bundle(CASE)), *args)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert said in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_damaged_bundle_names_its_file(bundle: Callable[..., Path], tmp_path: Path) -> None:
    damaged = shutil.copytree(bundle(CASE), tmp_path / "damaged")
    with (damaged / "llm.data").open("r+b") as file:
        file.write(b"oops")
    for command in (("run", "-p", "x"), ("bench",)):
        result = vlm(*command, str(damaged))
        assert result.exit_code == 1
        assert "llm.data" in result.stderr.splitlines()[-1]


def test_info_says_what_is_in_a_bundle(bundle: Callable[..., Path]) -> None:
    folder = bundle(CASE, "int8")
    facts = json.loads(vlm("info", str(folder), "--json", "--image-size", "640x480").stdout)
    assert facts["architecture"] == "llava"
    assert facts["precisions"] == {"vision": "int8", "connector": "int8", "llm": "int8"}
    assert facts["image"] == {"width": 640, "height": 480, "tokens": 9}
    files = [p for p in folder.iterdir() if p.name != "manifest.json"]
    assert facts["size"] == sum(p.stat().st_size for p in files) == sum(facts["sizes"].values())
    assert min(facts["sizes"].values()) > 0
    shown = vlm("info", str(folder))
    assert shown.exit_code == 0
    assert "9 tokens" in shown.stdout


# -- export ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "name", "precisions"),
    [
        ([], f"{CASE}-fp32", {"fp32"}),
        (["--int8"], f"{CASE}-int8", {"int8"}),
        (["--int4", "--arch", "llava"], f"{CASE}-int4", {"int4", "int8"}),
        (["--precision", "vision=int8,connector=fp32,llm=int4"], f"{CASE}-mixed", None),
        (["-o", "here"], "here", {"fp32"}),
    ],
)
def test_export_writes_a_bundle(
    checkpoint: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    args: list[str],
    name: str,
    precisions: set[str] | None,
) -> None:
    monkeypatch.chdir(tmp_path)
    result = vlm("export", str(checkpoint(CASE)), *args)
    assert result.exit_code == 0, result.output
    assert [p.name for p in tmp_path.iterdir()] == [name]
    assert "llava exported in" in result.stdout
    assert "write llm" in result.stderr  # the steps, where stderr is no terminal
    engines = json.loads(vlm("info", name, "--json").stdout)["precisions"]
    if precisions is None:
        assert engines == {"vision": "int8", "connector": "fp32", "llm": "int4"}
    else:
        assert set(engines.values()) == precisions


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_export_says_the_error_of_every_quantized_part(
    checkpoint: Callable[[str], Path], tmp_path: Path, precision: str
) -> None:
    result = vlm("export", str(checkpoint(CASE)), f"--{precision}", "-o", str(tmp_path / "b"))
    rows = {line.split("│")[1].strip(): line for line in result.stdout.splitlines() if "│" in line}
    for part in ("vision", "connector", "llm"):
        assert "%" in rows[part].split("│")[4], rows[part]


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (["no/where/there"], 1, "no/where/there"),
        (["CHECKPOINT", "--arch", "blip9"], 1, "llava"),
        (["CHECKPOINT", "--precision", "head=int8"], 2, "this architecture has vision"),
        (["CHECKPOINT", "--precision", "vision=int4"], 2, "use vision=int8"),
        (["CHECKPOINT", "--int8", "--calibration", "none"], 1, "none"),
        (["CHECKPOINT", "-o", "taken"], 1, "taken exists and is not a bundle"),
    ],
)
def test_bad_input_of_export_leaves_nothing(
    checkpoint: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    args: list[str],
    code: int,
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/mine.txt").write_text("keep")
    given = [str(checkpoint(CASE)) if arg == "CHECKPOINT" else arg for arg in args]
    result = vlm("export", *given)
    assert result.exit_code == code
    assert result.stdout == ""
    assert result.stderr.splitlines()[-1].startswith("error: ")
    assert said in result.stderr.splitlines()[-1]
    assert [p.name for p in tmp_path.rglob("*")] == ["taken", "mine.txt"]


def test_a_full_disk_during_export_leaves_nothing(
    checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("vlm_edge.export.writer.write_embeddings", full)
    result = vlm("export", str(checkpoint(CASE)), "-o", str(tmp_path / "bundle"))
    assert result.exit_code == 1
    assert "error: no space left on the disk" in result.stderr
    assert list(tmp_path.iterdir()) == []


# -- verify ---------------------------------------------------------------------------------


def test_verify_prints_the_ladder_and_stores_it(
    bundle: Callable[..., Path], checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    copy = shutil.copytree(bundle(CASE), tmp_path / "bundle")
    args = ("verify", str(copy), "--against", str(checkpoint(CASE)), "--new-tokens", "4")
    said = json.loads(vlm(*args, "--json", "--no-store").stdout)
    assert said["ok"] is True
    facts = ("info", str(copy), "--json")
    assert json.loads(vlm(*facts).stdout)["verified"] is False
    result = vlm(*args)
    assert result.exit_code == 0, result.output
    for stage in ("token ids", "pixels", "vision", "connector", "prefill logits", "greedy tokens"):
        assert stage in result.stdout
    assert json.loads(vlm(*facts).stdout)["verified"] is True


def test_verify_exits_with_1_on_divergence(bundle: Callable[..., Path], tmp_path: Path) -> None:
    other = build("another seed", tmp_path / "other", CASES[CASE])
    args = ("verify", str(bundle(CASE)), "--against", str(other), "--no-store")
    result = vlm(*args, "--new-tokens", "4")
    assert result.exit_code == 1
    assert "diverges at vision" in result.stdout
    assert "Traceback" not in result.output


def test_verify_without_its_checkpoint(bundle: Callable[..., Path], tmp_path: Path) -> None:
    result = vlm("verify", str(bundle(CASE)), "--against", str(tmp_path / "none"), "--no-store")
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1].startswith("error: ")
