"""Calibration data that cannot be used, through the command line: one sentence, and nothing left."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from pictures import scene

from vlm_edge.cli.main import cli


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five pictures, prompts.jsonl and texts.txt, all good."""
    path = tmp_path / "pictures"
    path.mkdir()
    for index in range(5):
        scene(40, 35, index).save(path / f"{index}.png")
    lines = [f'{{"image": "{index}.png", "prompt": "What is it?"}}\n' for index in range(5)]
    (path / "prompts.jsonl").write_text("".join(lines))
    (path / "texts.txt").write_text("One text.\nAnother text.\n")
    return path


def exported(source: Path, calibration: Path, output: Path, precision: str = "--int8") -> Result:
    return CliRunner().invoke(
        cli,
        ["export", str(source), precision, "--calibration", str(calibration), "-o", str(output)],
    )


def only_files(folder: Path) -> Path:
    for picture in folder.glob("*.png"):
        picture.rename(picture.with_suffix(".dat"))
    return folder


def emptied(folder: Path) -> Path:
    shutil.rmtree(folder)
    folder.mkdir()
    return folder


def few(folder: Path) -> Path:
    for index in (0, 1):
        (folder / f"{index}.png").unlink()
    return folder


def corrupt(folder: Path) -> Path:
    data = (folder / "2.png").read_bytes()
    (folder / "2.png").write_bytes(data[: len(data) // 2])
    return folder


def no_picture(folder: Path) -> Path:
    (folder / "3.png").write_bytes(b"")
    return folder


def named_a_file(folder: Path) -> Path:
    return folder / "2.png"


def latin(name: str) -> Callable[[Path], Path]:
    def change(folder: Path) -> Path:
        (folder / name).write_bytes(b'{"image": "0.png", "prompt": "caf\xe9"}\n')
        return folder

    return change


def few_prompts(folder: Path) -> Path:
    (folder / "prompts.jsonl").write_text('{"image": "0.png", "prompt": "What is it?"}\n')
    return folder


BAD = {
    "absent": (lambda folder: folder / "none", "there is no calibration folder"),
    "empty": (emptied, "has no file; put at least 4 pictures there"),
    "no pictures": (only_files, "has 7 file(s) but no picture; put at least 4 pictures there"),
    "few": (few, "has 3 picture(s); at least 4 are needed"),
    "cut": (corrupt, "2.png cannot be read"),
    "no bytes": (no_picture, "3.png cannot be read: it is empty; repair it or take it out"),
    "a file": (named_a_file, "2.png is a file: give the folder it is in"),
    "prompts": (latin("prompts.jsonl"), "prompts.jsonl is not UTF-8 text; save it as UTF-8"),
    "texts": (latin("texts.txt"), "texts.txt is not UTF-8 text; save it as UTF-8"),
    "few prompts": (few_prompts, "has 3 prompt(s) in prompts.jsonl and texts.txt; at least 4"),
}


@pytest.mark.parametrize("precision", ["--int8", "--int4"])
@pytest.mark.parametrize("name", BAD)
def test_unusable_data_is_one_sentence_and_leaves_nothing(
    name: str, precision: str, folder: Path, tmp_path: Path, checkpoint: Callable[[str], Path]
) -> None:
    change, said = BAD[name]
    calibration = change(folder)
    before = sorted(path.name for path in tmp_path.rglob("*"))
    result = exported(checkpoint("clip-llama"), calibration, tmp_path / "b", precision)
    assert result.exit_code == 1
    error = result.stderr.splitlines()[-1]
    assert error.startswith("error: ")
    assert said in error
    assert "Traceback" not in result.output
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads everything")
def test_a_folder_without_permission(
    folder: Path, tmp_path: Path, checkpoint: Callable[[str], Path]
) -> None:
    folder.chmod(0)
    try:
        result = exported(checkpoint("clip-llama"), folder, tmp_path / "b")
    finally:
        folder.chmod(0o755)
    assert result.exit_code == 1
    assert "cannot be read: Permission denied" in result.stderr.splitlines()[-1]


def test_a_folder_that_cannot_be_listed(
    folder: Path, tmp_path: Path, checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same where the tests run as root."""

    def refuse(self: Path) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    listed = Path.iterdir
    monkeypatch.setattr(Path, "iterdir", lambda p: refuse(p) if p == folder else listed(p))
    result = exported(checkpoint("clip-llama"), folder, tmp_path / "b")
    assert result.exit_code == 1
    error = result.stderr.splitlines()[-1]
    assert error == f"error: calibration folder {folder} cannot be read: Permission denied"


@pytest.mark.parametrize(
    ("tensor", "precision", "said"),
    [
        ("encoder.layers.1.mlp.fc1.weight", "--int8", "layers.1.mlp.fc2"),
        ("multi_modal_projector.linear_2.bias", "--int8", "connector"),
        ("layers.1.mlp.gate_proj.weight", "--int8", "layers.1.mlp.down_proj"),
        ("layers.1.mlp.gate_proj.weight", "--int4", "layers.1.mlp.down_proj"),
    ],
)
def test_activations_that_are_not_finite(
    tensor: str, precision: str, said: str, folder: Path, tmp_path: Path,
    checkpoint: Callable[[str], Path],
) -> None:  # fmt: skip
    """Weights that are finite themselves and too large for what they are multiplied with."""
    from safetensors.numpy import load_file, save_file

    source = shutil.copytree(checkpoint("clip-llama"), tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    (name,) = (n for n in tensors if n.endswith(tensor))
    value = np.full_like(tensors[name], 3e38)
    value.ravel()[::2] = np.inf if tensor.endswith("bias") else -3e38
    tensors[name] = value
    save_file(tensors, source / "model.safetensors")
    result = exported(source, folder, tmp_path / "b", precision)
    assert result.exit_code == 1
    error = result.stderr.splitlines()[-1]
    assert error.startswith("error: ")
    assert said in error
    assert "not finite in full precision" in error
    assert {path.name for path in tmp_path.iterdir()} == {"pictures", "source"}
