"""A bundle's folder is written whole or not at all, and its token table is what the checkpoint has."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from small_graph import ref

from vlm_edge.errors import BundleExists, SettingError
from vlm_edge.export import checkpoint as checkpoint_module
from vlm_edge.export import writer
from vlm_edge.export.pipeline import export
from vlm_edge.export.precision import PrecisionPlan
from vlm_edge.export.writer import file_entries, new_folder, write_embeddings
from vlm_edge.runtime.bundle import Embeddings
from vlm_edge.runtime.manifest import NAME


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder that holds nothing yet."""
    (tmp_path / "place").mkdir()
    return tmp_path / "place"


def write_bundle(output: Path, text: str) -> None:
    with new_folder(output) as folder:
        (folder / NAME).write_text(text)


def contents(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}


def test_nothing_is_there_until_all_is(place: Path) -> None:
    output = place / "deep" / "er" / "bundle"
    with new_folder(output) as folder:
        (folder / NAME).write_text("1")
        (folder / "sub").mkdir()
        assert not output.exists()
        assert folder.parent == output.parent  # a rename within one file system
        assert folder.name.startswith(".bundle.")
    assert contents(place) == {"deep/er/bundle/manifest.json": "1"}
    assert list(output.parent.iterdir()) == [output]


def test_others_may_read_it_as_they_may_read_any_new_folder(place: Path) -> None:
    (place / "plain").mkdir()
    write_bundle(place / "bundle", "1")
    modes = {stat.S_IMODE((place / name).stat().st_mode) for name in ("plain", "bundle")}
    assert len(modes) == 1  # mkdtemp alone makes it private


def test_an_older_bundle_stays_until_the_end(place: Path) -> None:
    write_bundle(place / "bundle", "old")
    (place / "bundle" / "left-over.onnx").write_text("of an earlier version")
    with new_folder(place / "bundle") as folder:
        (folder / NAME).write_text("new")
        assert (place / "bundle" / NAME).read_text() == "old"
    assert contents(place) == {"bundle/manifest.json": "new"}
    assert [path.name for path in place.iterdir()] == ["bundle"]


FAILURES = [ValueError("x"), KeyboardInterrupt(), SystemExit(1), OSError(errno.ENOSPC, "disk full")]


@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: type(failure).__name__)
@pytest.mark.parametrize("older", [True, False])
def test_a_failure_leaves_what_was_there(older: bool, failure: BaseException, place: Path) -> None:
    if older:
        write_bundle(place / "bundle", "old")
    before = contents(place)
    with pytest.raises(type(failure)), new_folder(place / "bundle") as folder:
        (folder / NAME).write_text("half")
        raise failure
    assert contents(place) == before
    assert [path.name for path in place.iterdir()] == ["bundle"][: int(older)]


@pytest.mark.parametrize(
    "failure", [OSError(errno.EACCES, "no"), KeyboardInterrupt()], ids=["os", "^C"]
)
def test_the_older_bundle_comes_back_when_the_last_rename_fails(
    failure: BaseException, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_bundle(place / "bundle", "old")
    rename, calls = Path.rename, []

    def second_fails(self: Path, target: Any) -> Path:
        calls.append(target)
        if len(calls) == 2:
            raise failure
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", second_fails)
    with pytest.raises(type(failure)):
        write_bundle(place / "bundle", "new")
    assert contents(place) == {"bundle/manifest.json": "old"}
    assert [path.name for path in place.iterdir()] == ["bundle"]


def make_file(path: Path) -> None:
    path.write_text("precious")


def make_folder(path: Path) -> None:
    path.mkdir()
    (path / "thesis.txt").write_text("precious")


def make_dangling_link(path: Path) -> None:
    path.symlink_to(path.parent / "nowhere")


@pytest.mark.parametrize("make", [make_file, make_folder, make_dangling_link])
@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_what_is_no_bundle_is_never_replaced(
    when: str, make: Callable[[Path], None], place: Path
) -> None:
    output, began = place / "out", []

    def attempt() -> None:
        with new_folder(output):
            began.append(True)
            if when == "meanwhile":
                make(output)

    if when == "before":
        make(output)
    with pytest.raises(BundleExists, match="out exists and is not a bundle"):
        attempt()
    assert bool(began) == (when == "meanwhile")
    assert [path.name for path in place.iterdir()] == ["out"]
    assert "precious" in contents(place).values() or output.is_symlink()


def test_an_empty_folder_is_replaced(place: Path) -> None:
    (place / "out").mkdir()
    write_bundle(place / "out", "1")
    assert contents(place) == {"out/manifest.json": "1"}


def test_the_folder_one_stands_in(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    write_bundle(Path("bundle"), "relative")
    assert contents(place) == {"bundle/manifest.json": "relative"}
    monkeypatch.chdir(place / "bundle")
    for here in (Path("."), Path("../bundle"), place / "bundle"):
        with pytest.raises(SettingError, match="is the current folder"):
            write_bundle(here, "here")
    assert contents(place) == {"bundle/manifest.json": "relative"}


def test_a_place_that_cannot_be_written_is_a_setting_error(place: Path) -> None:
    (place / "file").write_text("")
    with (
        pytest.raises(SettingError, match="file cannot be written"),
        new_folder(place / "file" / "out"),
    ):
        pass


def test_file_entries_leave_out_the_manifest(place: Path) -> None:
    (place / NAME).write_text("{}")
    (place / "b").write_bytes(b"abc")
    (place / "a").write_bytes(b"")
    found = file_entries(place)
    assert list(found) == ["a", "b"]
    assert [entry.size for entry in found.values()] == [0, 3]
    assert found["b"].sha256.startswith("ba7816bf")  # FIPS 180-4, example "abc"


# -- a whole export ---------------------------------------------------------------------------


class Interrupted(BaseException):
    """Stands for Ctrl-C or SIGTERM."""


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_an_export_interrupted_anywhere_leaves_nothing(
    precision: str, place: Path, checkpoint: Callable[[str], Path], pictures: dict[str, Path]
) -> None:
    source, plan = checkpoint("clip-llama"), PrecisionPlan.uniform(precision)
    steps: list[str] = []
    options: dict[str, Any] = {"precision": plan}
    if precision == "int8":
        options["calibration_images"] = pictures["wide.png"].parent

    def note(step: str, done: int, total: int) -> None:
        if step not in steps:
            steps.append(step)

    export(source, place / "whole", progress=note, **options)
    whole = sorted(path.name for path in (place / "whole").iterdir())
    assert not [name for name in whole if name.startswith(".")]  # no scratch folder in the bundle
    assert len(steps) > 4
    for stop in steps:

        def interrupt(step: str, done: int, total: int, stop: str = stop) -> None:
            if step == stop:
                raise Interrupted

        with pytest.raises(Interrupted):
            export(source, place / "bundle", progress=interrupt, **options)
        assert [path.name for path in place.iterdir()] == ["whole"], stop


def test_a_full_disk_in_the_middle_of_a_tensor(
    place: Path, checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from vlm_edge.export import tensors

    written = []

    def full(self: Any, file: Any) -> None:
        written.append(1)
        if len(written) == 9:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(self, file)

    original = tensors.StreamedTensor.tofile
    monkeypatch.setattr(tensors.StreamedTensor, "tofile", full)
    with pytest.raises(OSError, match="No space left") as caught:
        export(checkpoint("clip-llama"), place / "bundle")
    assert caught.value.errno == errno.ENOSPC
    assert list(place.iterdir()) == []


# -- the token table --------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [1, 200, 1 << 20])
@pytest.mark.parametrize(
    ("stored", "written"),
    [("float16", "float16"), (ml_dtypes.bfloat16, "float32"), ("float32", "float32"), ("float64", "float32")],
)  # fmt: skip
def test_full_precision_table(
    stored: Any, written: str, budget: int, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_module, "CHUNK_BYTES", budget)
    values = np.random.default_rng(0).standard_normal((11, 12)).astype(stored)
    settings = write_embeddings(ref(values), place, quantize=False)
    assert (settings.scales, settings.block) == (None, None)
    table = np.load(place / settings.file, mmap_mode="r")
    assert table.dtype == np.dtype(written)
    np.testing.assert_array_equal(table, values.astype(written))


@pytest.mark.parametrize("budget", [1, 600, 1 << 20])
@pytest.mark.parametrize(("width", "block"), [(192, 64), (96, 32), (80, 16), (72, 72), (50, 50)])
def test_quantized_table(
    width: int, block: int, budget: int, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_module, "CHUNK_BYTES", budget)
    values = np.random.default_rng(1).standard_normal((13, width)).astype(np.float32)
    values[3] = 0  # a token that was never trained
    values[4, :block] *= 1e-3
    settings = write_embeddings(ref(values), place, quantize=True)
    assert settings.block == block
    rows = np.load(place / settings.file)
    scales = np.load(place / str(settings.scales))
    assert (rows.dtype, scales.dtype) == (np.int8, np.float32)
    expected = np.abs(values.reshape(13, -1, block)).max(axis=2) / 127
    np.testing.assert_allclose(scales, np.where(expected == 0, scales, expected), rtol=1e-6)
    assert (scales > 0).all()
    assert rows.reshape(13, -1, block).max(axis=2)[expected > 0].max() == 127
    read = Embeddings(place, settings).rows(np.arange(13))
    half_step = np.repeat(expected, block, axis=1) / 2
    assert (np.abs(read - values) <= half_step * 1.001).all()
    assert not read[3].any()


def test_the_writers_block_is_the_documents() -> None:
    """docs/bundle.md tells readers of the format."""
    text = (Path(__file__).parents[1] / "docs" / "bundle.md").read_text(encoding="utf-8")
    assert f"one float32 scale for {writer.EMBEDDING_BLOCK} columns" in text
