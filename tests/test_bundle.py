"""A bundle opened for reading: files checked against the manifest, token rows from the mapped table."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vlm_edge.errors import BundleDamaged
from vlm_edge.runtime.bundle import Bundle, Embeddings, file_digest
from vlm_edge.runtime.manifest import NAME, EmbeddingSettings


@pytest.fixture
def copy(tmp_path: Path, bundle: Callable[..., Path]) -> Path:
    return shutil.copytree(bundle("clip-llama", "int8"), tmp_path / "bundle")


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    data = json.loads((folder / NAME).read_text())
    change(data)
    (folder / NAME).write_text(json.dumps(data))


def test_a_good_bundle(copy: Path) -> None:
    found = Bundle(copy)
    listed = {path.name: path.stat().st_size for path in copy.iterdir() if path.name != NAME}
    assert {name: entry.size for name, entry in found.manifest.files.items()} == listed
    assert found.size() == sum(listed.values())
    assert found.graph("vision", "cpu") == copy / "vision.cpu.onnx"
    assert found.graph("vision", "tensorrt") == copy / "vision.onnx"
    assert found.graph("llm", "cpu") == copy / "llm.onnx"


OUTSIDE = ["../secret", "/etc/hostname", "sub/file", "./vision.onnx", ".."]


@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.parametrize("where", ["files", "graph", "lowered", "embeddings", "template"])
def test_a_file_outside_the_bundle_is_refused(where: str, name: str, copy: Path) -> None:
    """A manifest may come from anywhere, and its names are opened."""
    (copy.parent / "secret").write_bytes(b"1234")
    (copy / "sub").mkdir()
    (copy / "sub" / "file").write_bytes(b"1234")

    def change(data: dict[str, Any]) -> None:
        data["files"][name] = {"size": 4, "sha256": file_digest(copy.parent / "secret")}
        if where == "graph":
            data["engines"]["vision"]["graph"] = name
        if where == "lowered":
            data["engines"]["vision"]["lowered"]["cpu"] = name
        if where == "embeddings":
            data["embeddings"]["file"] = name
        if where == "template":
            data["prompt"]["chat_template"] = name

    edit(copy, change)
    with pytest.raises(BundleDamaged) as caught:
        Bundle(copy)
    assert name in str(caught.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: d["engines"].pop("vision"), "no engine vision"),
        (lambda d: d.update(engines={}), "no engine connector, llm, vision"),
        (lambda d: d["files"].pop("tokenizer.json"), "lists no file tokenizer.json"),
        (lambda d: d["files"].pop("vision.cpu.onnx"), "lists no file vision.cpu.onnx"),
        (lambda d: d["files"].pop("llm.onnx"), "lists no file llm.onnx"),
        (lambda d: d["files"].pop("embeddings_scales.npy"), "lists no file embeddings_scales.npy"),
        (lambda d: d["files"].pop("chat_template.jinja"), "lists no file chat_template.jinja"),
        (lambda d: d["files"].update(extra={"size": 1, "sha256": ""}), "extra is missing"),
        (lambda d: d["files"]["llm.data"].update(size=7), "llm.data has .* bytes instead of 7"),
        (
            lambda d: d["files"]["llm.data"].update(sha256="0" * 64),
            "llm.data differs from the sha256",
        ),
    ],
)
def test_what_the_manifest_says_must_be_there(
    change: Callable[[dict[str, Any]], object], said: str, copy: Path
) -> None:
    edit(copy, change)
    with pytest.raises(BundleDamaged, match=said):
        Bundle(copy)


def test_digests_are_compared_only_if_asked(copy: Path) -> None:
    data = bytearray((copy / "vision.data").read_bytes())
    data[100] ^= 1
    (copy / "vision.data").write_bytes(data)
    with pytest.raises(BundleDamaged, match="vision.data"):
        Bundle(copy)
    Bundle(copy, check=False)
    (copy / "vision.data").write_bytes(data[:-1])
    with pytest.raises(BundleDamaged, match="vision.data"):
        Bundle(copy, check=False)  # sizes cost nothing


def test_files_that_the_manifest_does_not_know_are_left_alone(copy: Path) -> None:
    (copy / "notes.txt").write_text("mine")
    assert "notes.txt" not in Bundle(copy).manifest.files


# -- token rows -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_float_rows(dtype: Any, tmp_path: Path) -> None:
    table = np.random.default_rng(0).standard_normal((9, 6)).astype(dtype)
    np.save(tmp_path / "t.npy", table)
    found = Embeddings(tmp_path, EmbeddingSettings("t.npy", None, None))
    ids = np.array([3, 0, 8, 3])
    rows = found.rows(ids)
    assert rows.dtype == np.float32
    np.testing.assert_array_equal(rows, table[ids].astype(np.float32))
    rows[:] = 0  # the caller writes visual tokens into them
    np.testing.assert_array_equal(found.rows(ids), table[ids].astype(np.float32))
    for token in ids:
        np.testing.assert_array_equal(found.row(int(token)), found.rows(np.array([token]))[0])


def test_quantized_rows(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    table = generator.integers(-127, 128, (9, 6)).astype(np.int8)
    scales = generator.uniform(0.1, 2, (9, 2)).astype(np.float32)
    np.save(tmp_path / "t.npy", table)
    np.save(tmp_path / "s.npy", scales)
    found = Embeddings(tmp_path, EmbeddingSettings("t.npy", "s.npy", 3))
    ids = np.array([8, 2])
    expected = [[table[i, j] * scales[i, j // 3] for j in range(6)] for i in ids]
    np.testing.assert_allclose(found.rows(ids), expected, rtol=1e-7)
    for token in ids:
        np.testing.assert_array_equal(found.row(int(token)), found.rows(np.array([token]))[0])


def test_only_the_rows_used_are_read(tmp_path: Path) -> None:
    np.save(tmp_path / "t.npy", np.zeros((4, 2), np.float32))
    found = Embeddings(tmp_path, EmbeddingSettings("t.npy", None, None))
    assert isinstance(found._table.base, np.memmap)
    assert not found._table.flags.writeable


@pytest.mark.parametrize("content", [b"", b"not numpy", np.array([{}], object).dumps()])
def test_what_is_no_table_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "t.npy").write_bytes(content)
    with pytest.raises(BundleDamaged, match=r"t\.npy"):
        Embeddings(tmp_path, EmbeddingSettings("t.npy", None, None))


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (("decoder", "layers"), 5), (("decoder", "layers"), 1), (("decoder", "width"), 24),
        (("decoder", "head_dim"), 6), (("decoder", "kv_heads"), 7), (("decoder", "vocab_size"), 9),
        (("tiling", "tokens"), 4), (("image", "height"), 31), (("image", "width"), 31),
    ],
)  # fmt: skip
def test_settings_that_contradict_the_engines_are_refused(
    keys: tuple[str, str], value: int, copy: Path
) -> None:
    edit(copy, lambda data: data[keys[0]].update({keys[1]: value}))
    with pytest.raises(BundleDamaged, match=r"manifest\.json: .* its settings say .*"):
        Bundle(copy)


def test_a_table_of_another_kind_is_refused(copy: Path) -> None:
    """An int8 table read without its scales would give wrong embeddings in silence."""
    edit(copy, lambda data: data["embeddings"].update({"scales": None, "block": None}))
    with pytest.raises(
        BundleDamaged, match=r"embeddings\.npy is int8 .*, not what its settings say"
    ):
        Bundle(copy).embeddings()
