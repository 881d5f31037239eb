"""The command line with real bundles: run, chat, info, export and verify from end to end."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from tiny import CASES, build

from vlm_edge.cli.main import cli

CASE = "clip-llama"


def vlm(*args: str) -> Result:
    return CliRunner().invoke(cli, list(args))


# -- run ------------------------------------------------------------------------------------


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
    assert facts["image"]["tokens"] == 9  # tests/test_cli_tiling.py has the rest
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
