"""The store of TensorRT plans: hits, misses that name the field, damage, replacement."""

from __future__ import annotations

import dataclasses
import errno
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm_edge.errors import PlanDamaged, PlanMismatch, PlanMissing
from vlm_edge.runtime.manifest import EngineEntry, FileEntry
from vlm_edge.runtime.plans import (
    FloatType,
    PlanEntry,
    PlanKey,
    PlanProfile,
    PlanStore,
    graph_digest,
)

PROFILE = PlanProfile("float16", capacity=2048, chunk=256, tiles=3)
KEY = PlanKey("tensorrt 10.3.0", "8.7", "linux-aarch64", "a" * 64, PROFILE)
COMMAND = "vlm build llava-int8 --device tensorrt"
OTHER = {
    "tensorrt": "tensorrt 10.7.0",
    "compute_capability": "8.6",
    "platform": "linux-x86_64",
    "graph": "b" * 64,
    "profile": dataclasses.replace(PROFILE, capacity=512),
    "lowering": 0,
}


@pytest.fixture
def store(tmp_path: Path) -> PlanStore:
    return PlanStore(tmp_path / "llava-int8.plans")


def add(
    store: PlanStore, key: PlanKey = KEY, content: bytes = b"plan", engine: str = "llm"
) -> PlanEntry:
    store.folder.mkdir(exist_ok=True)
    part = store.folder / ".llm.part"
    part.write_bytes(content)
    return store.add(engine, key, part, seconds=1.5)


def test_a_plan_is_found_again(store: PlanStore) -> None:
    added = add(store)
    found = store.find("llm", KEY, COMMAND)
    assert found == added
    assert store.path(found).read_bytes() == b"plan"
    assert sorted(path.suffix for path in store.folder.iterdir()) == [".json", ".plan"]


def test_an_empty_store_says_how_to_build(store: PlanStore) -> None:
    with pytest.raises(
        PlanMissing, match=r"llava-int8\.plans has no TensorRT plan of llm; .*`vlm build"
    ):
        store.find("llm", KEY, COMMAND)
    add(store, engine="vision")
    with pytest.raises(PlanMissing):  # another engine's plan is none
        store.find("llm", KEY, COMMAND)


@pytest.mark.parametrize("field", OTHER)
def test_a_miss_names_the_field_that_changed(field: str, store: PlanStore) -> None:
    add(store)
    wanted = dataclasses.replace(KEY, **{field: OTHER[field]})
    with pytest.raises(PlanMismatch) as caught:
        store.find("llm", wanted, COMMAND)
    text = str(caught.value)
    assert text.count(" the plan's is ") == 1, "only one field differs"
    has, needed = KEY.differs(wanted)[field]
    assert f"{field} is {needed}, the plan's is {has}" in text
    assert COMMAND in text


def test_the_nearest_plan_is_compared(store: PlanStore) -> None:
    add(store, dataclasses.replace(KEY, tensorrt="tensorrt 8.6", graph="c" * 64))
    add(store, dataclasses.replace(KEY, compute_capability="11.0"))
    with pytest.raises(
        PlanMismatch, match=r"fits: compute_capability is 8\.7, the plan's is 11\.0; make"
    ):
        store.find("llm", KEY, COMMAND)


def test_a_search_without_a_profile_takes_the_latest(store: PlanStore) -> None:
    anything = dataclasses.replace(KEY, profile=None)
    add(store, content=b"first")
    later = add(store, dataclasses.replace(KEY, profile=OTHER["profile"]), b"second")
    assert later.built > store.find("llm", KEY, COMMAND).built
    assert store.find("llm", anything, COMMAND) == later
    with pytest.raises(PlanMismatch, match="compute_capability"):
        store.find("llm", dataclasses.replace(anything, compute_capability="5.0"), COMMAND)


def test_the_same_key_is_replaced(store: PlanStore) -> None:
    add(store, content=b"old")
    add(store, content=b"newer")
    found = store.find("llm", KEY, COMMAND)
    assert store.path(found).read_bytes() == b"newer"
    assert len(store.entries("llm")) == 1


@pytest.mark.parametrize(
    ("content", "why"),
    [(None, "it is missing"), (b"pla", "3 bytes instead of 4"), (b"PLAN", "sha256")],
)
def test_damage_is_seen(content: bytes | None, why: str, store: PlanStore) -> None:
    path = store.path(add(store))
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    with pytest.raises(PlanDamaged, match=why):
        store.find("llm", KEY, COMMAND)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda text: text[:40], "llm-.*json is damaged"),
        (lambda text: text.replace('"format": 1', '"format": 7'), "reads format 1"),
        (lambda text: text.replace('"seconds"', '"secs"'), "secs"),
    ],
)
def test_a_damaged_description_is_named(
    change: Callable[[str], str], why: str, store: PlanStore
) -> None:
    path = store.path(add(store)).with_suffix(".json")
    path.write_text(change(path.read_text()))
    with pytest.raises(PlanDamaged, match=why):
        store.find("llm", KEY, COMMAND)


def test_a_description_that_is_not_written_leaves_nothing(
    store: PlanStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = add(store)
    before = sorted(store.folder.iterdir())

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="No space"):
        store.prefer(entry)
    assert sorted(store.folder.iterdir()) == before and store.find("llm", KEY, COMMAND) == entry


def test_a_plan_without_its_description_does_not_count(store: PlanStore) -> None:
    store.path(add(store)).with_suffix(".json").unlink()  # as when the disk was full at the end
    with pytest.raises(PlanMissing):
        store.find("llm", KEY, COMMAND)


sizes = st.integers(0, 4096)


@given(
    st.sampled_from(["float16", "float32"]), sizes, sizes, sizes, sizes, sizes, st.text(max_size=9)
)
def test_keys_differ_where_their_digests_do(
    float_type: FloatType,
    capacity: int,
    chunk: int,
    tiles: int,
    words: int,
    media: int,
    version: str,
) -> None:
    other = PlanKey(
        version, "8.7", "linux-aarch64", "a" * 64,
        PlanProfile(float_type, capacity, chunk, tiles, words, media),
    )  # fmt: skip
    assert (other.digest() == KEY.digest()) == (other == KEY) == (not KEY.differs(other))


def test_the_graph_digest_follows_graph_and_weights() -> None:
    entry = EngineEntry("int8", "llm.onnx", {"cpu": "llm.cpu.onnx"}, (), ())
    files = {
        name: FileEntry(1, name) for name in ("llm.onnx", "llm.data", "llm.cpu.onnx", "vision.data")
    }
    whole = graph_digest(entry, files)
    assert len(whole) == 64
    for name in files:
        changed = graph_digest(entry, {**files, name: FileEntry(1, "changed")})
        assert (changed != whole) == (name in ("llm.onnx", "llm.data"))


def test_entries_are_plain_json(store: PlanStore) -> None:
    path = store.path(add(store)).with_suffix(".json")
    document = json.loads(path.read_text())
    assert document["key"]["compute_capability"] == "8.7"
    assert document["key"]["profile"]["capacity"] == 2048
