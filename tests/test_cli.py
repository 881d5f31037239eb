"""The command line: what reaches the library, what is printed where, and every exit code."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

import vlm_edge
from vlm_edge import errors
from vlm_edge.cli.guard import Command
from vlm_edge.cli.main import cli
from vlm_edge.runtime.timings import Timings

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
    pictures: Sequence[Any] = ()

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
        (["export", "--method", "median"], "'auto', 'minmax', 'average'"),
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
    assert stub.calls[0] == ("load", "b", {"device": "cpu", "threads": 2, "plans": None})
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
