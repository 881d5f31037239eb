"""The manifest and its schema: a round trip, and every wrong key named by its path."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm_edge.errors import BundleDamaged, BundleFormatMismatch, BundleMissing
from vlm_edge.runtime.manifest import FORMAT, NAME, Manifest, read_manifest
from vlm_edge.runtime.schema import SchemaError, from_json, to_json


@dataclass(frozen=True)
class Inner:
    name: str
    size: int = 3


@dataclass(frozen=True)
class Outer:
    whole: int
    real: float
    yes: bool
    kind: Literal["a", "b"]
    maybe: int | None
    either: tuple[int | str, ...]
    pair: tuple[float, float]
    inner: Inner
    many: tuple[Inner, ...]
    by_name: dict[str, Inner]
    free: dict[str, Any] | None = None
    made: dict[str, int] = field(default_factory=dict)


GOOD: dict[str, Any] = {
    "whole": 1, "real": 2, "yes": True, "kind": "a", "maybe": None, "either": [1, "n"],
    "pair": [0.5, 1], "inner": {"name": "x"}, "many": [{"name": "y", "size": 4}],
    "by_name": {"z": {"name": "z"}}, "free": {"any": [1, {"thing": None}]},
}  # fmt: skip


def test_values_become_their_types() -> None:
    found = from_json(Outer, GOOD)
    assert found == Outer(
        whole=1, real=2.0, yes=True, kind="a", maybe=None, either=(1, "n"), pair=(0.5, 1.0),
        inner=Inner("x", 3), many=(Inner("y", 4),), by_name={"z": Inner("z")},
        free={"any": [1, {"thing": None}]}, made={},
    )  # fmt: skip
    assert type(found.real) is float
    assert from_json(Outer, json.loads(json.dumps(to_json(found)))) == found


WRONG: list[tuple[str, Any, str]] = [  # key, its value, what the message starts with
    ("whole", "1", "whole should be int"),
    ("whole", True, "whole should be int"),
    ("whole", 1.5, "whole should be int"),
    ("whole", None, "whole should be int"),
    ("real", "2", "real should be float"),
    ("real", False, "real should be float"),
    ("yes", 1, "yes should be bool"),
    ("kind", "c", "kind is 'c', not one of 'a', 'b'"),
    ("kind", ["a"], "kind is ['a']"),
    ("maybe", "x", "maybe should be int"),
    ("either", 1, "either should be a list, not int"),
    ("either", [1, None], "either[1] should be int or str"),
    ("either", [1.5], "either[0] should be int or str"),
    ("either", [True], "either[0] should be int or str"),
    ("pair", [1], "pair should have 2 entries, not 1"),
    ("pair", [1, "2"], "pair[1] should be float"),
    ("inner", [], "inner should be an object, not list"),
    ("inner", {}, "missing key inner.name"),
    ("inner", {"name": 1}, "inner.name should be str"),
    ("inner", {"name": "x", "colour": 1}, "unknown key inner.colour"),
    ("many", [{"name": "x"}, {"size": 1}], "missing key many[1].name"),
    ("many", {"name": "x"}, "many should be a list, not dict"),
    ("by_name", [], "by_name should be an object, not list"),
    ("by_name", {"k": {"name": None}}, "by_name.k.name should be str"),
    ("free", [], "free should be an object, not list"),
    ("colour", 1, "unknown key colour"),
]


@pytest.mark.parametrize(("key", "value", "said"), WRONG)
def test_a_wrong_value_is_named_by_its_path(key: str, value: Any, said: str) -> None:
    with pytest.raises(SchemaError) as caught:
        from_json(Outer, {**GOOD, key: value})
    assert str(caught.value).startswith(said)


@pytest.mark.parametrize("key", [key for key in GOOD if key != "free"])
def test_a_missing_key_is_named(key: str) -> None:
    with pytest.raises(SchemaError, match=f"^missing key {key}$"):
        from_json(Outer, {name: value for name, value in GOOD.items() if name != key})


@pytest.mark.parametrize("data", [None, [], "x", 1])
def test_the_document_is_an_object(data: Any) -> None:
    with pytest.raises(SchemaError, match="^the document should be an object"):
        from_json(Outer, data)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)


@given(key=st.sampled_from([*GOOD, "new"]), value=JSON)
def test_any_json_gives_a_value_or_a_schema_error(key: str, value: Any) -> None:
    try:
        found = from_json(Outer, {**GOOD, key: value})
    except SchemaError as error:
        assert key in str(error)
    else:
        assert from_json(Outer, to_json(found)) == found


# -- a real manifest --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real(bundle: Callable[..., Path]) -> dict[str, Any]:
    return json.loads((bundle("clip-llama", "int8") / NAME).read_text(encoding="utf-8"))


def test_a_real_manifest_survives_the_round_trip(real: dict[str, Any], tmp_path: Path) -> None:
    manifest = from_json(Manifest, real)
    assert json.loads(manifest.dump()) == real
    (tmp_path / NAME).write_text(manifest.dump(), encoding="utf-8")
    assert read_manifest(tmp_path) == manifest
    assert manifest.format == FORMAT
    kinds = {kind: f"vision.{kind}.onnx" for kind in ("cpu", "cpu-native", "cuda")}
    assert manifest.engines["vision"].lowered == kinds
    kinds = {kind: f"llm.{kind}.onnx" for kind in ("cpu-native", "cuda")}
    assert manifest.engines["llm"].lowered == kinds
    assert manifest.parity is None


def test_every_key_is_in_the_document(real: dict[str, Any]) -> None:
    """docs/bundle.md is the format's description."""
    text = (Path(__file__).parents[1] / "docs" / "bundle.md").read_text(encoding="utf-8")
    for key in real:
        assert f"| `{key}` |" in text
    for part in ("source", "image", "prompt", "decoder", "generation", "embeddings"):
        for key in real[part]:
            assert f"`{key}`" in text or key in ("height", "width"), f"{part}.{key}"


def leaves(data: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all values, and of all objects and lists."""
    if isinstance(data, dict):
        return [path, *(p for key, value in data.items() for p in leaves(value, (*path, key)))]
    if isinstance(data, list):
        return [path, *(p for i, value in enumerate(data) for p in leaves(value, (*path, i)))]
    return [path]


def test_every_value_of_another_type_is_named(real: dict[str, Any]) -> None:
    """Nothing in a manifest goes unchecked but what the calibration and parity reports hold."""
    checked = 0
    for path in leaves(real):
        if not path or path[0] in ("calibration", "parity"):
            continue
        damaged = json.loads(json.dumps(real))
        inner = damaged
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = 0.5 if isinstance(inner[path[-1]], str) else "?"
        if isinstance(path[-1], int) and path[-2] == "shape":
            inner[path[-1]] = 1.5
        with pytest.raises(SchemaError) as caught:
            from_json(Manifest, damaged)
        assert str(path[-1]) in str(caught.value), path
        checked += 1
    assert checked > 100


@pytest.mark.parametrize(
    ("text", "error", "said"),
    [
        ("{", BundleDamaged, "not JSON"),
        ('"x"', BundleFormatMismatch, "None"),
        ("{}", BundleFormatMismatch, "None"),
        ('{"format": 1}', BundleFormatMismatch, "format 1"),
        ('{"format": "2"}', BundleFormatMismatch, "format '2'"),
        ('{"format": true}', BundleFormatMismatch, "format True"),
        ('{"format": 3}', BundleDamaged, "missing key producer"),
    ],
)
def test_what_is_no_manifest_is_refused(text: str, error: Any, said: str, tmp_path: Path) -> None:
    (tmp_path / NAME).write_text(text)
    with pytest.raises(error, match=said):
        read_manifest(tmp_path)


def test_manifests_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(BundleMissing):
        read_manifest(tmp_path / "nowhere")
    (tmp_path / NAME).write_bytes(b"\xff\xfe{")
    with pytest.raises(BundleDamaged):
        read_manifest(tmp_path)
