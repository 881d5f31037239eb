"""The calibration cache: hit only by the very same run, never trusted when damaged, bounded."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pictures import scene

from vlm_edge.calibration import cache
from vlm_edge.calibration.ranges import METHODS, Ranges
from vlm_edge.export import static
from vlm_edge.export.pipeline import export
from vlm_edge.export.precision import PrecisionPlan
from vlm_edge.runtime.manifest import read_manifest

RANGES = Ranges(
    {method: {"a.b": 1 / 3 + i, "c": 1e-9} for i, method in enumerate(METHODS)},
    {"a.b": np.array([0.1, 2], np.float32), "c": np.array([5e-7], np.float32)},
)
OUTPUTS = np.arange(24, dtype=np.float32).reshape(4, 2, 3) / 7
Root = Callable[[], Path]


def kept() -> str:
    cache.keep("k" * 64, RANGES, OUTPUTS)
    return "k" * 64


# -- entries ----------------------------------------------------------------------------------


def test_what_was_kept_comes_back_to_the_bit(calibration_cache: Root) -> None:
    key = kept()
    assert cache.load("0" * 64) is None
    found = cache.load(key)
    assert found is not None
    ranges, outputs = found
    assert ranges.limits == RANGES.limits
    assert ranges.channels.keys() == RANGES.channels.keys()
    for path, channels in RANGES.channels.items():
        np.testing.assert_array_equal(ranges.channels[path], channels)
    np.testing.assert_array_equal(outputs, OUTPUTS)
    assert isinstance(outputs, np.memmap)
    assert sorted(path.name for path in (calibration_cache() / key).iterdir()) == [
        "entry.json", "outputs.npy", "ranges.npz",
    ]  # fmt: skip
    kept()  # a second process that was a little later
    assert [path.name for path in calibration_cache().iterdir()] == [key]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def grow(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [cut, flip, grow, empty, Path.unlink])
@pytest.mark.parametrize("name", [cache.OUTPUTS, cache.RANGES, cache.ENTRY])
def test_a_damaged_entry_is_removed(
    name: str, damage: Callable[[Path], Any], calibration_cache: Root
) -> None:
    key = kept()
    if (name, damage) == (cache.ENTRY, grow):
        damage = flip  # JSON may end in whatever space
    damage(calibration_cache() / key / name)
    assert cache.load(key) is None
    assert not list(calibration_cache().iterdir())
    kept()
    assert cache.load(key) is not None


@pytest.mark.parametrize("text", ["[]", "3", "{}", "\xff", '{"outputs.npy": 1}'])
def test_an_entry_without_hashes_is_damaged(text: str, calibration_cache: Root) -> None:
    key = kept()
    (calibration_cache() / key / cache.ENTRY).write_bytes(text.encode("latin-1"))
    assert cache.load(key) is None


def test_a_cache_that_cannot_be_written_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(cache, "root", lambda: tmp_path / "file" / "below")
    kept()
    assert cache.load("k" * 64) is None


def test_a_full_disk_leaves_no_draft(
    calibration_cache: Root, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    assert cache.load(kept()) is None
    assert not list(calibration_cache().iterdir())


def test_the_entry_unused_for_longest_goes_first(
    calibration_cache: Root, monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs = np.zeros((1, 600), np.float32)
    cache.keep("a", RANGES, outputs)
    most = 3 * sum(path.stat().st_size for path in (calibration_cache() / "a").iterdir())
    monkeypatch.setattr(cache, "MOST_BYTES", most)
    for age, key in enumerate("abc"):
        cache.keep(key, RANGES, outputs)
        os.utime(calibration_cache() / key, (100 + age, 100 + age))
    assert cache.load("a") is not None  # used: now b is the oldest
    cache.keep("d", RANGES, outputs)
    assert {path.name for path in calibration_cache().iterdir()} == {"a", "c", "d"}
    cache.keep("larger than all", RANGES, np.zeros(most, np.float32))
    assert {path.name for path in calibration_cache().iterdir()} == {"a", "c", "d"}


def test_the_key_follows_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph, weights, code = (tmp_path / name for name in ("g.onnx", "g.data", "ranges.py"))
    for path in (graph, weights, code):
        path.write_text("a")
    monkeypatch.setattr(cache, "CODE", (code,))

    def key(inputs: np.ndarray = OUTPUTS, **settings: Any) -> str:
        return cache.key({"graph": graph, "weights": weights}, inputs, **{"a": (1, 2)} | settings)

    keys = [
        key(), key(OUTPUTS.reshape(4, 3, 2)), key(OUTPUTS.astype(np.float64)), key(OUTPUTS[:3]),
        key(OUTPUTS[::-1]), key(a=(1, 3)), key(b=1), cache.key({"graph": graph}, OUTPUTS, a=(1, 2)),
    ]  # fmt: skip
    for path in (graph, weights, code):
        path.write_text("b")
        keys.append(key())
    assert len(set(keys)) == len(keys)
    assert key() == keys[-1]


# -- exports ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pictures")
    for index in range(5):
        scene(40, 35 + index, index).save(path / f"{index}.png")
    return path


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Parts that were run in full precision to calibrate."""
    names: list[str] = []

    def observe(name: str, *rest: Any) -> Any:
        names.append(name)
        return original(name, *rest)

    original = static._observe
    monkeypatch.setattr(static, "_observe", observe)
    return names


def exported(source: Path, folder: Path, output: Path, method: str = "smooth-65") -> dict[str, str]:
    """Hashes of the bundle's files."""
    export(
        source, output, precision=PrecisionPlan.parse("vision=int8,connector=int8"),
        calibration_images=folder, calibration_method=method,
    )  # fmt: skip
    return {name: entry.sha256 for name, entry in read_manifest(output).files.items()}


def test_a_second_export_does_not_calibrate_again(
    folder: Path, tmp_path: Path, checkpoint: Callable[[str], Path], ran: list[str]
) -> None:
    source = checkpoint("clip-llama")
    first = exported(source, folder, tmp_path / "a")
    assert ran == ["vision", "connector"]
    assert exported(source, folder, tmp_path / "b") == first
    assert ran == ["vision", "connector"]
    assert exported(source, folder, tmp_path / "c", "entropy") != first
    export(
        source, tmp_path / "d", precision=PrecisionPlan.uniform("int4"), calibration_images=folder
    )
    assert ran == ["vision", "connector"]


def test_another_model_or_picture_calibrates_again(
    folder: Path, tmp_path: Path, checkpoint: Callable[[str], Path], ran: list[str]
) -> None:
    from safetensors.numpy import load_file, save_file

    source = shutil.copytree(checkpoint("clip-llama"), tmp_path / "source")
    exported(source, folder, tmp_path / "a")
    tensors = load_file(source / "model.safetensors")
    name = next(n for n in tensors if n.endswith("mlp.fc1.bias"))
    tensors[name] = tensors[name] * np.float32(1.001)
    save_file(tensors, source / "model.safetensors")  # config.json and the header stay as they were
    exported(source, folder, tmp_path / "b")
    assert ran == ["vision", "connector"] * 2
    other = shutil.copytree(folder, tmp_path / "pictures")
    scene(40, 39, 99).save(other / "4.png")
    exported(source, other, tmp_path / "c")
    assert ran == ["vision", "connector"] * 3
    scene(40, 39, 98).save(other / "5.png")  # the same four held in, one more beside them
    exported(source, other, tmp_path / "d")
    assert ran == ["vision", "connector"] * 4


def test_a_damaged_entry_is_calibrated_again(
    folder: Path, tmp_path: Path, checkpoint: Callable[[str], Path], ran: list[str],
    calibration_cache: Root,
) -> None:  # fmt: skip
    source = checkpoint("clip-llama")
    first = exported(source, folder, tmp_path / "a")
    for path in calibration_cache().rglob(cache.OUTPUTS):
        flip(path)
    assert exported(source, folder, tmp_path / "b") == first
    assert ran == ["vision", "connector"] * 2


def test_an_interrupted_calibration_keeps_nothing(
    folder: Path, tmp_path: Path, checkpoint: Callable[[str], Path], calibration_cache: Root
) -> None:
    def interrupt(step: str, done: int, total: int) -> None:
        if step == "calibrate vision" and done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(
            checkpoint("clip-llama"), tmp_path / "b", precision=PrecisionPlan.uniform("int8"),
            calibration_images=folder, progress=interrupt,
        )  # fmt: skip
    assert not list(tmp_path.iterdir())
    assert not list(calibration_cache().iterdir())


def test_the_root_is_where_the_demo_checkpoint_is(monkeypatch: pytest.MonkeyPatch) -> None:
    from vlm_edge.export import demo

    monkeypatch.undo()  # conftest's own root
    for environment in ("/some/cache", ""):
        monkeypatch.setenv("XDG_CACHE_HOME", environment)
        assert cache.root() == demo.default_folder().parent / "calibration"
