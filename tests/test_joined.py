"""Two tensors read as one: every way of reading gives what the concatenated tensor gives."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_graph import initializers, ref, write_product

from vlm_edge.errors import TensorMissing, TensorShapeMismatch
from vlm_edge.export.checkpoint import Checkpoint, TensorRef, Weights
from vlm_edge.export.joined import JoinedRows
from vlm_edge.export.quantizers import Float
from vlm_edge.export.quantizers.weight_only import WeightOnly
from vlm_edge.export.writer import write_embeddings

SIZES = st.integers(1, 9)
HALVES = [np.float16, ml_dtypes.bfloat16, np.float32]


def joined(first: np.ndarray, more: np.ndarray) -> TensorRef:
    """As an architecture file asks for it."""
    known = {"table.weight": first, "table.more.weight": more}

    def tensor(name: str, shape: tuple[int, ...]) -> TensorRef:
        assert known[name].shape == shape
        return TensorRef(name, known[name])

    checkpoint: Any = SimpleNamespace(tensor=tensor)
    weights = JoinedRows(
        checkpoint, "table", more=Weights(checkpoint, "table.more"), rows=len(more)
    )
    return weights.tensor("weight", len(first) + len(more), first.shape[1])


def two(rows: int, more: int, width: int, dtype: Any = np.float32) -> tuple[np.ndarray, np.ndarray]:
    values = np.random.default_rng(rows + more).standard_normal((rows + more, width)).astype(dtype)
    return values[:rows], values[rows:]


@given(SIZES, SIZES, SIZES, st.integers(1, 20), st.sampled_from(HALVES))
def test_all_readings(rows: int, more: int, width: int, step: int, dtype: Any) -> None:
    first, second = two(rows, more, width, dtype)
    found, whole = joined(first, second), np.concatenate([first, second])
    expected = whole.astype(np.float32)
    for here, values in ((found, expected), (found.T, expected.T), (found.T.T, expected)):
        assert here.shape == values.shape
        np.testing.assert_array_equal(here.numpy(), values)
        np.testing.assert_array_equal(np.concatenate(list(here.rows())), values)
        blocks = list(here.rows(step))
        assert [len(b) for b in blocks[:-1]] == [step] * (len(blocks) - 1)
        np.testing.assert_array_equal(np.concatenate(blocks), values)
    ids = np.random.default_rng(step).integers(0, rows + more, (2, step))
    np.testing.assert_array_equal(found.view[ids], whole[ids])
    np.testing.assert_array_equal(found.view[ids[0, 0]], whole[ids[0, 0]])
    assert found.view.dtype == dtype and found.view[ids].dtype == dtype


def test_two_dtypes_are_widened() -> None:
    first, second = two(5, 3, 4)
    found = joined(first.astype(ml_dtypes.bfloat16), second.astype(np.float16))
    assert found.view.dtype == np.float32
    expected = [first.astype(ml_dtypes.bfloat16), second.astype(np.float16)]
    expected = np.concatenate([part.astype(np.float32) for part in expected])
    np.testing.assert_array_equal(found.numpy(), expected)
    np.testing.assert_array_equal(found.T.numpy(), expected.T)
    np.testing.assert_array_equal(found.view[np.arange(8)], expected)


@pytest.mark.parametrize("quantize", [False, True])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_as_a_token_table(quantize: bool, dtype: Any, tmp_path: Path) -> None:
    first, second = two(37, 5, 64, dtype)
    files = []
    for name, table in (
        ("joined", joined(first, second)),
        ("whole", ref(np.concatenate([first, second]))),
    ):
        (tmp_path / name).mkdir()
        write_embeddings(table, tmp_path / name, quantize)
        files.append({f.name: f.read_bytes() for f in (tmp_path / name).iterdir()})
    assert files[0] == files[1]


@pytest.mark.parametrize("quantizer", [Float, lambda: WeightOnly(8, 32), lambda: WeightOnly(4, 16)])
def test_as_a_head(quantizer: Any, tmp_path: Path) -> None:
    first, second = two(37, 5, 64)
    written = []
    for name, weight in (
        ("joined", joined(first, second)),
        ("whole", ref(np.concatenate([first, second]))),
    ):
        module = quantizer().product("lm_head", weight)
        written.append(initializers(write_product(tmp_path / f"{name}.onnx", module, 64, 42)))
    assert written[0].keys() == written[1].keys()
    for name, values in written[0].items():
        np.testing.assert_array_equal(values, written[1][name])


def test_nothing_is_copied_before_it_is_asked_for() -> None:
    """Of a table of 4 TB, as a file that is mapped."""
    first = np.broadcast_to(np.float32(1), (1 << 28, 4096))
    more = np.broadcast_to(np.float32(2), (3, 4096))
    found = joined(first, more)
    assert found.shape == ((1 << 28) + 3, 4096)
    ids = np.array([0, (1 << 28) - 1, 1 << 28, (1 << 28) + 2])
    assert found.view[ids][:, 0].tolist() == [1, 1, 2, 2]
    assert next(found.rows(2)).shape == (2, 4096)
    assert found.view[(1 << 28) - 1 : (1 << 28) + 1][:, 0].tolist() == [1, 2]


def test_a_part_that_is_missing_or_of_another_shape_is_named(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    save_file({"a.weight": np.ones((4, 3), np.float32)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    checkpoint = Checkpoint(tmp_path)
    weights = JoinedRows(checkpoint, "a", more=Weights(checkpoint, "a.more"), rows=2)
    with pytest.raises(TensorMissing, match=r"a\.more\.weight"):
        weights.tensor("weight", 6, 3)
    with pytest.raises(TensorShapeMismatch, match=r"a\.weight"):
        weights.tensor("weight", 7, 3)
